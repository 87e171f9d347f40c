"""Whole sweeps on the tiny model: one base, one table, nothing trained twice."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

import silotune
from silotune.cli import app
from silotune.core.errors import ConfigError, RunFolderError
from silotune.federation.progress import Progress
from silotune.models.loading import num_base_loads
from silotune.workflows import shared_base
from silotune.workflows.sweep import sweep as sweep_workflow
from silotune.workflows.sweep import trials
from silotune.workflows.sweep.ranking import sweep_table
from silotune.workflows.sweep.trials import num_jobs, read_sweep, trials_of
from silotune.workflows.sweep.worker import WorkerProcess
from tests.conftest import build_tiny_model, write_tiny_recipe

KEYS = ["adapter.rank=2,4", "train.lr=1e-3,1e-2", "report.samples=0"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model):
    return write_tiny_recipe(tmp_path_factory.mktemp("sweep"), tiny_model)


@pytest.fixture(scope="module")
def done(recipe, tmp_path_factory):
    before, tokenised = num_base_loads(), []
    prepare = shared_base.prepare_clients
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_base, "prepare_clients", lambda *a: tokenised.append(a) or prepare(*a))
        found = silotune.sweep(recipe, KEYS, jobs=1, out=tmp_path_factory.mktemp("out") / "s")
    assert num_base_loads() - before == 1, "all runs share one base"
    assert len(tokenised) == 1, "and the rows as tokens"
    return found


def adapters(found):
    return {run["number"]: run_of(found, run).summary["adapter_sha256"] for run in runs(found)}


def runs(found):
    return found.result["runs"]


def run_of(found, run):
    return silotune.Run(found.path / run["path"])


def test_all_combinations_are_there_and_the_lowest_loss_comes_first(done):
    keys = [tuple(run["keys"].items()) for run in sorted(runs(done), key=lambda r: r["number"])]
    assert keys == [
        (("adapter.rank", rank), ("train.lr", lr)) for rank in "24" for lr in ("1e-3", "1e-2")
    ]
    losses = [run["loss"] for run in runs(done)]
    assert losses == sorted(losses)
    assert len(set(losses)) == 4
    assert done.best.summary["overall"]["federated_loss"] == losses[0]
    assert "confirm it with another seed" in " ".join(done.result["notes"])


@pytest.mark.parametrize("number", [1, 4])
def test_a_run_of_a_sweep_is_the_run_alone_bit_for_bit(done, recipe, tmp_path, number):
    of_sweep = next(run for run in runs(done) if run["number"] == number)
    keys = [f"{key}={value}" for key, value in of_sweep["keys"].items()]
    threads = f"runtime.threads={run_of(done, of_sweep).config.runtime.threads}"
    alone = silotune.run(recipe, [*keys, "report.samples=0", threads], out=tmp_path / "r")
    assert alone.summary["adapter_sha256"] == adapters(done)[number]
    assert alone.summary["overall"] == run_of(done, of_sweep).summary["overall"]
    assert alone.config == run_of(done, of_sweep).config


def test_a_finished_sweep_is_not_trained_again(done):
    before = (done.path / "sweep.json").read_bytes()
    loads = num_base_loads()
    assert silotune.sweep(resume=done.path).path == done.path
    assert num_base_loads() == loads
    assert (done.path / "sweep.json").read_bytes() == before


class StopAt(Progress):
    """Ends a sweep at the end of a round, as a signal would."""

    def __init__(self, round_: int) -> None:
        self.left = round_

    def end_round(self, round_, rows):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_an_interrupted_sweep_goes_on_to_the_same_result(done, recipe, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        silotune.sweep(recipe, KEYS, jobs=1, out=tmp_path / "s", progress=StopAt(4))
    with pytest.raises(RunFolderError, match="silotune sweep --resume"):
        _ = sweep_workflow.Sweep(tmp_path / "s").result
    again = silotune.sweep(resume=tmp_path / "s", jobs=1)
    assert adapters(again) == adapters(done)
    assert [run["loss"] for run in runs(again)] == [run["loss"] for run in runs(done)]


@pytest.mark.slow  # the next test has two processes too
def test_runs_at_the_same_time_give_the_same_adapters(done, recipe, tmp_path):
    keys = [*KEYS, f"runtime.threads={run_of(done, runs(done)[0]).config.runtime.threads}"]
    found = silotune.sweep(recipe, keys, jobs=2, out=tmp_path / "s")
    assert adapters(found) == adapters(done)
    assert len(list((tmp_path / "s").glob("worker-*.log"))) == 2


def test_a_run_whose_process_is_killed_fails_alone_and_is_tried_again(
    recipe, tmp_path, monkeypatch
):
    begun = WorkerProcess.train
    killed = []

    def train(self, place):
        if place.name == "002" and not killed:
            killed.append(place)
            process = self._started()
            threading.Timer(0.2, lambda: os.kill(process.pid, signal.SIGKILL)).start()
        return begun(self, place)

    monkeypatch.setattr(WorkerProcess, "train", train)
    keys = ["train.lr=1e-3,1e-2", "report.samples=0"]
    found = silotune.sweep(recipe, keys, jobs=2, out=tmp_path / "s")
    lost = runs(found)[-1]
    assert lost["number"] == 2
    assert "its process exited with code -9" in lost["failed"]
    assert runs(found)[0]["failed"] is None
    assert lost["failed"] in found.report().read_text()
    again = silotune.sweep(resume=found.path, jobs=1)
    assert [run["failed"] for run in runs(again)] == [None, None]


def test_workers_end_with_the_process_that_asked(recipe, tmp_path):
    folder = silotune.sweep(recipe, ["train.lr=1e-3,1e-2"], jobs=1, out=tmp_path / "s").path
    worker = WorkerProcess(tmp_path / "log")
    assert worker.train(folder / "runs" / "001") is None
    process = worker._process
    assert process is not None
    with process:  # closes its pipes
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=20) == 1


def test_a_run_that_fails_is_told_with_its_reason_and_the_others_are_ranked(recipe, tmp_path):
    answer = CliRunner().invoke(
        app,
        ["sweep", str(recipe), "train.lr=1e30,1e-3", "--jobs=1", f"--out={tmp_path / 's'}"],
    )
    assert answer.exit_code == 1
    assert "run 001 failed: " in answer.stdout
    found = sweep_workflow.Sweep(tmp_path / "s")
    assert [run["number"] for run in runs(found)] == [2, 1]
    assert sweep_table(found.result)[-1][:3] == ("001", "1e30", "-")
    assert "1 run failed" in found.result["notes"][0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["train.lrr=1,2"], "Did you mean train.lr?"),
        (["train.lr=1e-3,fast"], "run 2: train.lr=fast"),
        (["train.lr=1e-3"], "there is nothing to sweep"),
        (["train.lr=1e-3,1e-3"], "twice"),
        (["train.lr=0.001,1e-3"], "runs 1 and 2 are the same"),
        (["train.lr=1e-5..1e-3"], "a range needs a search"),
        (["train.lr=1e-3,1e-2", "runtime.name=flower"], "cannot be swept"),
        (["train.lr=1e-3,1e-2", "evaluate.every=0"], "ranks its runs"),
        (["model.name=nowhere/at-all/x,y"], "run 1"),
        (["data.path=a.jsonl,b.jsonl"], "run 1, data.path=a.jsonl"),
    ],
)
def test_a_mistake_in_any_run_is_said_before_the_first_begins(recipe, tmp_path, keys, message):
    answer = CliRunner().invoke(app, ["sweep", str(recipe), *keys, f"--out={tmp_path / 's'}"])
    assert answer.exit_code == 2, answer.output
    assert message in answer.stderr
    assert not list(tmp_path.iterdir())


def test_listed_runs_are_trained_as_they_stand(recipe, tmp_path):
    listed, out = tmp_path / "runs.txt", tmp_path / "s"
    listed.write_text("# two of them\nrounds=1 adapter.rank=2\n\nrounds=2  train.lr=1e-2\n")
    answer = CliRunner().invoke(
        app,
        ["sweep", str(recipe), f"--list={listed}", "--jobs=1", "--json", f"--out={out}"],
    )
    assert answer.exit_code == 0, answer.output
    result = json.loads(answer.stdout)
    by_number = sorted(result["runs"], key=lambda run: run["number"])
    assert [run["keys"] for run in by_number] == [
        {"rounds": "1", "adapter.rank": "2"},
        {"rounds": "2", "train.lr": "1e-2"},
    ]
    assert [run["rounds"] for run in by_number] == [1, 2]


def test_a_recipe_may_bring_its_own_sweep_and_asked_values_win(recipe):
    own = '\n[sweep]\nkeys = ["train.lr=1e-3,1e-2", "adapter.rank=2,4"]\nsearch = 3\n'
    path = recipe.with_name("own.toml")
    path.write_text(recipe.read_text() + own)
    base = read_sweep(path, ["train.lr=1e-4", "rounds=1,2"], (), 0)
    assert base.sweep.keys == ("adapter.rank=2,4", "rounds=1,2")
    assert base.sweep.search == 3
    assert base.train.lr == 1e-4
    path.write_text(recipe.read_text() + '\n[sweep]\nruns = ["rounds=1", "rounds=2"]\n')
    assert [trial.run.rounds for trial in trials_of(read_sweep(path, [], (), 0))] == [
        1,
        2,
    ]
    assert not read_sweep(path, ["rounds=1,2"], (), 0).sweep.runs


def test_a_search_tries_new_values_within_their_ranges_and_goes_on_where_it_was(recipe, tmp_path):
    keys = ["train.lr=1e-4..1e-1,log", "adapter.rank=2..4", "report.samples=0", "rounds=1"]
    with pytest.raises(KeyboardInterrupt):
        silotune.sweep(recipe, keys, search=5, jobs=1, out=tmp_path / "s", progress=StopAt(3))
    written = tmp_path / "s" / "runs.jsonl"
    begun = [json.loads(line) for line in written.read_text().splitlines()]
    assert len(begun) == 3
    found = silotune.sweep(resume=tmp_path / "s", jobs=1)
    tried = [run["keys"] for run in sorted(runs(found), key=lambda run: run["number"])]
    assert len({tuple(keys.items()) for keys in tried}) == 5
    assert [list(map("=".join, keys.items())) for keys in tried[:3]] == [r["keys"] for r in begun]
    assert all(1e-4 <= float(keys["train.lr"]) <= 1e-1 for keys in tried)
    assert {keys["adapter.rank"] for keys in tried} <= {"2", "3", "4"}


def test_a_search_ends_when_nothing_is_left_to_try(recipe, tmp_path):
    keys = ["train.optimizer=sgd,adamw", "report.samples=0", "rounds=1"]
    found = silotune.sweep(recipe, keys, search=6, jobs=1, out=tmp_path / "s")
    assert sorted(run["keys"]["train.optimizer"] for run in runs(found)) == ["adamw", "sgd"]


def test_all_seeds_are_scored_on_the_same_rows(recipe, tmp_path):
    found = silotune.sweep(recipe, ["seed=3,4", "report.samples=0"], jobs=1, out=tmp_path / "s")
    hashes = {run_of(found, run).config.seed: provenance(found, run) for run in runs(found)}
    assert hashes[3] == hashes[4]
    assert len({run["loss"] for run in runs(found)}) == 2


def provenance(found, run):
    text = (found.path / run["path"] / "provenance.json").read_text()
    return json.loads(text)["data"]["sha256"]


def test_runs_that_are_scored_on_other_tokens_are_not_called_comparable(recipe, tmp_path):
    keys = ["train.max_length=48,512", "report.samples=0", "rounds=1"]
    found = silotune.sweep(recipe, keys, jobs=1, out=tmp_path / "s")
    assert "their losses are not comparable" in " ".join(found.result["notes"])


def test_the_page_shows_every_run_and_asks_no_network(done):
    page = done.report().read_text()
    assert page.count("<svg") == 1
    for run in runs(done):
        assert f"{run['number']:03d}" in page
        assert f"{run['loss']:.3f}" in page
    assert "silotune run RECIPE adapter.rank=" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    for named in (done.best.config.model.name, done.best.config.data.path, str(done.path)):
        assert named not in page, "a page is handed on; it showed the folder of the model"
        assert Path(named).name in page or named == str(done.path)


def test_the_published_sweep_of_eight_runs_is_one_command(tmp_path):
    """Two models, 8 and 4 bits, two fractions: the sweep of Flower's example."""
    small = build_tiny_model(tmp_path / "3b", width=64)
    large = build_tiny_model(tmp_path / "7b", width=128)
    recipe = write_tiny_recipe(tmp_path, small)
    before = num_base_loads()
    keys = [f"model.name={large},{small}", "model.quantization=8,4", "sampling.fraction=0.1,0.5"]
    more = ["rounds=1", "report.samples=0", "--jobs=1", f"--out={tmp_path / 's'}"]
    answer = CliRunner().invoke(app, ["sweep", str(recipe), *keys, *more])
    assert answer.exit_code == 0, answer.output
    assert len(runs(sweep_workflow.Sweep(tmp_path / "s"))) == 8
    assert num_base_loads() - before == 4, "one for each model and each number of bits"


def test_a_resumed_sweep_takes_nothing_new(done):
    with pytest.raises(ConfigError, match="keeps its recipe and its keys"):
        silotune.sweep(resume=done.path, overrides=["train.lr=1,2"])


def test_a_sweep_is_listed_and_reported_and_its_best_run_is_named(done, capsys):
    """`report` refused a sweep, and `ask` and `export` did not say what is inside."""
    (listed,) = silotune.runs(done.path.parent)
    assert (listed.kind, listed.state, listed.loss) == ("sweep", "done", runs(done)[0]["loss"])
    assert done.path / listed.best == done.best.path
    command = CliRunner().invoke
    assert command(app, ["report", str(done.path)]).output == f"{done.path / 'report.html'}\n"
    said = command(app, ["report", str(done.path), "--charts", "pdf", "--csv"]).output.split()
    assert [word.rpartition("/")[2] for word in said] == [
        *("report.html", "01-held-out-loss-nats-per-token-per-round-and-run.pdf"),
        *("runs.csv", "settings.csv"),
    ]
    assert command(app, ["report", str(done.path), "--csv", "--latex"]).exit_code == 2
    for words in (["ask", str(done.path), "x"], ["export", str(done.path)]):
        found = command(app, words)
        assert found.exit_code == 2
        assert f"silotune {words[0]} {done.best.path}" in found.stderr


def test_a_sweep_is_a_data_frame_with_keys_as_numbers(done):
    found = done.table()
    assert list(found["loss"]) == [run["loss"] for run in runs(done)]
    assert set(found["train.lr"]) == {1e-3, 1e-2}
    assert set(found["adapter.rank"]) == {2, 4}
    assert found.groupby("adapter.rank")["loss"].min().min() == runs(done)[0]["loss"]
    assert list(done.table(seeds_together=True)["loss"]) == list(found["loss"])


def test_a_sweep_is_no_run(done):
    with pytest.raises(RunFolderError, match="is not a run folder"):
        silotune.run(resume=done.path)


def test_runs_on_one_base_follow_each_other_whatever_their_order(recipe):
    found = trials_of(
        read_sweep(recipe, ["train.lr=1e-3,1e-2", "model.dtype=float32,bfloat16"], (), 0)
    )
    queue, last, order = sweep_workflow.Listed(found), None, []
    while (last := queue.take(last)) is not None:
        order.append(last.number)
    assert order == [1, 3, 2, 4]


def test_only_as_many_runs_at_once_as_memory_allows(recipe, monkeypatch):
    found = trials_of(read_sweep(recipe, ["train.lr=1e-3,1e-2,1e-4"], (), 0))
    monkeypatch.setattr(trials, "usable_threads", lambda: 8)
    each = silotune.plan(found[0].run, measured=False).peak_bytes
    assert each is not None
    for free, jobs in ((100 * each, 3), (2.6 * each, 2), (0.5 * each, 1)):
        monkeypatch.setattr(trials, "available_memory_bytes", lambda _, free=free: int(free))
        assert num_jobs(found, 3, Progress()) == jobs
