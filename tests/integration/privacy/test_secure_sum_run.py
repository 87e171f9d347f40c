"""A run under masks is the run of the same numbers without masks, whoever drops out."""

import numpy as np
import pytest
import torch

import silotune
from silotune.core.errors import ConfigError, QuorumError, UpdateError
from silotune.federation import secure_sum
from silotune.federation.client import take_part
from silotune.federation.spool import Spool
from silotune.runtime import inprocess
from tests.conftest import hospital_rows, write_jsonl, write_tiny_recipe

MASKS = ["secure_sum.kind=masks", "secure_sum.range=0.25"]
PLAIN = [*MASKS, "secure_sum.simulate=true"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model):
    place = tmp_path_factory.mktemp("sums")
    made = write_tiny_recipe(place, tiny_model)
    write_jsonl(place / "hospitals.jsonl", hospital_rows(5, 6))
    return made


def adapter_of(recipe, place, *keys):
    return silotune.run(recipe, list(keys), out=place).adapter()


def equal(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "keys",
    [
        [],
        ["algorithm.weights=uniform"],
        ["algorithm.name=fedadam"],
        ["algorithm.name=fedprox", "algorithm.mu=0.1"],
        ["algorithm.name=ffa_lora"],
        ["algorithm.name=rolora"],
        ["algorithm.name=fed_sb"],
        ["sampling.fraction=0.8"],
    ],
    ids=lambda keys: " ".join(keys) or "fedavg",
)
def test_masks_change_nothing_and_fixed_point_next_to_nothing(recipe, tmp_path, keys):
    masked = adapter_of(recipe, tmp_path / "masked", *MASKS, *keys)
    assert equal(masked, adapter_of(recipe, tmp_path / "plain", *PLAIN, *keys))
    usual = adapter_of(recipe, tmp_path / "usual", *keys)
    moved = {name: float((masked[name] - usual[name]).abs().max()) for name in usual}
    assert max(moved.values()) < (1e-3 if "algorithm.name=fedadam" in keys else 1e-4), moved


NOISE = [
    *("privacy.unit=client", "privacy.noise_at=client", "privacy.noise=seeded", "rounds=1"),
    *("privacy.delta=0.1", "privacy.clip_norm=0.1", "algorithm.weights=uniform"),
    "evaluate.every=0",
]


def test_noise_of_whole_clients_is_the_same_under_masks_and_as_large_as_planned(recipe, tmp_path):
    """It is added to the words, so it is in the sum and nowhere before."""
    noisy = [*NOISE, "privacy.noise_multiplier=0.1"]
    masked = adapter_of(recipe, tmp_path / "masked", *MASKS, *noisy)
    assert equal(masked, adapter_of(recipe, tmp_path / "plain", *PLAIN, *noisy))
    quiet = adapter_of(recipe, tmp_path / "quiet", *PLAIN, *NOISE, "privacy.noise_multiplier=0")
    apart = torch.cat([(masked[n] - quiet[n]).reshape(-1) for n in quiet])
    assert float(apart.std()) == pytest.approx(0.1 * 0.1 / 5**0.5, rel=0.1)


def dropping(*gone):
    """Clients whose training fails, after they have shared their secrets."""

    def take(worker, data, broadcast, own, *, count=None):
        if (data.name, broadcast.round) in gone:
            raise UpdateError(f"client '{data.name}' fails")
        return take_part(worker, data, broadcast, own, count=count)

    return take


def test_a_client_that_drops_out_is_left_out_of_the_sum(recipe, tmp_path, monkeypatch):
    """Of five, one may; the result is that of a run of the others in that round."""
    monkeypatch.setattr(inprocess, "take_part", dropping(("hospital-2", 2)))
    masked = silotune.run(recipe, MASKS, out=tmp_path / "masked")
    assert equal(masked.adapter(), adapter_of(recipe, tmp_path / "plain", *PLAIN))
    usual = adapter_of(recipe, tmp_path / "usual")
    for name, tensor in masked.adapter().items():
        assert torch.allclose(tensor, usual[name], atol=1e-4), name


def test_one_client_too_few_ends_the_run_and_it_goes_on_after_a_repair(
    recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr(inprocess, "take_part", dropping(("hospital-2", 2), ("hospital-3", 2)))
    with pytest.raises(QuorumError, match="3 usable updates of 5, and a secure sum needs 4"):
        silotune.run(recipe, MASKS, out=tmp_path / "run")
    monkeypatch.undo()
    done = silotune.run(resume=tmp_path / "run")
    assert equal(done.adapter(), adapter_of(recipe, tmp_path / "plain", *PLAIN))


def test_a_round_that_was_interrupted_begins_again_with_new_keys(recipe, tmp_path, monkeypatch):
    """Masked updates of the first process are on disk; without its keys they are chance."""

    def stop(worker, data, broadcast, own, *, count=None):
        if (data.name, broadcast.round) == ("hospital-3", 2):
            raise KeyboardInterrupt
        return take_part(worker, data, broadcast, own, count=count)

    monkeypatch.setattr(inprocess, "take_part", stop)
    with pytest.raises(KeyboardInterrupt):
        silotune.run(recipe, MASKS, out=tmp_path / "run")
    left = list(Spool(tmp_path / "run" / "spool" / "round-00002"))
    assert [update.client for update in left] == ["hospital-0", "hospital-1", "hospital-2"]
    monkeypatch.undo()
    done = silotune.run(resume=tmp_path / "run")
    assert equal(done.adapter(), adapter_of(recipe, tmp_path / "plain", *PLAIN))


def test_what_reaches_the_server_is_not_the_change(recipe, tmp_path, monkeypatch):
    """Of every update that is spooled: one tensor of words, other ones in each run, no norm."""
    seen = {}
    add = Spool.add

    def watch(self, update):
        seen.setdefault(run_now, {})[update.client, update.round] = update
        add(self, update)

    monkeypatch.setattr(Spool, "add", watch)
    for run_now in ("one", "two"):
        silotune.run(recipe, [*MASKS, "rounds=1"], out=tmp_path / run_now)
    assert len(seen["one"]) == 5
    for key, update in seen["one"].items():
        assert list(update.delta) == [secure_sum.TENSOR]
        assert "delta_norm" not in update.metrics
        assert update.metrics[secure_sum.CUT] == 0
        words, again = (seen[run][key].delta[secure_sum.TENSOR].numpy() for run in ("one", "two"))
        assert np.mean(words == again) < 0.01
    rows = [r for r in silotune.Run(tmp_path / "one").metrics if r["event"] == "train"]
    assert {row["status"] for row in rows} == {"ok"}


def test_the_plan_counts_what_is_sent_to_the_byte(recipe, tmp_path):
    planned = silotune.plan(recipe, [*MASKS, "rounds=1"], measured=False).traffic
    done = silotune.run(recipe, [*MASKS, "rounds=1"], out=tmp_path / "run")
    assert planned.bytes_up == done.summary["bytes_up"]
    usual = silotune.plan(recipe, ["rounds=1"], measured=False).traffic
    assert planned.bytes_up == usual.bytes_up + 5 * 4, "one number more: each client's weight"


def test_numbers_beyond_the_range_are_cut_and_counted(recipe, tmp_path):
    done = silotune.run(recipe, [*MASKS[:1], "secure_sum.range=1e-4"], out=tmp_path / "run")
    rows = [r for r in done.metrics if r["event"] == "train"]
    assert all(row[secure_sum.CUT] > 0 for row in rows)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["secure_sum.kind=masks"], "secure_sum.range: is missing"),
        (["secure_sum.range=1"], "secure_sum.range: only has an effect with kind"),
        ([*MASKS, "algorithm.name=median"], "'median' cannot be used with secure sums"),
        ([*MASKS, "algorithm.name=flexlora"], "no weighted sum of the changes"),
        ([*MASKS, "algorithm.name=feddyn"], "has to know who answered"),
        (
            [*MASKS, "algorithm.name=scaffold", "train.optimizer=sgd"],
            "clients send more than their change",
        ),
        ([*MASKS, "checkpoint.keep_updates=true"], "words under masks"),
        (
            [*PLAIN, "runtime.name=flower-simulation"],
            "secure_sum.simulate: needs runtime.name = 'in-process'",
        ),
        (
            [*MASKS, "runtime.name=flower-simulation", "checkpoint.every=2"],
            "clients open the sum of a round once",
        ),
        (
            [*MASKS, "runtime.name=flower", "evaluate.every=1"],
            "evaluate.every: must be 0 with secure sums",
        ),
        (
            [*MASKS, "privacy.unit=client", "privacy.noise_multiplier=1", "privacy.delta=1e-3"],
            "the server cannot clip a change",
        ),
        ([*MASKS, 'compare.algorithms=["median"]'], "compare.algorithms.0: 'median'"),
        ([*MASKS, "secure_sum.min_cohort=2"], "greater than or equal to 3"),
    ],
)
def test_what_cannot_be_summed_is_refused_with_the_reason(recipe, tmp_path, keys, said):
    with pytest.raises(ConfigError) as error:
        silotune.run(recipe, keys, out=tmp_path / "run")
    assert said in str(error.value)
    assert not (tmp_path / "run").exists()


def test_too_small_a_cohort_is_an_error_that_says_what_to_do(recipe, tmp_path):
    with pytest.raises(ConfigError, match=r"asks 3 clients, and secure_sum.min_cohort is 4"):
        silotune.check(recipe, [*MASKS, "sampling.fraction=0.6"])
    with pytest.raises(ConfigError, match="do not fit into the ring"):
        silotune.check(recipe, [*MASKS, "secure_sum.range=1e308", "secure_sum.max_examples=10000"])


def test_more_rows_than_the_recipe_allows_are_refused_at_the_client(recipe, tmp_path):
    with pytest.raises(UpdateError, match=r"more than secure_sum.max_examples = 3"):
        silotune.run(recipe, [*MASKS, "secure_sum.max_examples=3"], out=tmp_path / "run")
