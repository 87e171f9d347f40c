"""[finish]: each client's own steps after the last round, in a run and in what follows it."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import silotune
from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.cli import app
from silotune.core.errors import ConfigError, UpdateError
from silotune.federation.client import Worker
from silotune.federation.own_steps import FILE, interpolated
from silotune.federation.prepared_rows import prepare_client
from silotune.federation.run_folder import RunFolder
from silotune.models.loading import write_adapter
from silotune.training.scoring import evaluate
from silotune.training.tasks import build_task
from silotune.workflows import finish
from silotune.workflows.evaluate.evaluate import Questions
from tests.conftest import write_jsonl, write_tiny_recipe
from tests.integration.test_classify import ROWS, table_of
from tests.tiny_encoders import build_tiny_encoder

KEYS = [
    "rounds=2",
    "finish.local_steps=3",
    "finish.lr=0.05",
    "finish.interpolate=[0.0, 0.5, 1.0]",
    "data.validation_fraction=0.3",
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model):
    return write_tiny_recipe(tmp_path_factory.mktemp("finish"), tiny_model)


@pytest.fixture(scope="module")
def plain(recipe, tmp_path_factory):
    keys = ["rounds=2", "data.validation_fraction=0.3"]
    return silotune.run(recipe, keys, out=tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def done(recipe, tmp_path_factory):
    keys = [*KEYS, "report.page=true"]
    return silotune.run(recipe, keys, out=tmp_path_factory.mktemp("done") / "run")


def own_of(run, client):
    return load_file(RunFolder.open(run.path).client_folder(client) / FILE)


def test_the_federation_is_the_same_and_each_client_has_an_adapter_of_its_own(plain, done):
    assert done.summary["adapter_sha256"] == plain.summary["adapter_sha256"]
    assert "finish" not in plain.summary
    sent = ("bytes_up", "bytes_down", "tokens_trained")
    assert {k: done.summary[k] for k in sent} == {k: plain.summary[k] for k in sent}
    result, own = done.adapter(), [own_of(done, f"hospital-{c}") for c in range(3)]
    for state in own:
        assert state.keys() == result.keys()
        assert any(not torch.equal(state[n], result[n]) for n in state)
    assert any(not torch.equal(own[0][n], own[1][n]) for n in own[0])
    assert [c["num_steps"] for c in done.summary["finish"].values()] == [3, 3, 3]


def test_own_steps_are_one_more_round_of_the_client_alone(recipe, tmp_path):
    """An oracle: for a federation of one, whose server takes the whole step."""
    alone = ['partition.only=["hospital-1"]', "adapter.dropout=0.2"]
    short = silotune.run(
        recipe, [*alone, "rounds=2", "finish.local_steps=2"], out=tmp_path / "short"
    )
    long = silotune.run(recipe, [*alone, "rounds=3"], out=tmp_path / "long")
    for name, tensor in long.adapter().items():
        assert torch.equal(own_of(short, "hospital-1")[name], tensor), name


def test_the_chosen_share_is_what_is_scored_kept_and_loaded(done):
    for client, own in done.summary["finish"].items():
        scores = own["scores"]
        assert list(scores) == ["federated", "own steps", "interpolated"]
        assert scores["interpolated"]["loss"] <= min(
            scores["federated"]["loss"], scores["own steps"]["loss"]
        )
        loaded = done.load(client=client)
        rows, task = silotune.check(done.config).rows[client], build_task("instruct")
        worker = Worker(loaded, task, done.config, fedavg(FedAvgConfig()))
        data = prepare_client(rows, worker)
        assert data.scored.num_rows == len(rows.validation)

        def loss(data=data, loaded=loaded, task=task, client=client):
            found = evaluate(
                loaded, data.scored.batches, task, client=client, num_examples=data.scored.num_rows
            )
            return found.loss_sum / found.num_tokens

        assert loss() == pytest.approx(scores["interpolated"]["loss"], abs=1e-6)
        result = {n: t for n, t in done.adapter().items() if n in loaded.parameters}
        for share, arm in ((0.0, "federated"), (1.0, "own steps")):
            write_adapter(loaded, interpolated(result, own_of(done, client), share))
            assert loss() == pytest.approx(scores[arm]["loss"], abs=1e-6)


def test_people_see_the_scores_and_can_use_a_clients_adapter(done, tmp_path):
    for text in (
        (done.path / "README.md").read_text(encoding="utf-8"),
        (done.path / "report.html").read_text(encoding="utf-8"),
    ):
        assert "After each client" in text
        assert "own steps" in text
    ask = ["ask", str(done.path), "What is a1?", "--max-new-tokens", "4"]
    assert CliRunner().invoke(app, [*ask, "--client", "hospital-0"]).exit_code == 0
    both = CliRunner().invoke(app, [*ask, "--client", "hospital-0", "--base"])
    assert both.exit_code == 2
    assert "Leave out one of the two" in both.output
    place = done.export(client="hospital-0")
    assert place.name == "peft-hospital-0"
    share = done.summary["finish"]["hospital-0"]["share"]
    result = done.adapter()
    wanted = interpolated(result, own_of(done, "hospital-0"), share)
    exported = load_file(place / "adapter_model.safetensors")
    assert all(torch.equal(exported[name], wanted[name]) for name in wanted)
    assert "not the result of the federation" in (place / "README.md").read_text(encoding="utf-8")
    merged = done.export("merged", client="hospital-1", to=tmp_path / "merged")
    assert (merged / "config.json").is_file()
    found = silotune.evaluate(done, Questions(client="hospital-1", max_new_tokens=2))
    assert list(found.scores["models"]) == ["base", "own"]
    assert list(found.scores["models"]["own"]["held-out"]["clients"]) == ["hospital-1"]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda d, p: d.load(client="hospital-9"), "no client 'hospital-9'.*Did you mean"),
        (lambda d, p: p.load(client="hospital-0"), "keeps nothing of its own"),
        (lambda d, p: d.export(client="hospital-0", push="me/it"), "not published"),
    ],
)
def test_what_a_client_cannot_give_is_one_error(done, plain, call, says):
    with pytest.raises(ConfigError, match=says):
        call(done, plain)


def test_a_client_whose_steps_diverge_keeps_the_result(recipe, tmp_path, monkeypatch):
    take = finish.take_own_steps

    def diverges(worker, data, *args, **more):
        if data.name == "hospital-1":
            raise UpdateError("the training loss is not a number.\n  Lower train.lr.")
        return take(worker, data, *args, **more)

    monkeypatch.setattr(finish, "take_own_steps", diverges)
    run = silotune.run(recipe, ["rounds=1", "finish.local_steps=1"], out=tmp_path / "run")
    assert run.summary["finish"]["hospital-1"] == {"failed": "the training loss is not a number."}
    assert "hospital-1 keeps the result as it is" in (run.path / "README.md").read_text("utf-8")
    with pytest.raises(ConfigError, match="keeps nothing of its own"):
        run.load(client="hospital-1")
    assert run.load(client="hospital-0")


def test_rows_stay_protected_and_scores_stay_in_the_folder(recipe, tmp_path):
    """Own steps have no noise: nothing of them is released, so nothing more is spent."""
    private = [
        *("rounds=1", "privacy.unit=record", "privacy.noise_multiplier=1.0", "privacy.delta=1e-3"),
        *("privacy.noise=seeded", "adapter.dropout=0.0"),
    ]
    own = ["finish.local_steps=2", "report.page=true"]
    runs = [
        silotune.run(recipe, [*private, *more], out=tmp_path / name)
        for name, more in (("without", []), ("with", own))
    ]
    without, done = runs
    assert done.summary["adapter_sha256"] == without.summary["adapter_sha256"]
    assert done.privacy["releases"] == without.privacy["releases"]
    told = [text for text in done.privacy["not_protected"] if "own steps" in text]
    assert len(told) == 1
    for name in ("README.md", "report.html"):
        assert "After each client" not in (done.path / name).read_text(encoding="utf-8")
    assert math.isfinite(done.summary["finish"]["hospital-0"]["scores"]["own steps"]["loss"])


def test_the_tasks_text_and_classify_too_and_with_heads_that_stay(recipe, tmp_path):
    keys = ["rounds=1", "finish.local_steps=1", "task=text", "data.text=answer"]
    texts = silotune.run(recipe, keys, out=tmp_path / "text")
    assert set(texts.summary["finish"]["hospital-0"]["scores"]) == {"federated", "own steps"}

    write_jsonl(tmp_path / "rows.jsonl", ROWS[:30])
    build_tiny_encoder(tmp_path / "student", num_layers=2, seed=0)
    table = table_of(tmp_path, rounds=1, adapter__head="local")
    heads = silotune.run(silotune.RunConfig(**table), out=tmp_path / "heads")
    table = table_of(tmp_path, rounds=1, adapter__head="local", finish__local_steps=2)
    both = silotune.run(silotune.RunConfig(**table), out=tmp_path / "both")
    scores = both.summary["finish"]["cinema-0"]["scores"]
    assert 0 <= scores["own steps"]["accuracy"] <= 1
    # the steps begin with the client's own head: what the last round has scored
    assert scores["federated"]["loss"] == pytest.approx(
        both.summary["clients"]["cinema-0"]["federated_loss"], abs=1e-6
    )
    for run in (heads, both):  # a head that stays is a reason to name a client, too
        assert run.ask("very good film 4", client="cinema-1")
        evaluated = silotune.evaluate(run, Questions(client="cinema-1", base=False))
        held = evaluated.scores["models"]["own"]["held-out"]["overall"]["loss"]
        last = (
            run.summary["finish"]["cinema-1"]["scores"]["own steps"]["loss"]
            if run is both
            else (run.summary["clients"]["cinema-1"]["federated_loss"])
        )
        assert held == pytest.approx(last, abs=1e-6)


def test_a_resume_after_a_kill_in_between_ends_alike(recipe, done, tmp_path, monkeypatch):
    take, count = finish.take_own_steps, []

    def killed(*args, **more):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return take(*args, **more)

    monkeypatch.setattr(finish, "take_own_steps", killed)
    with pytest.raises(KeyboardInterrupt):
        silotune.run(recipe, KEYS, out=tmp_path / "run")
    resumed = silotune.run(resume=tmp_path / "run")

    def numbers(run):
        return json.dumps(
            {n: {k: v for k, v in c.items() if k != "seconds"} for n, c in run.items()}
        )

    assert numbers(resumed.summary["finish"]) == numbers(done.summary["finish"])
    for name, tensor in own_of(done, "hospital-2").items():
        assert torch.equal(own_of(resumed, "hospital-2")[name], tensor)
