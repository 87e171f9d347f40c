"""A folder of runs as a list: what is in it, how far it is, and what cannot be read."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from silotune.core.errors import RunFolderError
from silotune.results.listing import refuse_collection, runs


def make(folder: Path, recipe: str, result: str = "", told: object = None, *, day: int = 1) -> Path:
    folder.mkdir(parents=True)
    (folder / recipe).write_text("rounds = 9\n")
    if result:
        (folder / result).write_text(json.dumps(told))
    os.utime(folder / recipe, (86400 * day, 86400 * day))
    return folder


def summary(loss: float | None) -> dict:
    return {"overall": {"base_loss": 3.0, "federated_loss": loss}}


def sweep(*rows: tuple[str, float | None]) -> dict:
    own = [
        {"path": f"runs/{name}", "loss": loss, "failed": None if loss else "diverged"}
        for name, loss in rows
    ]
    return {"runs": own}


def comparison(**means: float) -> dict:
    arms = {name.replace("_", ": "): {"mean": mean} for name, mean in means.items()}
    return {"seeds": [3, 4], "overall": {"scores": {"loss": arms}}}


def by_name(folder: Path) -> dict:
    return {own.name: own for own in runs(folder)}


def test_each_kind_is_listed_with_its_state_and_its_best_loss_oldest_first(tmp_path):
    make(tmp_path / "z", "recipe.toml", "summary.json", summary(2.5), day=1)
    make(tmp_path / "s", "sweep.toml", "sweep.json", sweep(("002", 1.5), ("001", None)), day=3)
    arms = comparison(base=0.5, federated=2.25, federated_fedprox=2.0, centralized=1.0)
    make(tmp_path / "c", "comparison.toml", "comparison.json", arms, day=2)
    (tmp_path / "notes").mkdir()
    (tmp_path / ".c.part").mkdir()
    assert [own[:5] for own in runs(tmp_path)] == [
        ("z", "run", "done", 2.5, None),
        ("c", "comparison", "done", 2.0, "seed-3/federated-fedprox/run"),
        ("s", "sweep", "done, 1 of 2 runs failed", 1.5, "runs/002"),
    ]


def test_a_run_that_is_not_finished_says_how_far_it_is_and_whether_somebody_works_on_it(tmp_path):
    run = make(tmp_path / "r", "recipe.toml")
    assert by_name(tmp_path)["r"].state == "stopped, round 0 of 9 done"
    rows = [{"event": "train", "round": 5}, {"event": "round", "round": 4}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (run / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert by_name(tmp_path)["r"].state == "running, round 4 of 9 done"
    assert by_name(tmp_path)["r"].state == "stopped, round 4 of 9 done"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("summary.json", "{"),
        ("summary.json", "[1]"),
        ("summary.json", "{}"),
        ("summary.json", json.dumps({"overall": {"federated_loss": "high"}})),
        ("summary.json", "\x00\xff"),
        ("recipe.toml", "rounds ="),
        ("metrics.jsonl", "{}\n"),
        ("metrics.jsonl", "nothing\n"),
    ],
)
def test_a_damaged_folder_is_one_line_and_hides_no_other(tmp_path, file, text):
    make(tmp_path / "good", "recipe.toml", "summary.json", summary(None))
    bad = make(tmp_path / "bad", "recipe.toml")
    (bad / file).write_bytes(text.encode("latin-1"))
    found = by_name(tmp_path)
    assert found["good"].state == "done"
    assert found["bad"].state.startswith("damaged: ")
    assert "\n" not in found["bad"].state
    assert found["bad"].loss is None


def test_a_folder_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(RunFolderError, match="is not a folder"):
        runs(tmp_path / "nowhere")


def test_where_a_run_is_needed_a_sweep_or_comparison_is_refused_with_its_best_run(tmp_path):
    """`ask`, `export` and `chat` said that a sweep has no recipe.toml, and no more."""
    run = make(tmp_path / "r", "recipe.toml")
    refuse_collection(run)
    refuse_collection(tmp_path)  # none of ours: whoever opens it says so
    found = make(tmp_path / "s", "sweep.toml", "sweep.json", sweep(("002", 1.5)))
    with pytest.raises(RunFolderError) as caught:
        refuse_collection(found, "silotune ask")
    assert str(caught.value) == (
        f"{found} is not a run folder: it is a sweep.\n"
        f"  Its best run (1.500): silotune ask {found}/runs/002"
    )
    begun = make(tmp_path / "c", "comparison.toml")
    with pytest.raises(RunFolderError, match=f"To continue: silotune compare --resume {begun}"):
        refuse_collection(begun)


def test_listing_recipes_and_runs_and_completing_load_no_torch(tmp_path):
    make(tmp_path / "c", "comparison.toml", "comparison.json", comparison(federated=2.25))
    code = f"""
import sys
from typer.testing import CliRunner
from silotune.cli import app
for words in (["recipes"], ["recipes", "hospitals"], ["runs", {str(tmp_path)!r}]):
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
from silotune.cli.completion import key_names, recipe_names
assert key_names("train.l") and recipe_names("h")
print({{"torch", "transformers", "numpy"}} & set(sys.modules))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"
