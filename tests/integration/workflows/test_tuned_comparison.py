"""The fair protocol: every arm chooses by validation rows, on equal trials and examples."""

import json

import pytest
import torch
from safetensors.torch import load_file

import silotune
from silotune.core.errors import ConfigError, DataError, RunFolderError, UpdateError
from silotune.federation.client import take_part
from silotune.federation.metrics import held_out_losses
from silotune.federation.progress import Progress
from silotune.models.loading import num_base_loads
from silotune.runtime import inprocess
from silotune.workflows.compare import local_training
from silotune.workflows.compare.arms import Arms
from silotune.workflows.compare.folder import ComparisonFolder
from tests.conftest import hospital_rows, write_jsonl, write_tiny_recipe

KEYS = [
    "rounds=2",
    "train.local_steps=1",
    "compare.seeds=1",
    "compare.tune={lr=[1e-2, 5e-2]}",
    "compare.group=kind",
]
ARMS = ("federated", "local", "centralized")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model):
    place = tmp_path_factory.mktemp("tuned")
    made = write_tiny_recipe(place, tiny_model)
    rows = [{**row, "kind": f"kind {i % 3}"} for i, row in enumerate(hospital_rows(2, 14))]
    write_jsonl(place / "hospitals.jsonl", rows)
    return made


class Parts(Progress):
    """The parts that began; stops the work when one of them begins, as a kill would."""

    def __init__(self, stop: str = "nothing") -> None:
        self.stop, self.begun, self.notes = stop, [], []

    def note(self, text: str) -> None:
        self.notes.append(text)
        if text.startswith("["):
            self.begun.append(text.split("] ", 1)[1])
            if self.begun[-1].startswith(self.stop):
                raise KeyboardInterrupt


@pytest.fixture(scope="module")
def done(recipe, tmp_path_factory):
    before, heard = num_base_loads(), Parts()
    found = silotune.compare(recipe, KEYS, out=tmp_path_factory.mktemp("out") / "c", progress=heard)
    assert num_base_loads() - before == 1, "trials and arms share one base"
    return found, heard


def part(done, place):
    return json.loads((done.path / place / "part.json").read_text(encoding="utf-8"))


def trials(done, arm):
    return [part(done, p.parent) for p in sorted((done.path / "tuning" / arm).glob("*/part.json"))]


def test_every_arm_gets_the_same_number_of_trials_on_the_same_examples(done):
    found, heard = done
    assert found.result["num_trials"] == dict.fromkeys(ARMS, 4)
    for place in ("federated", "local/hospital-0", "local/hospital-1", "centralized"):
        assert len(trials(found, place)) == 4
    costs = found.result["tuning_costs"]
    for key in ("examples", "steps"):
        assert costs["local"][key] == costs["federated"][key] == costs["centralized"][key] > 0
        arms = found.result["arms"]
        assert arms["local"][key] == arms["federated"][key] == arms["centralized"][key]
    numbers = [text.split("]")[0] for text in heard.notes if text.startswith("[")]
    assert numbers[0] == "[1/21"
    assert numbers[-1] == "[21/21"


def test_the_lowest_validation_loss_chooses_and_a_lone_client_chooses_for_itself(done):
    found, _ = done
    chosen = found.result["chosen"]
    places = {"federated": chosen["federated"], "centralized": chosen["centralized"]}
    places |= {f"local/{client}": values for client, values in chosen["local"].items()}
    for place, values in places.items():
        each = {
            p.parent.name: part(found, p.parent)["validation_loss"]
            for p in (found.path / "tuning" / place).glob("*/part.json")
        }
        words = ", ".join(
            f"{k} {v if isinstance(v, str) else format(v, '.4g')}" for k, v in values.items()
        )
        assert each[words] == min(each.values())


def test_trials_have_a_seed_that_is_not_compared_and_score_no_held_out_row(done):
    found, _ = done
    place = found.path / "tuning"
    assert list(place.rglob("scores.jsonl")) == []
    seeds = {silotune.Run(p).config.seed for p in place.glob("federated/*/run")}
    assert seeds == {10_003}
    assert found.result["seeds"] == [3]


def test_the_three_parts_share_no_row(done):
    found, _ = done
    run = ComparisonFolder.open(found.path).run
    assert run.data.validation_fraction == 0.2
    for own in silotune.check(run).rows.values():
        parts = [{json.dumps(row) for row in rows} for rows in (own.train, own.validation)]
        parts.append({json.dumps(row) for row in own.evaluation})
        assert all(parts)
        assert sum(map(len, parts)) == len(set().union(*parts))


def test_the_best_round_by_validation_is_what_counts(done):
    found, _ = done
    run = silotune.Run(found.path / "seed-3" / "federated" / "run")
    losses = {r: loss for r, loss in held_out_losses(run.metrics).items() if r > 0}
    best = min(losses, key=losses.__getitem__)
    assert run.summary["result_round"] == best
    assert found.result["rounds"]["federated"][""] == [best]
    assert part(found, "seed-3/federated")["validation_loss"] == losses[best]
    # and these losses are not those of the held-out rows
    rows = (found.path / "seed-3/federated/scores.jsonl").read_text().splitlines()
    held = [json.loads(row) for row in rows]
    loss = sum(row["loss_sum"] for row in held) / sum(row["num_tokens"] for row in held)
    assert loss != pytest.approx(losses[best], abs=1e-4)


def test_a_lone_client_keeps_its_best_round_also_after_an_interruption(
    recipe, tmp_path, monkeypatch
):
    """Round 1 of three: as if it had trained one round only, bit for bit."""
    keys = ["rounds=3", "compare.seeds=1", "data.validation_fraction=0.3"]
    keys += ["checkpoint.keep=best", "stop.patience=1"]

    def loss(self, names, adapter, said={"n": 0}):  # noqa: B006 - counts the calls
        said["n"] += 1
        if said["n"] == 2:
            raise KeyboardInterrupt
        return float(said["n"])  # 1, then 3 and 4: the first round of the first client is best

    monkeypatch.setattr(Arms, "validation_loss", loss)
    with pytest.raises(KeyboardInterrupt):
        silotune.compare(recipe, keys, out=tmp_path / "c")
    done = silotune.compare(resume=tmp_path / "c")
    assert done.result["rounds"]["local"]["hospital-0"] == [1]
    alone = silotune.run(
        recipe,
        ["rounds=1", 'partition.only=["hospital-0"]', "data.validation_fraction=0.3"],
        out=tmp_path / "run",
    )
    lone = load_file(done.path / "seed-3/local/hospital-0/adapter/adapter_model.safetensors")
    for name, tensor in alone.adapter().items():
        assert torch.equal(tensor, lone[name]), name
    assert done.result["tuned"] is False
    assert done.result["notes"][0].startswith("not tuned: every arm was trained as the recipe says")
    federated = silotune.Run(done.path / "seed-3" / "federated" / "run")
    assert federated.config.stop.patience is None, "an arm that stops early would train less"
    assert federated.summary["rounds"] == 3
    assert any("stop.patience is ignored" in note for note in done.result["notes"])


def test_held_out_rows_never_choose_the_federations_round(recipe, tmp_path):
    """Without validation rows, only the federation could pick its best round of several."""
    keys = ["compare.seeds=1", "compare.tune=false", "checkpoint.keep=best", "evaluate.every=1"]
    done = silotune.compare(recipe, keys, out=tmp_path / "c")
    federated = silotune.Run(done.path / "seed-3" / "federated" / "run")
    assert federated.config.checkpoint.keep == "last"
    assert federated.config.evaluate.every == 0, "nothing is scored before the end"
    assert any('checkpoint.keep = "best" is ignored' in note for note in done.result["notes"])


def test_an_interrupted_tuning_goes_on_and_trains_nothing_twice(recipe, done, tmp_path):
    whole, heard = done
    first, rest = Parts("tuning hospital-1 alone: lr 0.05, optimizer kept"), Parts()
    with pytest.raises(KeyboardInterrupt):
        silotune.compare(recipe, KEYS, out=tmp_path / "c", progress=first)
    resumed = silotune.compare(resume=tmp_path / "c", progress=rest)
    assert first.begun[:-1] + rest.begun == heard.begun
    same = ("chosen", "rounds", "clients", "overall", "notes")
    assert {k: resumed.result[k] for k in same} == {k: whole.result[k] for k in same}


def test_chosen_values_stand_beside_verdicts_and_rows_are_grouped(done):
    found, _ = done
    card = (found.path / "README.md").read_text(encoding="utf-8")
    for text in ("Tuned; “federated” with lr", "| local with |", "| tuning federated |"):
        assert text in card
    assert "Tuned; “federated” with lr" in found.report().read_text(encoding="utf-8")
    assert found.result["clients"]["hospital-0"]["num_groups"] <= 3
    assert "kind" not in (found.path / "base/scores.jsonl").read_text(encoding="utf-8")


def test_a_trial_that_diverges_is_not_chosen(recipe, tmp_path, monkeypatch):
    def diverges(worker, *args, **more):
        if worker.run.train.lr > 1:
            raise UpdateError("the training loss is not a number.")
        return take_part(worker, *args, **more)

    monkeypatch.setattr(local_training, "take_part", diverges)
    monkeypatch.setattr(inprocess, "take_part", diverges)
    keys = [*KEYS, "rounds=1", "compare.tune={lr=[9.0, 1e-2]}", "compare.centralized=false"]
    done = silotune.compare(recipe, keys, out=tmp_path / "c")
    assert list(done.result["arms"]) == ["base", "local", "federated"]
    assert done.result["chosen"]["federated"]["lr"] == 1e-2
    assert {v["lr"] for v in done.result["chosen"]["local"].values()} == {1e-2}
    keys[-2] = "compare.tune={lr=[9.0]}"
    with pytest.raises(UpdateError, match=r"tuning federated: training diverged[\s\S]*tune\.lr"):
        silotune.compare(recipe, keys, out=tmp_path / "d")


@pytest.mark.parametrize(
    ("keys", "error", "says"),
    [
        (["compare.tune={lr=[]}"], ConfigError, "lr should be different numbers above 0"),
        (["compare.tune={lr=[1, 1]}"], ConfigError, "lr should be different numbers above 0"),
        (["compare.tune={rank=[1]}"], ConfigError, "lists of numbers for lr and server_lr"),
        (["compare.tune={server_lr=[1]}"], ConfigError, "two numbers"),
        (["compare.tune=maybe"], ConfigError, "should be true, false, or lists"),
        (["compare.group=kin"], DataError, r"compare\.group = 'kin'[\s\S]*Did you mean 'kind'"),
    ],
)
def test_a_mistake_in_the_protocol_is_said_before_a_model_is_loaded(
    recipe, tmp_path, keys, error, says
):
    before = num_base_loads()
    with pytest.raises(error, match=says):
        silotune.compare(recipe, keys, out=tmp_path / "c")
    assert num_base_loads() == before
    assert not (tmp_path / "c").exists()


def test_a_comparison_of_an_older_version_is_not_continued_on_other_rows(done, recipe, tmp_path):
    run = silotune.load_recipe(recipe, ["compare.tune=true"])
    folder = ComparisonFolder.create(tmp_path / "old", run)
    with pytest.raises(RunFolderError, match="begun by an older version"):
        silotune.compare(resume=folder.path)
