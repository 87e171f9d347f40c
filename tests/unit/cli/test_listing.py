"""The commands that list, and what a shell completes."""

import json
import os
import subprocess
import sys
import tomllib
import warnings

import pytest
from typer.testing import CliRunner

import silotune
from silotune.cli.completion import key_names, recipe_names
from silotune.recipes.mistakes import known_keys

with warnings.catch_warnings():
    # typer 0.20.1 imports a name that click 8.5 calls deprecated
    warnings.filterwarnings("ignore", message="'click.utils", category=DeprecationWarning)
    from silotune.cli import app


START = "from silotune.cli import app; app()"
"""What the installed command does; a shell asks for completions by its name."""


def typed(*words: str):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(words))


def test_every_shipped_recipe_is_listed_with_what_it_is_and_where_it_is_from():
    lines = typed("recipes").output.splitlines()
    assert [line.split()[0] for line in lines] == list(silotune.shipped_recipes())
    assert all(" From: " in line and len(line.split(" From: ")[1]) > 3 for line in lines)
    found = json.loads(typed("recipes", "--json").output)
    assert [own["name"] for own in found] == list(silotune.shipped_recipes())
    assert all(own["what"].endswith(".") and own["source"] for own in found)


def test_a_recipe_is_printed_as_it_is_in_the_package(tmp_path):
    text = typed("recipes", "hospitals").output
    assert text == silotune.shipped_recipes()["hospitals"].read_text(encoding="utf-8")
    tomllib.loads(text)
    wrong = typed("recipes", "hospital")
    assert wrong.exit_code == 2
    assert "there is no shipped recipe 'hospital'. Did you mean 'hospitals'?" in wrong.stderr


def test_an_empty_folder_of_runs_says_so_and_a_missing_one_is_an_error(tmp_path):
    assert typed("runs", str(tmp_path)).output.startswith("there is no run, comparison or sweep in")
    assert json.loads(typed("runs", str(tmp_path), "--json").output) == []
    assert typed("runs", str(tmp_path / "nowhere")).exit_code == 2


def test_keys_complete_with_every_key_that_some_recipe_may_have():
    offered = {key for key, _ in key_names("")}
    assert all(key.endswith("=") for key in offered)
    known = {key for name in ("fedavg", "fedprox", "fedadam") for key in known_keys(name)}
    sections = {key.partition(".")[0] for key in known if "." in key}
    assert {f"{key}=" for key in known if key not in sections} <= offered
    assert [key for key, _ in key_names("train.lr")] == ["train.lr=", "train.lr_min="]
    assert key_names("train.lr=1") == []
    assert all(meaning and "\n" not in meaning for _, meaning in key_names(""))


def test_recipe_names_complete():
    assert [name for name, _ in recipe_names("glue")] == ["glue-cola", "glue-sst2"]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("silotune ru", ["run", "runs"]),
        ("silotune run hosp", ["hospitals"]),
        ("silotune recipes work", ["workshop"]),
        ("silotune sweep x adapter.ta", ["adapter.targets="]),
    ],
)
def test_a_shell_gets_commands_recipes_and_keys(line, offered):
    words = line.split()
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv = ['silotune']; {START}"],
        env={**os.environ, **asked, "_SILOTUNE_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == offered
