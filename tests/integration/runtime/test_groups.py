"""`runtime.together`: a run whose clients share batches is the run of the loop, up to rounding."""

import json
import shutil

import pytest
import torch

import silotune
from silotune.core.errors import ConfigError
from silotune.federation import together as half
from silotune.federation.client_memory import load_memory
from silotune.recipes.parse import load_recipe
from silotune.runtime import groups
from tests.conftest import hospital_rows, write_jsonl, write_tiny_recipe

KEYS = ["rounds=2", "train.local_steps=none", "train.local_epochs=1"]
"""Clients of 8, 9 and 10 rows take unequal steps, the last one of a single row."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model):
    return write_tiny_recipe(tmp_path_factory.mktemp("together"), tiny_model)


@pytest.fixture(scope="module")
def loop(recipe, tmp_path_factory):
    return silotune.run(recipe, KEYS, out=tmp_path_factory.mktemp("loop") / "run")


def differ_at_most(one, other, most: float):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=most)


def same_rows(one, other, *, most: float, without=("seconds", "num_padded_tokens")):
    """Rows of metrics: the same keys in the same order, the same numbers up to rounding."""
    for a, b in zip(one, other, strict=True):
        assert [k for k in b if k != "num_together"] == list(a)
        for key, value in a.items():
            if key.startswith(without):
                continue
            if isinstance(value, float):
                assert b[key] == pytest.approx(value, rel=most, abs=most), key
            else:
                assert b[key] == value, key


@pytest.mark.parametrize("together", ["3", "2", "auto"])
def test_a_run_in_groups_is_the_run_of_the_loop_up_to_rounding(recipe, loop, tmp_path, together):
    done = silotune.run(recipe, [*KEYS, f"runtime.together={together}"], out=tmp_path / "run")
    differ_at_most(dict(loop.adapter()), dict(done.adapter()), 1e-4)
    same_rows(loop.metrics, done.metrics, most=1e-4)
    trained = [row for row in done.metrics if row["event"] == "train"]
    sizes = {"2": [2, 2, None], "3": [3, 3, 3], "auto": [2, 2, None]}[together]
    assert [row.get("num_together") for row in trained] == 2 * sizes
    assert all(row["seconds"] >= row["seconds_training"] > 0 for row in trained)
    for row in trained:
        kept = load_memory(done.path / "clients" / row["client"], 3)
        assert kept.position == load_memory(loop.path / "clients" / row["client"], 3).position


def test_one_client_at_a_time_gives_the_bytes_of_the_loop(recipe, loop, tmp_path):
    done = silotune.run(recipe, [*KEYS, "runtime.together=1"], out=tmp_path / "run")
    assert done.summary["adapter_sha256"] == loop.summary["adapter_sha256"]


def test_the_same_groups_give_the_same_bytes_again(recipe, tmp_path):
    keys = [*KEYS, "runtime.together=auto"]
    one, other = (silotune.run(recipe, keys, out=tmp_path / n) for n in "ab")
    assert one.summary["adapter_sha256"] == other.summary["adapter_sha256"]


def test_a_run_that_was_interrupted_between_rounds_ends_in_the_same_bytes(
    recipe, tmp_path, monkeypatch
):
    keys = [*KEYS, "rounds=3", "runtime.together=2"]
    whole = silotune.run(recipe, keys, out=tmp_path / "whole")
    real = half.take_part_together

    def stop(worker, group, **more):
        if group[0].broadcast.round == 2:
            raise KeyboardInterrupt
        return real(worker, group, **more)

    with monkeypatch.context() as patch:
        patch.setattr("silotune.runtime.inprocess.take_part_together", stop)
        with pytest.raises(KeyboardInterrupt):
            silotune.run(recipe, keys, out=tmp_path / "run")
    done = silotune.run(resume=tmp_path / "run")
    assert done.summary["adapter_sha256"] == whole.summary["adapter_sha256"]


def test_a_run_that_was_killed_within_a_group_uses_what_was_handed_in(
    recipe, loop, tmp_path, monkeypatch
):
    """The first of three updates is spooled; the other two clients are asked again."""
    keys, real, asked = [*KEYS, "runtime.together=3"], half.take_part_together, []

    def stop(worker, group, **more):
        asked.append([one.data.name for one in group])
        for n, arrival in enumerate(real(worker, group, **more)):
            if n == 1 and len(asked) == 2:
                raise KeyboardInterrupt
            yield arrival

    monkeypatch.setattr("silotune.runtime.inprocess.take_part_together", stop)
    with pytest.raises(KeyboardInterrupt):
        silotune.run(recipe, keys, out=tmp_path / "run")
    done = silotune.run(resume=tmp_path / "run")
    everyone = ["hospital-0", "hospital-1", "hospital-2"]
    assert asked == [everyone, everyone, everyone[1:]]
    differ_at_most(dict(loop.adapter()), dict(done.adapter()), 1e-4)


def test_a_client_whose_training_fails_is_named_and_the_others_count(recipe, tmp_path, monkeypatch):
    real = half.train_together

    def ill(*given, **more):
        found = real(*given, **more)
        broken = {n: t * float("nan") for n, t in found[1][1].items()}
        return [found[0], (found[1][0], broken), *found[2:]]

    keys = ["rounds=1", "runtime.together=3"]
    fine = silotune.run(recipe, keys, out=tmp_path / "fine")
    monkeypatch.setattr(half, "train_together", ill)
    done = silotune.run(recipe, keys, out=tmp_path / "run")
    rows = {row["client"]: row for row in done.metrics if row["event"] == "train"}
    assert [rows[f"hospital-{n}"]["status"] for n in range(3)] == ["ok", "training failed", "ok"]
    for name in ("hospital-0", "hospital-2"):
        was = next(r for r in fine.metrics if r["event"] == "train" and r["client"] == name)
        assert rows[name]["delta_norm"] == was["delta_norm"]
    assert not (done.path / "clients" / "hospital-1").exists(), "a client that failed keeps nothing"


@pytest.mark.parametrize(
    "more",
    [
        ["algorithm.name=scaffold", "train.optimizer=sgd", "train.clip_norm=0"],
        ["algorithm.name=fedsa_lora"],
        ["algorithm.name=fed_sb"],
        ["algorithm.name=fedex"],
        ["train.keep_moments=true", "train.accumulation=2"],
        ["wire.up=int8"],
        [
            "secure_sum.kind=masks",
            "secure_sum.range=8",
            "secure_sum.min_cohort=3",
            "algorithm.weights=uniform",
        ],
        ["task=text", "data.prompt=none", "data.completion=none"],
    ],
    ids=lambda keys: keys[0],
)
def test_algorithms_and_wires_work_in_groups(recipe, tmp_path, more):
    keys = ["rounds=2", *more]
    if "task=text" in more:
        texts = [{"source": r["source"], "text": r["answer"]} for r in hospital_rows()]
        path = write_jsonl(tmp_path / "texts.jsonl", texts)
        keys = ["rounds=2", "task=text", f"data.path={path}"]
    loop = silotune.run(recipe, keys, out=tmp_path / "loop")
    done = silotune.run(recipe, [*keys, "runtime.together=3"], out=tmp_path / "run")
    # a wire of few bits may round an entry the other way, and sums of masks have a grid
    most = 2e-3 if more[0].startswith(("wire", "secure")) else 2e-4
    differ_at_most(dict(loop.adapter()), dict(done.adapter()), most)
    assert {row.get("num_together") for row in done.metrics if row["event"] == "train"} == {3}


def test_protection_of_whole_clients_works_in_groups(recipe, tmp_path):
    keys = ["rounds=1", "algorithm.weights=uniform", "privacy.unit=client", "privacy.delta=0.01"]
    keys += ["privacy.noise_multiplier=0.5", "privacy.noise=seeded", "privacy.clip_norm=0.1"]
    loop = silotune.run(recipe, keys, out=tmp_path / "loop")
    done = silotune.run(recipe, [*keys, "runtime.together=3"], out=tmp_path / "run")
    differ_at_most(dict(loop.adapter()), dict(done.adapter()), 1e-4)


# --- what is refused, and what falls back

REFUSED = {
    "adapter.dora=true": "DoRA's norms",
    "adapter.kind=ia3; adapter.targets=none": "only LoRA's factors",
    "adapter.kind=full; adapter.targets=none": "only LoRA's factors",
    "model.quantization=nf4": "a quantised base",
    "train.packing=true": "a packed batch",
    "model.gradient_checkpointing=true": "masks",
    "adapter.ranks={ hospital-0 = 1 }; algorithm.name=flora": "one rank",
    "privacy.unit=record; privacy.noise_multiplier=1.0; privacy.delta=0.01": "clipped in passes",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_cannot_be_done_together_is_a_mistake_with_its_reason(recipe, overrides):
    keys = [*overrides.split("; "), "evaluate.every=0"]
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, [*keys, "runtime.together=4"])
    mine = [x for x in str(caught.value).splitlines() if "runtime.together" in x]
    assert mine
    assert REFUSED[overrides] in mine[0]
    if "record" not in overrides:  # which asks for more keys
        auto = load_recipe(recipe, [*keys, "runtime.together=auto"])
        assert REFUSED[overrides] in (groups.why_alone(auto, [9], "cpu") or "")


def test_another_runtime_cannot_do_it(recipe):
    with pytest.raises(ConfigError, match=r"runtime.together: only has an effect with.*in-process"):
        load_recipe(recipe, ["runtime.together=2", "runtime.name=flower-simulation"])


@pytest.mark.parametrize("value", ["0", "-1", "2.5", "all", "true"])
def test_a_wrong_number_of_clients_is_named(recipe, value):
    with pytest.raises(ConfigError, match=r"runtime\.together"):
        load_recipe(recipe, [f"runtime.together={value}"])


def test_auto_says_why_it_trains_one_after_another(recipe, tmp_path):
    said: list[str] = []

    class Listener(silotune.federation.progress.Progress):
        def note(self, text):
            said.append(text)

    keys = ["rounds=1", "runtime.together=auto", "adapter.dora=true"]
    done = silotune.run(recipe, keys, out=tmp_path / "run", progress=Listener())
    (note,) = [text for text in said if "together" in text]
    assert "one client after another, because of adapter.dora: DoRA's norms" in note
    assert not any("num_together" in row for row in done.metrics)


def test_auto_leaves_large_passes_and_other_devices_alone(recipe):
    run = load_recipe(recipe, ["train.batch_size=16"])
    assert "joining more than 256 may be slower" in (groups.why_alone(run, [40], "cpu") or "")
    assert "was measured on CPUs only" in (groups.why_alone(run, [4], "cuda") or "")
    assert groups.why_alone(run, [4], "cpu") is None
    assert [groups.auto_size(run, [n]) for n in (1, 2, 8, 16, 17, 500)] == [16, 8, 2, 1, 1, 1]


def test_a_model_that_cannot_do_it_ends_a_run_that_asks_for_a_number(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(groups, "why_not_stacked", lambda loaded: "its rows meet")
    with pytest.raises(ConfigError, match=r"runtime.together = 2: its rows meet"):
        silotune.run(recipe, ["rounds=1", "runtime.together=2"], out=tmp_path / "run")
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    done = silotune.run(recipe, ["rounds=1", "runtime.together=auto"], out=tmp_path / "run")
    assert json.dumps(done.metrics)
    assert not any("num_together" in row for row in done.metrics)
