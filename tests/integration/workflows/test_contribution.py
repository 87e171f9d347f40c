"""Contributions of planted clients: a duplicate, one with random answers, one with few rows."""

import random
import shutil
import signal

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import silotune
from silotune.cli import app
from silotune.core.atomic_files import written_rows
from silotune.core.checksums import list_files
from silotune.core.errors import ConfigError, RunFolderError, UpdateError
from silotune.core.tree import add, size_bytes
from silotune.core.types import ServerState
from silotune.federation.kept_updates import kept_updates
from silotune.federation.recipe_model import load_for
from silotune.federation.spool import Spool
from silotune.models.loading import read_adapter, write_adapter
from silotune.recipes.parse import parse
from silotune.runtime.flower.strategy import algorithm_of
from silotune.training.scoring import RowScore, score_each
from silotune.training.tasks import build_task
from silotune.workflows.contribution.replay import replay
from silotune.workflows.contribution.row_gradients import promised, shares
from tests.conftest import changed, small_table, write_jsonl, write_tiny_recipe
from tests.forked import run_forked
from tests.integration.kill_at import POINTS, run_and_die


def planted_rows() -> list[dict]:
    """Clients: north and its twin, south with rows of its own, noisy, and tiny."""
    draw = random.Random(1)

    def rows(source: str, num: int, *, letter: str = "n", noise: bool = False) -> list[dict]:
        def answer() -> str:
            return "".join(draw.choices("qxzQXZJ0123456789", k=10)) if noise else "It is so."

        asked = [f"What is {letter}{i}?" for i in range(num)]
        return [{"source": source, "question": q, "answer": answer()} for q in asked]

    return [
        *(*rows("north", 24), *rows("twin", 24), *rows("south", 24, letter="s")),
        *(*rows("noisy", 24, letter="x", noise=True), *rows("tiny", 2, letter="t")),
    ]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model) -> dict:
    data = write_jsonl(tmp_path_factory.mktemp("planted") / "rows.jsonl", planted_rows())
    keys = {
        "rounds": 2,
        "checkpoint__keep_updates": True,
        "data__eval_fraction": 0.5,
        "train__local_steps": 3,
        "train__batch_size": 12,
        "train__lr": 3e-2,
        "evaluate__every": 0,
    }
    return changed(small_table(tiny_model, data), keys)


@pytest.fixture(scope="module")
def done(recipe, tmp_path_factory):
    return silotune.run(parse(recipe), out=tmp_path_factory.mktemp("done") / "run")


@pytest.fixture(scope="module")
def found(done):
    return silotune.contribution(done)


def first_state(done, loaded) -> ServerState:
    adapter = read_adapter(loaded)
    algorithm = algorithm_of(done.config.algorithm)
    return ServerState(0, adapter, algorithm.init(adapter, 5))


def test_planted_clients_are_where_they_belong(found):
    clients = found.result["clients"]
    loo = {name: own["leave_one_out"] for name, own in clients.items()}
    assert {own["num_rounds"] for own in clients.values()} == {2}
    for name in ("north", "south", "twin"):
        assert loo[name]["verdict"] == "helped"
    assert loo["noisy"]["verdict"] == "hurt"
    # half of what a duplicate does is done by its twin, too
    assert max(loo["north"]["mean"], loo["twin"]["mean"]) < loo["south"]["mean"]
    assert abs(loo["tiny"]["mean"]) < loo["south"]["mean"] / 5
    gradient = {name: own["gradient"]["mean"] for name, own in clients.items()}
    assert gradient["tiny"] < gradient["south"] / 5
    # on the same rows, random answers promise less than real ones
    of = {name: own["others"] for name, own in clients.items()}
    assert of["noisy"]["south"]["gradient"] < of["north"]["south"]["gradient"]


def test_the_rows_add_up_to_the_numbers_and_the_cost_is_that_of_the_rows(found):
    result, rows = found.result, written_rows(found.path / "rows.jsonl")
    own = [row for row in rows if (row["client"], row["rows_of"]) == ("noisy", "north")]
    total = sum(row["num_targets"] for row in own)
    for key in ("leave_one_out", "gradient"):
        mean = sum(row[key] for row in own) / total
        assert result["clients"]["noisy"]["others"]["north"][key] == pytest.approx(mean)
    held_out = len({(row["rows_of"], row["row"]) for row in rows})
    assert result["cost"] == {
        "replays": 7,
        "rows_forward": held_out + len(rows),
        "rows_backward": 2 * held_out,
    }


def test_kept_updates_take_the_bytes_of_the_trained_tensors(done):
    files = sorted((done.path / "updates").rglob("*.safetensors"))
    assert len(files) == 2 * 5
    adapter = done.adapter()
    names = sum(len(name) + 50 for name in adapter)
    for path in files:
        assert 0 < path.stat().st_size - size_bytes(adapter) < names + 2048


def test_a_promise_is_the_slope_of_the_rows_loss(done):
    """Oracle: differences of losses along each client's share."""
    loaded, task = load_for(done.config), build_task("instruct")
    parts = shares(kept_updates(done.path, done.metrics, 2)[1], done.config.algorithm)
    held = silotune.check(done.config).rows["south"].evaluation[:2]
    examples = task.prepare(held, loaded.tokenizer, 128).examples
    start = read_adapter(loaded)
    told = promised(loaded, task, start, parts, {"south": examples})["south"]
    for i, part in enumerate(parts.values()):
        losses = []
        for step in (0.05, -0.05):
            write_adapter(loaded, add(start, {n: t.float() for n, t in part.items()}, scale=step))
            each = score_each(loaded, examples, task, batch_size=1)
            losses.append(np.array([score.loss_sum for score in each]))
        assert told[i] == pytest.approx((losses[1] - losses[0]) / 0.1, rel=0.05, abs=2e-4)


@pytest.mark.parametrize("algorithm", ["fedavg", "fedadam"])
def test_a_replay_with_everybody_gives_the_runs_adapter_bit_for_bit(
    recipe, done, tmp_path, algorithm
):
    if algorithm != "fedavg":
        keys = {"algorithm": {"name": algorithm}, "sampling__num_clients": 3}
        done = silotune.run(parse(changed({**recipe}, keys)), out=tmp_path / "run")
    loaded, cfg = load_for(done.config), done.config.algorithm
    rounds = kept_updates(done.path, done.metrics, 2)
    *_, state = replay(algorithm_of(cfg), first_state(done, loaded), rounds)
    saved = done.adapter()
    assert state.adapter.keys() == saved.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in state.adapter.items())
    if algorithm != "fedavg":
        result = silotune.contribution(done).result
        asked = {name for kept in rounds.values() for name in kept.clients}
        for name, own in result["clients"].items():
            assert own["num_rounds"] == sum(name in kept.clients for kept in rounds.values())
            assert (own["leave_one_out"]["mean"] == 0) == (name not in asked)
        assert any("optimizer" in note for note in result["notes"])


def test_the_command_prints_a_table_and_what_the_numbers_are_not(done):
    printed = CliRunner().invoke(app, ["contribution", str(done.path)])
    assert printed.exit_code == 0, printed.output
    for text in ("leave one out", "hurt", "a replay, not a retraining", "rows forward", "all rows"):
        assert text in printed.output


@pytest.fixture
def copy(done, tmp_path):
    shutil.copytree(done.path, tmp_path / "run")
    return tmp_path / "run"


def test_a_lost_update_is_an_error_and_leaves_no_folder(copy):
    (copy / "updates" / "round-00002" / "noisy.safetensors").unlink()
    shutil.rmtree(copy / "contributions", ignore_errors=True)
    with pytest.raises(RunFolderError, match="update of client 'noisy' in round 2"):
        silotune.contribution(copy)
    assert not (copy / "contributions").exists()


def test_an_update_of_another_run_does_not_give_the_runs_adapter(copy):
    spool = Spool(copy / "spool" / "round-00002")
    (update,) = [
        u for u in kept_updates(copy, silotune.Run(copy).metrics, 2)[2] if u.client == "tiny"
    ]
    update = type(update)(**{**vars(update), "delta": {n: t * 2 for n, t in update.delta.items()}})
    spool.add(update)
    shutil.copy(spool.folder / "tiny.safetensors", copy / "updates" / "round-00002")
    with pytest.raises(RunFolderError, match="does not give its adapter"):
        silotune.contribution(copy)


def test_a_loss_that_is_not_finite_is_an_error_and_no_number(done, monkeypatch):
    """JSON has no NaN, and a mean of NaN would look like noise."""
    monkeypatch.setattr(
        "silotune.workflows.contribution.contribution.score_each",
        lambda *_, **__: [RowScore(float("nan"), 1)],
    )
    monkeypatch.setattr("silotune.workflows.contribution.contribution.promised", lambda *_: {})
    with pytest.raises(UpdateError, match=r"held-out rows is not finite"):
        silotune.contribution(done)


def test_a_run_without_kept_updates_says_how_to_keep_them(copy):
    path = copy / "recipe.toml"
    path.write_text(path.read_text().replace("keep_updates = true", "keep_updates = false"))
    list_files(copy, ["recipe.toml"])
    with pytest.raises(ConfigError, match="keep_updates=true"):
        silotune.contribution(copy)


def test_a_changed_result_is_refused_when_it_is_read(found):
    path = found.path / "contribution.json"
    before = path.read_bytes()
    path.write_bytes(before.replace(b'"noisy"', b'"nosey"'))
    try:
        with pytest.raises(RunFolderError, match="has changed"):
            _ = found.result
    finally:
        path.write_bytes(before)


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_keeps_the_same_updates(tmp_path_factory, tmp_path, tiny_model, point):
    path = write_tiny_recipe(tmp_path, tiny_model)
    path.write_text(path.read_text() + "[checkpoint]\nkeep_updates = true\n")
    whole = silotune.run(path, out=tmp_path / "whole")
    killed = run_forked(run_and_die, point, str(path), str(tmp_path / "run"))
    assert killed == -signal.SIGKILL
    done = silotune.run(resume=tmp_path / "run")
    mine, other = (
        [
            (r, u.client, {n: t.tolist() for n, t in u.delta.items()})
            for r, kept in kept_updates(run.path, run.metrics, 3).items()
            for u in kept
        ]
        for run in (whole, done)
    )
    assert mine == other
    assert sorted(p.name for p in (done.path / "updates").iterdir()) == [
        f"round-{r:05d}" for r in (1, 2, 3)
    ]
