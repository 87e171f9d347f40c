"""A run that scores validation rows says so wherever it names its losses."""

import io

import pytest
from rich.console import Console
from typer.testing import CliRunner

import silotune
from silotune.cli import app
from silotune.federation.progress_lines import PlainProgress
from silotune.results.charts import rows_per_client
from silotune.results.run_tables import split_table
from silotune.workflows.sweep.ranking import ranked, sweep_table, verdict
from tests.conftest import write_tiny_recipe

KEYS = ["rounds=1", "data.validation_fraction=0.3", "report.page=true"]


@pytest.fixture(scope="module")
def told(tmp_path_factory, tiny_model):
    """The run, what a person saw during it, and the recipe."""
    place = tmp_path_factory.mktemp("validation")
    recipe, said = write_tiny_recipe(place, tiny_model), io.StringIO()
    progress = PlainProgress(Console(file=said, soft_wrap=True))
    return silotune.run(recipe, KEYS, out=place / "run", progress=progress), said, recipe


def test_progress_tables_card_and_page_name_the_validation_loss(told):
    run, said, _ = told
    assert {row["part"] for row in run.metrics if row["event"] == "evaluate"} == {"validation"}
    assert "validation loss before it" in said.getvalue()
    card = (run.path / "README.md").read_text("utf-8")
    page = (run.path / "report.html").read_text("utf-8")
    for text in (
        "## Validation loss (",
        "| client | train rows | validation rows | base |",
        "| round | train loss | validation loss after the round |",
        "| client | train rows | validation rows | held-out rows | median tokens",
        "a lower validation loss than with the base",
        "The held-out rows were not looked at",
    ):
        assert text in card, text
    for text in ("<h2>Validation loss</h2>", "validation loss (nats per token)", "not looked at"):
        assert text in page, text
    for text in (said.getvalue(), card, page):
        assert "held-out loss" not in text.lower()


def test_the_tables_show_all_three_parts(told):
    run, _, recipe = told
    rows = silotune.check(recipe, KEYS).rows["hospital-0"]
    own = ["hospital-0", *(str(len(p)) for p in (rows.train, rows.validation, rows.evaluation))]
    assert run.summary["clients"]["hospital-0"]["num_eval"] == len(rows.validation)
    assert "| " + " | ".join(own) + " |" in (run.path / "README.md").read_text("utf-8")
    found = silotune.preview(recipe, KEYS)
    assert found.clients["hospital-0"].num_validation == len(rows.validation)
    output = CliRunner().invoke(app, ["data", str(recipe), *KEYS]).output
    header = next(line for line in output.splitlines() if line.startswith("client"))
    assert header.split()[1:7] == ["train", "rows", "validation", "rows", "held-out", "rows"]
    line = next(text for text in output.splitlines() if text.split()[:4] == own)
    assert line
    assert "█ train, ▒ validation, ░ held out" in output


def test_without_validation_rows_the_words_are_as_they_were():
    split = {
        "a": {"num_train": 3, "num_eval": 1, "tokens": dict.fromkeys(("p50", "p95", "max"), 1)}
    }
    split["a"]["labels"] = {}
    assert split_table(split)[0][:4] == ("client", "train rows", "held-out rows", "median tokens")
    assert "validation" not in rows_per_client(split)
    assert "validation" in rows_per_client({"a": {**split["a"], "num_validation": 1}})


def test_a_sweep_names_the_loss_that_ranks_its_runs():
    row = {"number": 1, "keys": {"train.lr": "1"}, "failed": None, "task": "instruct"}
    row |= {"base_loss": 2.0, "loss": 1.0, "scores": None, "num_scored": 1, "bytes": 1}
    row |= {"seconds": 1.0}
    for more, name in (({}, "held-out loss"), ({"scored": "validation"}, "validation loss")):
        result = ranked([{**row, **more}])
        assert name in sweep_table(result)[0]
        assert verdict(result).startswith(f"Lowest {name}: 1.000")
