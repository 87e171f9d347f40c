"""The how-to pages are followed word for word, on a copy of the source."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import silotune
from silotune.cli import app
from silotune.core.tree import sha256
from tests.conftest import hospital_rows, write_jsonl, write_tiny_recipe

HOUSE = Path(__file__).parents[2]
PAGE = HOUSE / "docs" / "how-to" / "add-an-algorithm.md"


def files_of(page: Path) -> dict[str, str]:
    """The blocks of a page that begin with a comment that names a file."""
    text = page.read_text(encoding="utf-8")
    return dict(re.findall(r"^```py\n# (\S+)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE))


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A copy of the source with FedMom added as the page says."""
    place = tmp_path_factory.mktemp("house")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(HOUSE / "src", place / "src", ignore=ignored)
    for path, text in files_of(PAGE).items():
        target = place / path
        if target.is_file():  # the registry: an import, and one line
            imported, line = text.strip("\n").split("\n\n")
            before = target.read_text(encoding="utf-8")
            head, tail = before.split("\n\nALGORITHMS", 1)
            opening, rest = tail.split("{\n", 1)
            target.write_text(
                f"{head}\n{imported}\n\nALGORITHMS{opening}{{\n{line}\n{rest}", encoding="utf-8"
            )
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    return place


def python(house: Path, *words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(house / "src"), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *words], cwd=house, env=environment, capture_output=True, text=True
    )


def test_the_page_adds_one_file_and_one_line():
    paths = list(files_of(PAGE))
    assert paths == [
        "src/silotune/algorithms/fedmom.py",
        "src/silotune/algorithms/__init__.py",
        "tests/unit/algorithms/test_fedmom.py",
    ]
    registered = files_of(PAGE)[paths[1]].strip("\n").split("\n\n")
    assert [len(part.splitlines()) for part in registered] == [1, 1]


def test_the_page_says_nothing_that_the_registry_has_already():
    assert "fedmom" not in (HOUSE / "src/silotune/algorithms/__init__.py").read_text("utf-8")


def test_the_test_of_the_page_passes(house):
    done = python(house, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_the_commands_of_the_page_know_the_new_algorithm(house):
    done = python(house, "-m", "silotune", "check", "hospitals", "algorithm.name=fedmom",
                  "algorithm.momentum=0.8")  # fmt: skip
    assert done.returncode == 0, done.stderr
    wrong = python(house, "-m", "silotune", "check", "hospitals", "algorithm.name=fedmom",
                   "algorithm.momentum=1.5")  # fmt: skip
    assert wrong.returncode == 2
    assert "algorithm.momentum" in wrong.stderr


def test_a_real_client_goes_on_alone_from_the_result(tiny_model, tmp_path, monkeypatch):
    """docs/own-steps.md, with the rank of the tiny model's adapter in place of the page's."""
    recipe = write_tiny_recipe(tmp_path, tiny_model)
    together = silotune.run(recipe, ["rounds=1"], out=tmp_path / "together")
    shutil.copytree(together.path / "adapter", tmp_path / "adapter")
    (tmp_path / "base").symlink_to(tiny_model)
    rows = hospital_rows(num_clients=1, per_client=16)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    text = (HOUSE / "docs" / "own-steps.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```toml\n# own\.toml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    (words,) = re.findall(r"^silotune (run own\.toml .*)$", text, re.MULTILINE)
    own = block.replace("rank = 16", "rank = 2").replace("alpha = 32", "alpha = 4")
    assert own != block
    (tmp_path / "own.toml").write_text(own, encoding="utf-8")
    keys = ["train.max_length=128", 'adapter.targets=["q_proj","v_proj"]', "runtime.threads=1"]
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [*words.split(), *keys])
    assert result.exit_code == 0, result.output
    about = json.loads((tmp_path / "runs/own/provenance.json").read_text())["start"]
    assert about["sha256"] == sha256(together.adapter())
    assert len(json.loads((tmp_path / "runs/own/summary.json").read_text())["clients"]) == 1
