"""Opposed changes are named; changes that merely differ are not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from silotune.core.types import Update
from silotune.federation.conflict import LIMIT, conflict_of, opposed_pairs, sketch
from silotune.recipes.parse import parse
from silotune.results.conflict import conflict_lines

RUN = parse({"rounds": 1, "task": "prefer", "data": {"path": "x"}})


def change(seed, size=30000):
    gen = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(size, generator=gen), "b": torch.randn(2, 50, generator=gen)}


def scaled(state, factor):
    return {name: factor * t for name, t in state.items()}


def updates(**deltas):
    return [Update(name, 1, delta, 5, {}) for name, delta in sorted(deltas.items())]


@given(st.integers(0, 999), st.floats(-1, 1))
def test_a_sketch_keeps_the_cosine(seed, wanted):
    one, noise = change(seed), change(seed + 5000)
    both = {n: wanted * one[n] + (1 - wanted**2) ** 0.5 * noise[n] for n in one}
    exact = torch.cosine_similarity(*(torch.cat([t.flatten() for t in s.values()]).double()
                                      for s in (one, both)), dim=0)  # fmt: skip
    found = torch.cosine_similarity(sketch(one, 3), sketch(both, 3), dim=0)
    assert float(found) == pytest.approx(float(exact), abs=5 / 64)


def test_opposed_changes_are_found_and_independent_ones_are_not():
    one = change(1)
    found = opposed_pairs(RUN, updates(a=one, b=scaled(one, -0.01), c=change(2), d=scaled(one, 9)))
    assert [(a, b) for a, b, _ in found] == [("a", "b"), ("b", "d")]
    assert all(cosine == pytest.approx(-1) for *_, cosine in found)


def test_a_change_of_zero_opposes_nobody():
    assert opposed_pairs(RUN, updates(a=scaled(change(1), 0), b=change(1))) == []


def test_only_preferences_whose_updates_may_be_seen_are_compared():
    both = updates(a=change(1), b=scaled(change(1), -1))
    assert opposed_pairs(RUN, both)
    for other in (
        RUN.model_copy(update={"task": "instruct"}),
        RUN.model_copy(update={"secure_sum": RUN.secure_sum.model_copy(update={"kind": "masks"})}),
        RUN.model_copy(update={"privacy": RUN.privacy.model_copy(update={"unit": "client"})}),
    ):
        assert opposed_pairs(other, both) == []


def metrics(*opposed, names="abcd"):
    rows = []
    for round_, pairs in enumerate(opposed, start=1):
        rows += [{"event": "train", "round": round_, "client": n, "num_steps": 1} for n in names]
        rows.append({"event": "round", "round": round_, **({"opposed": pairs} if pairs else {})})
    return rows


def test_two_sides_are_named_the_larger_one_first():
    pairs = [("a", "b", -0.5), ("a", "d", -0.4), ("b", "c", -0.6), ("c", "d", -0.5)]
    found = conflict_of(metrics(pairs, pairs))
    assert found == {"sides": [["a", "c"], ["b", "d"]], "cosine": pytest.approx(-0.5)}
    three = [("a", "d", -0.5), ("b", "d", -0.5), ("c", "d", -0.5)]
    assert conflict_of(metrics(three))["sides"] == [["a", "b", "c"], ["d"]]
    (line,) = conflict_lines({"conflict": conflict_of(metrics(three))})
    assert "what d learned points against what a, b, c learned (mean cosine -0.50)" in line


def test_an_opposition_of_a_few_rounds_is_no_conflict():
    assert conflict_of(metrics([("a", "b", LIMIT * 2)], [], [])) is None
    assert conflict_of(metrics([], [])) is None
    assert conflict_lines({}) == []
