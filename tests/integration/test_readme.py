"""Every command of the README runs, as written, on the tiny model instead of the fetched one."""

import csv
import re
from pathlib import Path

import pytest

from tests.shown import blocks, commands, run_small

pytestmark = pytest.mark.engine  # one of the commands does

README = Path(__file__).parents[2] / "README.md"
MAKE = {"make demo", "make test", "make env"}  # .ci/run, test_demo.py and this run are those
DEPLOYED = ("rehearse", "server", "client")  # test_deployment.py runs these: some never end


def all_commands() -> list[str]:
    """Those in text, too."""
    inline = re.findall(r"`(silotune run [^`]+)`", README.read_text(encoding="utf-8"))
    return [*commands(README), *inline]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the README's recipe and a file of rows as it describes them."""
    place = tmp_path_factory.mktemp("readme")
    (toml,) = [block for block in blocks(README, "toml") if "tickets.csv" in block]
    (place / "tickets.toml").write_text(toml)
    with (place / "tickets.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["hospital", "question", "answer"])
        for i in range(10):
            writer.writerow([f"h{i % 2}", f"What is {i}?", f"It is {i}."])
    return place


def test_the_readme_shows_the_commands_that_this_file_expects():
    heads = {" ".join(c.split()[:2]) for c in all_commands()}
    verbs = ("check", "data", "plan", "sweep", "run", "compare", "ask", "chat", "evaluate")
    verbs += ("export", "report", *DEPLOYED)
    assert heads == {"make demo", "make test", *(f"silotune {verb}" for verb in verbs)}


@pytest.mark.timeout(900)
def test_every_command_runs_in_the_order_shown(workplace, tiny_model):
    for command in all_commands():
        if command in MAKE or command.split()[1] in DEPLOYED:
            continue
        run_small(command, cwd=workplace, model=tiny_model)


def test_the_python_snippets_run(workplace, tiny_model, monkeypatch):
    monkeypatch.chdir(workplace)
    for code in blocks(README, "python"):
        small = code.replace('"rounds=1"', f'"rounds=1", "model.name={tiny_model}"')
        assert small != code or "silotune.run(" not in code
        exec(compile(small, "README.md", "exec"), {})
