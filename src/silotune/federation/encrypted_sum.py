"""Encrypted sums in a run: what a client sends instead of its change, and what the sum becomes.

The encryption is that of `privacy/secure_sum/ckks.py`. As with masks, an update is one tensor that
nobody can read, and a linear algorithm gets the weighted mean as if it came from one client.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from silotune.core.algorithm import Algorithm
from silotune.core.types import Change, Layout, ServerState, TensorSpec, Update, Updates
from silotune.federation.secure_sum import (
    Opened,
    as_sent,
    check_cohort,
    check_sums_suffice,
    count_of,
    whole,
    within_range,
)
from silotune.privacy.secure_sum.ckks import CIPHERTEXT_BYTES, Holder, num_ciphertexts
from silotune.recipes.schema import RunConfig

TENSOR = "ciphertexts"
"""The only tensor of an encrypted update: all numbers in name order, then the client's weight."""

PRECISE = 2.0**-20
"""No number is off by more; far above what encryption adds."""


@dataclass
class SimulatedEncryption:
    """Both sides of encrypted sums, in one process: the clients' key, and the server without it."""

    run: RunConfig
    num_clients: int
    """Most clients of a round."""

    def __post_init__(self) -> None:
        """Make the key that all clients share.

        Raises:
            ConfigError: TenSEAL is not installed, or the numbers do not fit.
        """
        cfg = self.run.secure_sum
        assert cfg.range is not None, "recipes/secure_sums.py requires it"
        most = cfg.max_examples if self.run.algorithm.weights == "examples" else 1
        self._clients = Holder(max(cfg.range, 1.0) * most, self.num_clients)
        self._server = self._clients.public()

    def begin(self, round_: int, names: Sequence[str], count: int) -> None:  # noqa: ARG002
        """Check that enough clients are asked: the key is the same in every round.

        Raises:
            ConfigError: There are fewer than `secure_sum.min_cohort`.
        """
        check_cohort(self.run, len(names))

    def hide(self, update: Update) -> Update:
        """What a client sends instead of the update.

        Raises:
            UpdateError: It has more rows than `secure_sum.max_examples`.
        """
        values, weight, cut = within_range(self.run, update)
        sent = self._clients.encrypt(np.append(values * weight, float(weight)))
        return as_sent(update, {TENSOR: torch.from_numpy(sent)}, cut)

    def add(self, total: Sequence[Any] | None, update: Update) -> Sequence[Any]:
        """The server's half: add one client's ciphertexts."""
        who = f"client '{update.client}', round {update.round}"
        return self._server.add(total, update.delta[TENSOR].numpy(), who=who)

    def open(self, total: Sequence[Any], count: int) -> tuple[NDArray[np.float64], int]:
        """The clients' half: decrypt a sum of changes, and of weights."""
        numbers = self._clients.decrypt(total, count + 1)
        return numbers[:-1], round(float(numbers[-1]))


def as_ciphertexts(algorithm: Algorithm) -> Algorithm:
    """The algorithm with updates of the shape that encrypted ones have."""

    def layout(state: ServerState, client: str | None) -> Layout:  # noqa: ARG001
        rows = num_ciphertexts(count_of(algorithm, state) + 1)
        return {TENSOR: TensorSpec((rows, CIPHERTEXT_BYTES), torch.uint8)}

    return replace(algorithm, layout=layout)


def encrypted(algorithm: Algorithm, run: RunConfig, sums: SimulatedEncryption) -> Algorithm:
    """An algorithm whose server adds up what it cannot read.

    Args:
        algorithm: Linear, and nothing but the delta is sent.
        run: The recipe.
        sums: Adds, and has the sum opened.
    """
    check_sums_suffice(algorithm)

    def combine(state: ServerState, updates: Updates) -> Change:
        total, num_clients = None, 0
        for update in updates:
            total, num_clients = sums.add(total, update), num_clients + 1
        assert total is not None, "a round has a quorum"
        values, weight = sums.open(total, count_of(algorithm, state))
        return whole(algorithm, run, state, Opened(values, weight, num_clients, step=PRECISE))

    return replace(as_ciphertexts(algorithm), combine=combine)
