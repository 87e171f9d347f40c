"""A whole comparison on the tiny model: equal budgets, paired arms, nothing trained twice."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import silotune
from silotune.cli import app
from silotune.core.errors import ConfigError, RunFolderError
from silotune.federation.progress import Progress
from silotune.federation.recipe_model import load_for
from silotune.models.loading import num_base_loads, read_adapter, renew_adapter
from silotune.workflows import shared_base
from silotune.workflows.compare import local_training
from tests.conftest import hospital_rows, write_jsonl, write_tiny_recipe

ARMS = ["base", "local", "only hospital-0", "federated", "federated: fedprox", "centralized"]
KEYS = [
    "compare.seeds=2",
    'compare.algorithms=["fedprox"]',
    'compare.only=["hospital-0"]',
    "compare.max_new_tokens=6",
    "report.samples=2",
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model):
    return write_tiny_recipe(tmp_path_factory.mktemp("compare"), tiny_model)


@pytest.fixture(scope="module")
def done(recipe, tmp_path_factory):
    before = num_base_loads()
    found = silotune.compare(recipe, KEYS, out=tmp_path_factory.mktemp("out") / "c")
    assert num_base_loads() - before == 1, "all arms and seeds share one base"
    return found


def test_all_arms_are_there_and_every_client_has_its_numbers(done):
    result = done.result
    assert list(result["arms"]) == ARMS
    assert list(result["clients"]) == ["hospital-0", "hospital-1", "hospital-2"]
    assert result["seeds"] == [3, 4]
    for client in (*result["clients"].values(), result["overall"]):
        for metric in ("loss", "rougeL", "rouge1", "rouge2", "exact"):
            assert list(client["scores"][metric]) == ARMS
            assert list(client["differences"][metric]) == [a for a in ARMS if a != "local"]


def test_the_arms_train_on_equal_budgets(done):
    costs = done.result["arms"]
    assert costs["base"]["tokens"] == 0
    for key in ("tokens", "examples", "steps"):
        assert costs["local"][key] == costs["federated"][key] > 0
        assert costs["local"][key] == costs["federated: fedprox"][key]
    assert costs["centralized"]["examples"] == costs["federated"]["examples"]
    assert costs["centralized"]["steps"] == costs["federated"]["steps"]
    # other rows of the same pool: as many, not the same ones
    assert costs["centralized"]["tokens"] == pytest.approx(costs["federated"]["tokens"], rel=0.15)
    assert costs["only hospital-0"]["tokens"] < costs["local"]["tokens"]


def test_an_arm_may_write_what_travels_with_fewer_bytes(recipe, tmp_path):
    arms = "compare.arms={small={wire={up='int8', down='int8'}}}"
    keys = [arms, "compare.seeds=1", "report.samples=0", "compare.centralized=false"]
    done = silotune.compare(recipe, keys, out=tmp_path / "c")
    whole, small = (done.result["arms"][arm] for arm in ("federated", "federated: small"))
    for way in ("bytes_up", "bytes_down"):
        # tiny tensors: the scales of a row weigh more than in a real adapter
        assert 2 < whole[way] / small[way] < 4.1
    assert (whole["steps"], whole["tokens"]) == (small["steps"], small["tokens"])
    losses = done.result["overall"]["scores"]["loss"]
    assert losses["federated"]["mean"] != losses["federated: small"]["mean"]


def test_with_whole_epochs_the_centralized_arm_has_exactly_the_same_tokens(recipe, tmp_path):
    keys = ["train.local_steps=none", "train.local_epochs=1", "compare.seeds=1", "rounds=2"]
    costs = silotune.compare(recipe, [*keys, "report.samples=0"], out=tmp_path / "c").result["arms"]
    assert (
        costs["centralized"]["tokens"] == costs["federated"]["tokens"] == costs["local"]["tokens"]
    )


def test_a_client_that_is_asked_in_some_rounds_only_trains_in_these_rounds_alone(recipe, tmp_path):
    keys = ["sampling.fraction=0.34", "rounds=4", "compare.seeds=1", "report.samples=0"]
    done = silotune.compare(recipe, keys, out=tmp_path / "c")
    costs = done.result["arms"]
    assert costs["local"] | {"seconds": 0} == costs["federated"] | {
        "seconds": 0, "bytes_up": 0, "bytes_down": 0,
    }  # fmt: skip
    each = [
        json.loads((p / "part.json").read_text())["steps"]
        for p in sorted((done.path / "seed-3" / "local").iterdir())
    ]
    assert len(set(each)) > 1, "the clients must differ for this test to say anything"


def test_the_arm_of_a_lone_client_is_a_federation_of_one(recipe, tmp_path):
    """The same bits as `silotune run` gives on that client's rows alone."""
    done = silotune.compare(recipe, ["compare.seeds=1", "report.samples=0"], out=tmp_path / "c")
    keys = ['partition.only=["hospital-1"]', "evaluate.every=0", "report.page=false"]
    local_training = silotune.run(recipe, keys, out=tmp_path / "alone")
    lone = load_file(done.path / "seed-3/local/hospital-1/adapter/adapter_model.safetensors")
    assert lone.keys() == local_training.adapter().keys()
    for name, tensor in local_training.adapter().items():
        assert torch.equal(tensor, lone[name]), name


def test_the_federated_arm_is_the_recipes_own_run(recipe, done, tmp_path):
    plain = silotune.run(recipe, ["report.page=false"], out=tmp_path / "run")
    arm = silotune.Run(done.path / "seed-3" / "federated" / "run")
    assert arm.summary["adapter_sha256"] == plain.summary["adapter_sha256"]
    # and so is its score: the sums over rows are those of the run's own last evaluation
    rows = [
        json.loads(line)
        for line in (done.path / "seed-3/federated/scores.jsonl").read_text().splitlines()
    ]
    for client, entry in plain.summary["clients"].items():
        own = [row for row in rows if row["client"] == client]
        loss = sum(row["loss_sum"] for row in own) / sum(row["num_tokens"] for row in own)
        assert loss == pytest.approx(entry["federated_loss"], abs=1e-6)


def test_every_seed_scores_the_same_rows_and_starts_from_another_adapter(done):
    def rows(part):
        lines = (done.path / part / "scores.jsonl").read_text().splitlines()
        return [(r["client"], r["num_tokens"]) for r in map(json.loads, lines)]

    assert rows("seed-3/federated") == rows("seed-4/federated") == rows("base")
    first, second = (
        silotune.Run(done.path / f"seed-{s}/federated/run").summary["adapter_sha256"]
        for s in (3, 4)
    )
    assert first != second


def test_a_seeds_adapter_is_drawn_as_a_fresh_load_would_draw_it(recipe):
    run = silotune.load_recipe(recipe)
    other = silotune.load_recipe(recipe, ["seed=9"])
    renewed = renew_adapter(load_for(run), run.adapter, seed=9)
    fresh = load_for(other)
    again = renew_adapter(renewed, run.adapter, seed=3)
    for wanted, got in ((fresh, renewed), (load_for(run), again)):
        a, b = read_adapter(wanted), read_adapter(got)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_samples_show_what_each_arm_answers(done):
    samples = done.result["samples"]
    assert [s["client"] for s in samples] == ["hospital-0", "hospital-1"]
    assert set(samples[0]["answers"]) == set(ARMS)
    assert samples[0]["reference"].startswith("It is ")
    assert set(samples[0]["cut"]) <= set(ARMS)


class Stop(Exception):
    pass


class StopsAt(Progress):
    """Stops the process's work when the part of this number begins, as a kill would."""

    def __init__(self, part: int) -> None:
        self.part, self.parts = part, []

    def note(self, text: str) -> None:
        if text.startswith("["):
            self.parts.append(text)
            if text.startswith(f"[{self.part}/"):
                raise Stop


def numbers(result):
    """What two equal comparisons share: all but seconds, and the folder's name."""
    return {key: value for key, value in result.items() if key not in {"arms", "name"}}


def test_an_interrupted_comparison_goes_on_and_trains_nothing_twice(recipe, done, tmp_path):
    place = tmp_path / "c"
    with pytest.raises(Stop):
        silotune.compare(recipe, KEYS, out=place, progress=StopsAt(5))
    rest = StopsAt(-1)
    resumed = silotune.compare(resume=place, progress=rest)
    assert [p.split("/")[0] for p in rest.parts] == [f"[{i}" for i in range(5, 14)]
    assert numbers(resumed.result) == numbers(done.result)
    again = StopsAt(-1)
    silotune.compare(resume=place, progress=again)
    assert again.parts == []


def test_a_comparison_does_not_depend_on_the_threads_that_the_process_had(recipe, done, tmp_path):
    """Sums of floats differ by their order: the base was scored with any number of threads."""
    place = tmp_path / "c"
    torch.set_num_threads(2)
    try:
        with pytest.raises(Stop):
            silotune.compare(recipe, KEYS, out=place, progress=StopsAt(4))
        torch.set_num_threads(2)  # as in a new process, where nothing but lone clients is left
        resumed = silotune.compare(resume=place)
    finally:
        torch.set_num_threads(1)
    assert numbers(resumed.result) == numbers(done.result)


def test_a_lone_client_that_was_stopped_between_rounds_goes_on_there(recipe, tmp_path, monkeypatch):
    keys = ["compare.seeds=1", "report.samples=0"]
    whole = silotune.compare(recipe, keys, out=tmp_path / "whole")
    took, take_part = [], local_training.take_part

    def stop_in_round_2(worker, data, message, place, *, count):
        if message.round == 2 and not took.count(2):
            took.append(2)
            raise Stop
        took.append(message.round)
        return take_part(worker, data, message, place, count=count)

    monkeypatch.setattr(local_training, "take_part", stop_in_round_2)
    with pytest.raises(Stop):
        silotune.compare(recipe, keys, out=tmp_path / "c")
    resumed = silotune.compare(resume=tmp_path / "c")
    assert took[:5] == [1, 2, 2, 3, 1], "round 1 of the first lone client is not trained again"
    assert numbers(resumed.result) == numbers(whole.result)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (['compare.only=["hospital-9"]'], "there is no client 'hospital-9'"),
        (["runtime.name=flower"], "cannot be compared"),
        (["compare.seeds=0"], "compare.seeds"),
        (['compare.algorithms=["fedprx"]'], "Did you mean 'fedprox'"),
        (["compare.algorithms=[{name='fedavg'}]"], "is the same as 'federated'"),
        (["compare.algorithms=['fedprox', 'fedprox']"], "twice"),
    ],
)
def test_a_mistake_is_said_before_a_model_is_loaded(recipe, tmp_path, monkeypatch, keys, says):
    monkeypatch.setattr(shared_base, "load_for", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=says):
        silotune.compare(recipe, keys, out=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_comparison_is_no_run_and_a_run_no_comparison(done, recipe, tmp_path):
    with pytest.raises(RunFolderError, match="is not a run folder"):
        silotune.run(resume=done.path)
    with pytest.raises(RunFolderError, match="is not a comparison folder"):
        silotune.compare(resume=done.path / "seed-3/federated/run")


def test_a_comparison_is_listed_with_the_run_that_can_be_asked(done):
    listed = {own.name: own for own in silotune.runs(done.path.parent)}[done.path.name]
    scores = done.result["overall"]["scores"]["loss"]
    federated = [arm["mean"] for name, arm in scores.items() if name.startswith("federated")]
    assert (listed.kind, listed.loss) == ("comparison", min(federated))
    assert silotune.Run(done.path / listed.best).adapter()
    with pytest.raises(RunFolderError, match=f"Its best run .*: {done.path / listed.best}"):
        silotune.Run(done.path).ask("What is it?")


def test_a_comparison_is_a_data_frame(done):
    found = done.table().set_index(["client", "metric", "arm"])
    for name, own in done.result["clients"].items():
        for metric in ("loss", "rougeL"):
            one = found.loc[(name, metric, "federated")]
            assert one["mean"] == own["scores"][metric]["federated"]["mean"]
            assert one["difference"] == own["differences"][metric]["federated"]["mean"]
            assert one["verdict"] == own["verdicts"][metric]["federated"]
    assert len(found) == len(ARMS) * 4 * len(done.result["metrics"])
    done.report(charts="svg", tables="latex")
    names = {file.name for file in (done.path / "tables").iterdir()}
    assert names >= {"loss-scores.tex", "loss-differences.tex", "costs.tex"}
    assert len(list((done.path / "charts").glob("*.svg"))) >= 2


def test_full_training_is_compared_too(recipe, tmp_path):
    keys = ["model.dtype=float32", "rounds=1", "report.samples=0"]
    full = [*keys, "adapter.kind=full", "compare.seeds=2"]
    result = silotune.compare(recipe, full, out=tmp_path / "c").result
    base = result["overall"]["scores"]["loss"]["base"]["mean"]
    lora = silotune.compare(recipe, [*keys, "compare.seeds=1"], out=tmp_path / "lora")
    again = lora.result["overall"]["scores"]["loss"]["base"]["mean"]
    assert base == pytest.approx(again, abs=1e-6)
    assert result["overall"]["scores"]["loss"]["federated"]["mean"] < base


def test_the_command_prints_the_table_the_verdict_and_the_cost(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_jsonl(tmp_path / "rows.jsonl", hospital_rows(2, 6))
    recipe = write_tiny_recipe(tmp_path, tiny_model)
    words = ["compare", str(recipe), f"data.path={data}", "rounds=1", "--seeds", "1", "--out", "c"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    for text in ("held-out loss", "mean over clients", "tokens", "one seed: no verdict"):
        assert text in found.output
    assert CliRunner().invoke(app, ["compare"]).exit_code == 2
    shutil.rmtree(Path("c") / "base")
