"""The attack on the released norm refutes the count that was once charged too little."""

import inspect
import sys
from types import ModuleType

import pytest
import torch

from silotune.privacy import client_level
from silotune.privacy.base import PrivacyConfig
from silotune.privacy.noise import seeded_noise
from silotune.workflows.audit import released_norm
from silotune.workflows.audit.released_norm import replay

CFG = PrivacyConfig(unit="client", noise_multiplier=1.9, delta=1e-3, clipping="adaptive")


def attacked(*, noise=None, num_replays=1000, rounds=3):
    return replay(
        CFG, noise_multiplier=1.9, num_planned=20, rounds=rounds, seed=3,
        num_replays=num_replays, noise=noise or stream(),
    )  # fmt: skip


def stream():
    """One stream for all replays, the same in every run of a test."""
    return seeded_noise(torch.Generator().manual_seed(8))


def test_a_correct_guard_is_not_refuted_and_the_bound_is_close():
    found = attacked()
    assert not found.is_refuted
    assert found.noise_multiplier_at_most is not None
    assert 1.9 <= found.noise_multiplier_at_most < 4.0
    assert (found.num_replays, found.num_rounds) == (1000, 3)


def test_bits_of_0_and_1_are_refuted(monkeypatch):
    """20 clients, noise multiplier 1.9: the joint release was worth 0.99."""
    source = inspect.getsource(client_level)
    old = "bits += 0.5 if norm <= clip_norm else -0.5"
    assert source.count(old) == 1
    mutant = ModuleType(client_level.__name__)
    monkeypatch.setitem(sys.modules, mutant.__name__, mutant)
    exec(source.replace(old, "bits += norm <= clip_norm"), vars(mutant))
    monkeypatch.setattr(released_norm, "guarded", mutant.guarded)
    found = attacked()
    assert found.is_refuted
    assert found.noise_multiplier_at_most < 1.5


def test_a_norm_without_noise_is_refuted():
    draw = stream()

    def only_on_the_change(shape, std):
        return draw(shape, std if std != 1.0 else 0.0)

    found = attacked(noise=only_on_the_change, num_replays=300)
    assert found.is_refuted


@pytest.mark.parametrize(("rounds", "expected"), [(1, 1), (30, 15)])
def test_a_replay_has_no_more_rounds_than_it_needs(rounds, expected):
    assert attacked(rounds=rounds, num_replays=20).num_rounds == expected
