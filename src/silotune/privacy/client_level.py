"""Client-level privacy: the sum of clipped changes, with noise, before the server's step.

Unit: a client with all its rows. Adversary: anyone who sees the adapter after every round, and
nothing else; the server sees the changes themselves and is trusted. Neighbours: the same run,
except that one client never answers. The number of clients that a round plans to ask is the same in
both, and public. Assumes no amplification by sampling: a client may be asked in every round. The
mean is over the planned clients, however many answer, and all clients have the same weight. So one
client moves the sum by at most the clip norm, and there is never less noise than planned. With an
adaptive norm, a round releases two sums, and one client moves both: see `split_noise`.

McMahan et al. 2018, arXiv:1710.06963, Algorithm 1, with their fixed denominator; Andrew et al.
2021, arXiv:1905.03871, for the adaptive norm.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from silotune.core.algorithm import Algorithm
from silotune.core.types import AdapterState, Change, ServerState, Updates
from silotune.privacy.base import PrivacyConfig
from silotune.privacy.clip import clip_by_global_norm, next_clip_norm, split_noise
from silotune.privacy.noise import Noise

PURPOSE = "privacy"
"""The guard's key in the server's memory."""


@dataclass(frozen=True)
class Release:
    """One round's release, as recorded before it happens."""

    round: int
    noise_multiplier: float
    """Noise of the entire release, in units of the sensitivity."""
    clip_norm: float
    num_planned: int
    """Number of clients that the mean is over."""
    num_updates: int
    """Number of clients that answered. Only the server knows it; it is not released."""


def noised(
    delta: AdapterState, *, clip_norm: float, noise_multiplier: float, noise: Noise, who: str
) -> dict[str, Tensor]:
    """One client's change, clipped and noised at the client: what an untrusted server receives.

    Args:
        delta: All tensors of the client's change. Not modified.
        clip_norm: Bound on its L2 norm over all tensors together.
        noise_multiplier: Standard deviation of the noise in every number, in units of `clip_norm`.
        noise: Source of the noise.
        who: Whose change it is, for the error.

    Raises:
        UpdateError: A tensor contains NaN or infinity.
    """
    clipped, _ = clip_by_global_norm(delta, clip_norm=clip_norm, who=who)
    std = noise_multiplier * clip_norm
    return {
        name: (clipped[name] + noise(clipped[name].shape, std)).float() for name in sorted(clipped)
    }


def _clipped_sum(updates: Updates, clip_norm: float) -> tuple[dict[str, Tensor], float, int]:
    """The sum of the clipped changes, the sum of the bits, and how many changes there are.

    A bit is 1/2 if the change is within the norm, and -1/2 if it is not. A client that does not
    answer is a 0 in both sums. It would be further away from bits of 0 and 1: Andrew et al. 2021,
    section 3.
    """
    total: dict[str, Tensor] = {}
    bits, num_updates = 0.0, 0
    for update in updates:
        clipped, norm = clip_by_global_norm(
            update.delta, clip_norm=clip_norm, who=f"client '{update.client}'"
        )
        total = {n: t + total[n] for n, t in clipped.items()} if total else clipped
        bits += 0.5 if norm <= clip_norm else -0.5
        num_updates += 1
    return total, bits, num_updates


def guarded(
    algorithm: Algorithm,
    cfg: PrivacyConfig,
    *,
    noise_multiplier: float,
    num_planned: int,
    noise: Callable[[int], Noise],
    write_down: Callable[[Release], None],
) -> Algorithm:
    """An algorithm whose change is clipped, averaged with equal weights, and noised.

    Args:
        algorithm: Its `step` applies the change; its `combine` is not used.
        cfg: [privacy].
        noise_multiplier: Noise of one round's release.
        num_planned: Number of clients that a round asks.
        noise: Gives a round's source of noise.
        write_down: Records a release before it is made, so that a crash cannot hide it.

    Raises:
        ValueError: There is too much noise for adaptive clipping; see `split_noise`.
    """
    assert algorithm.linear, "a change that is not a sum of deltas has another sensitivity"
    assert algorithm.extra_layout is None, "what is sent besides the delta is not covered"
    of_change, of_bits = noise_multiplier, 0.0
    if cfg.clipping == "adaptive":
        of_change, of_bits = split_noise(noise_multiplier, num_clients=num_planned)

    def init(adapter: AdapterState, num_clients: int) -> dict[str, AdapterState]:
        first = torch.tensor([cfg.clip_norm], dtype=torch.float32)
        return {**algorithm.init(adapter, num_clients), PURPOSE: {"clip_norm": first}}

    def combine(state: ServerState, updates: Updates) -> Change:
        clip_norm = float(state.extra[PURPOSE]["clip_norm"])
        total, bits, num_updates = _clipped_sum(updates, clip_norm)
        round_ = state.round + 1
        write_down(Release(round_, noise_multiplier, clip_norm, num_planned, num_updates))
        draw = noise(round_)
        delta = {
            name: ((total[name] + draw(total[name].shape, of_change * clip_norm)) / num_planned)
            for name in sorted(total)
        }
        if cfg.clipping == "adaptive":
            share = 0.5 + (bits + float(draw([1], of_bits))) / num_planned
            clip_norm = next_clip_norm(
                clip_norm, share_within=share, quantile=cfg.quantile, lr=cfg.clip_lr
            )
        then = torch.tensor([clip_norm], dtype=torch.float32)
        return Change({n: t.float() for n, t in delta.items()}, {PURPOSE: {"clip_norm": then}})

    def step(state: ServerState, change: Change) -> ServerState:
        inside = {k: v for k, v in state.extra.items() if k != PURPOSE}
        after = algorithm.step(replace(state, extra=inside), Change(change.delta))
        return replace(after, extra={**after.extra, **change.extra})

    return replace(algorithm, init=init, combine=combine, step=step)
