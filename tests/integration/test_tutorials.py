"""The tutorials are followed in the order shown, on the tiny model instead of the fetched one."""

import shlex
import subprocess
from pathlib import Path

import pytest

from tests.shown import blocks, commands, run_small

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"
STARTED = {"five-hospitals", "own-data", "privacy"}
DEPLOYED = {"consortium-of-three"}  # tests/slow/test_consortium_tutorial.py


def test_every_tutorial_is_followed_by_a_test():
    assert {page.stem for page in TUTORIALS.glob("*.md")} == STARTED | DEPLOYED


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", sorted(STARTED))
def test_the_commands_of_a_tutorial_run_in_the_order_shown(name, tmp_path, tiny_model):
    page = TUTORIALS / f"{name}.md"
    for text in blocks(page, "csv"):
        (tmp_path / "visits.csv").write_text(text, encoding="utf-8")
    for command in commands(page):
        if command.startswith("silotune "):
            run_small(command, cwd=tmp_path, model=tiny_model)
        else:
            assert shlex.split(command)[0] == "sed", command
            subprocess.run(shlex.split(command), cwd=tmp_path, check=True)
