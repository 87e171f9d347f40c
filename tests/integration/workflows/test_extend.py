"""`silotune run --resume RUN rounds=N`: the longer run, or a reason why it would not be one."""

import json

import pytest
import torch
from safetensors.torch import load_file

import silotune
from silotune.core.errors import ConfigError, RunFolderError
from silotune.federation.own_steps import FILE as OWN
from silotune.federation.run_folder import RunFolder
from silotune.federation.run_record import EXTENDED, extensions
from silotune.recipes.parse import load_recipe, with_overrides
from silotune.workflows import extend
from tests.conftest import write_tiny_recipe

KEYS = ["evaluate.every=2", "checkpoint.every=2", "finish.local_steps=1", "sampling.num_clients=2"]
CLOCK = ("seconds", "seconds_training")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model):
    place = tmp_path_factory.mktemp("extend")
    return write_tiny_recipe(place, tiny_model, algorithm="fedadam")


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """Five rounds from the start."""
    return silotune.run(recipe, [*KEYS, "rounds=5"], out=tmp_path_factory.mktemp("whole") / "run")


def metrics_of(run):
    """Everything but the clock; scores by their round, which an end inside the run moves."""
    rows = [{k: v for k, v in row.items() if k not in CLOCK} for row in run.metrics]
    return sorted(rows, key=lambda r: (r["event"], r["round"], r.get("client", "")))


def assert_same(one, other):
    adapter = "adapter/adapter_model.safetensors"
    assert (one.path / adapter).read_bytes() == (other.path / adapter).read_bytes()
    assert metrics_of(one) == metrics_of(other)
    same = ("clients", "bytes_up", "bytes_down", "tokens_trained", "rounds", "result_round")
    assert {k: one.summary[k] for k in same} == {k: other.summary[k] for k in same}
    for client in one.summary["clients"]:
        kept = [
            load_file(RunFolder.open(run.path).client_folder(client) / OWN) for run in (one, other)
        ]
        assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


def test_a_finished_run_that_is_extended_is_the_longer_run(recipe, whole, tmp_path):
    """Rounds 3 is neither a multiple of checkpoint.every nor of evaluate.every."""
    short = silotune.run(recipe, [*KEYS, "rounds=3"], out=tmp_path / "run")
    before = (short.path / "recipe.toml").read_bytes()
    done = silotune.run(overrides=["rounds=5"], resume=short.path)
    assert_same(done, whole)
    assert done.config == whole.config
    assert (done.path / "recipe.toml").read_bytes() == before
    (entry,) = done.summary["extended"]
    assert entry["after_round"] == 3
    assert (entry["before"], entry["after"]) == ({"rounds": 3}, {"rounds": 5})
    assert extensions(done.path) == [entry]
    for text in ("README.md", "report.html"):
        if text == "report.html":
            done.report()
        assert "Extended from 3 to 5 rounds" in (done.path / text).read_text()
    assert done.summary["predicted"]["bytes"]["predicted"] > 0
    assert json.loads((done.path / "plan.json").read_text())["rounds"] == 5
    again = silotune.run(overrides=["rounds=5"], resume=short.path)  # nothing is left to do
    assert again.summary == done.summary


class _Stops(silotune.Progress):
    """Like Ctrl-C, after a round."""

    def __init__(self, after: int) -> None:
        self.after = after

    def end_round(self, round_, rows):
        if round_ == self.after:
            raise KeyboardInterrupt


def test_an_interrupted_run_is_extended_and_survives_another_interruption(recipe, whole, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        silotune.run(recipe, [*KEYS, "rounds=3"], out=out, progress=_Stops(1))
    with pytest.raises(KeyboardInterrupt):
        silotune.run(overrides=["rounds=4"], resume=out, progress=_Stops(3))
    (line,) = silotune.runs(tmp_path)
    assert line.state == "stopped, round 3 of 4 done"
    done = silotune.run(overrides=["rounds=5"], resume=out)
    assert_same(done, whole)
    steps = [(e["after_round"], e["after"]["rounds"]) for e in done.summary["extended"]]
    assert steps == [(0, 4), (2, 5)]  # a checkpoint every second round


@pytest.mark.parametrize(("step", "result_is_there"), [("take_off", True), ("extensions", False)])
def test_a_kill_while_a_run_is_extended_leaves_one_of_the_two_runs(
    recipe, tmp_path, monkeypatch, step, result_is_there
):
    short = silotune.run(recipe, ["rounds=1", "train.local_steps=1"], out=tmp_path / "run")
    result = short.summary["adapter_sha256"]

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(extend, step, die)
        with pytest.raises(KeyboardInterrupt):
            silotune.run(overrides=["rounds=2"], resume=short.path)
    assert (short.path / "summary.json").exists() == result_is_there
    again = silotune.run(resume=short.path)
    assert again.summary["adapter_sha256"] == result
    assert again.config.rounds == 1
    done = silotune.run(overrides=["rounds=2"], resume=short.path)
    assert done.summary["rounds"] == 2


def test_another_schedule_has_to_be_said_and_is_recorded(recipe, tmp_path):
    keys = ["train.schedule=linear", "train.lr_min=0.002", "train.local_steps=1", "rounds=2"]
    short = silotune.run(recipe, keys, out=tmp_path / "run")
    with pytest.raises(ConfigError) as refused:
        silotune.run(overrides=["rounds=4"], resume=short.path)
    assert 'chosen for 2 of them (train.schedule = "linear")' in str(refused.value)
    assert "train.schedule=linear (the rates of 4 rounds" in str(refused.value)
    assert silotune.run(resume=short.path).summary == short.summary  # nothing was touched
    done = silotune.run(overrides=["rounds=4", "train.schedule=linear"], resume=short.path)
    rates = {row["round"]: row["lr"] for row in done.metrics if row["event"] == "train"}
    assert rates == pytest.approx({1: 1e-2, 2: 6e-3, 3: 6e-3, 4: 4e-3})
    done = silotune.run(overrides=["rounds=5", "train.schedule=constant"], resume=short.path)
    rates = {row["round"]: row["lr"] for row in done.metrics if row["event"] == "train"}
    assert rates[5] == pytest.approx(1e-2)
    assert done.summary["extended"][1]["after"] == {
        "rounds": 5,
        "train.schedule": "constant",
        "train.lr_min": 0.0,
    }
    assert "train.schedule was linear and is constant" in (done.path / "README.md").read_text()


@pytest.mark.parametrize(
    ("keys", "asked", "says"),
    [
        ([], ["rounds=2"], "a run can only grow"),
        ([], ["rounds=3", "train.schedule=linear"], "a run can only grow"),
        ([], ["rounds=9", "seed=4"], "so seed cannot be changed"),
        ([], ["train.lr=1"], "so train.lr cannot be changed"),
        ([], ["rounds=nine"], "rounds"),
        (["runtime.name=flower"], ["rounds=9"], "real clients agreed to 3 rounds"),
    ],
)
def test_what_is_not_the_same_run_is_refused_and_nothing_is_written(
    recipe, tmp_path, keys, asked, says
):
    folder = RunFolder.create(tmp_path / "run", with_overrides(load_recipe(recipe), keys))
    before = sorted(p.name for p in folder.path.iterdir())
    with pytest.raises(ConfigError, match=says):
        silotune.run(overrides=asked, resume=folder.path)
    assert sorted(p.name for p in folder.path.iterdir()) == before


def test_a_guarantee_about_its_rounds_is_not_broken(recipe, tmp_path):
    run = with_overrides(
        load_recipe(recipe),
        [
            "privacy.unit=client",
            "privacy.clip_norm=1",
            "privacy.noise_multiplier=1",
            "privacy.delta=1e-5",
            "algorithm.weights=uniform",
            "train.schedule=cosine",  # a reason that the user could talk away comes last
        ],
    )
    folder = RunFolder.create(tmp_path / "run", run)
    with pytest.raises(ConfigError, match=r"its \[privacy\] guarantee is about 3 rounds"):
        silotune.run(overrides=["rounds=9"], resume=folder.path)


def test_a_run_that_a_budget_has_ended_would_end_there_again(recipe, tmp_path):
    one = silotune.run(recipe, ["rounds=1", "train.local_steps=1"], out=tmp_path / "one").summary
    limit = one["bytes_up"] + one["bytes_down"]
    keys = ["train.local_steps=1", f"budget.bytes={limit}"]
    short = silotune.run(recipe, keys, out=tmp_path / "run")
    assert short.summary["rounds"] == 1
    with pytest.raises(ConfigError, match="ended after round 1 of 3, by a budget"):
        silotune.run(overrides=["rounds=9"], resume=short.path)


def test_a_last_round_that_must_not_choose_is_refused(recipe, tmp_path):
    keys = ["train.local_steps=1", "checkpoint.keep=best", "evaluate.every=2"]
    short = silotune.run(recipe, keys, out=tmp_path / "run")
    with pytest.raises(ConfigError, match="kept only because it was the last"):
        silotune.run(overrides=["rounds=9"], resume=short.path)


@pytest.mark.parametrize("text", ["7", "[3]", '[{"date": "x"}]', "{"])
def test_a_damaged_list_of_extensions_is_one_error(recipe, tmp_path, text):
    folder = RunFolder.create(tmp_path / "run", load_recipe(recipe))
    (folder.path / EXTENDED).write_text(text)
    with pytest.raises(RunFolderError, match=EXTENDED):
        RunFolder.open(folder.path)
