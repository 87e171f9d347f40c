"""Every command of the README runs, as written, on the tiny model instead of the fetched one."""

import csv
import re
from pathlib import Path

import pytest

from tests.forked import run_typed

pytestmark = pytest.mark.engine  # one of the commands does

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
MAKE = {"make demo", "make test", "make env"}  # .ci/run, test_demo.py and this run are those
DEPLOYED = ("rehearse", "server", "client")  # test_deployment.py runs these: some never end


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    inline = re.findall(r"`(silotune run [^`]+)`", README)
    return [line for line in lines if line] + inline


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the README's recipe and a file of rows as it describes them."""
    place = tmp_path_factory.mktemp("readme")
    (toml,) = [block for block in blocks("toml") if "tickets.csv" in block]
    (place / "tickets.toml").write_text(toml)
    with (place / "tickets.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["hospital", "question", "answer"])
        for i in range(10):
            writer.writerow([f"h{i % 2}", f"What is {i}?", f"It is {i}."])
    return place


def test_the_readme_shows_the_commands_that_this_file_expects():
    heads = {" ".join(c.split()[:2]) for c in commands()}
    verbs = ("check", "data", "plan", "sweep", "run", "compare", "ask", "chat", "evaluate")
    verbs += ("export", "report", *DEPLOYED)
    assert heads == {"make demo", "make test", *(f"silotune {verb}" for verb in verbs)}


@pytest.mark.timeout(900)
def test_every_command_runs_in_the_order_shown(workplace, tiny_model):
    import shlex

    for command in commands():
        if command in MAKE:
            continue
        _, verb, *rest = shlex.split(command)
        if verb in DEPLOYED:
            continue
        if verb in ("run", "compare", "sweep", "plan") and "--resume" not in rest:
            small = ["train.local_steps=1", "train.max_length=256", "runtime.threads=1"]
            rest += [f"model.name={tiny_model}", *small]
        if verb == "sweep":
            rest += ["--jobs=1"]  # processes for two runs cost more than the runs
        if verb == "compare":
            rest += ["data.max_rows=4", "data.max_eval_rows=2", "report.max_new_tokens=2"]
            rest += ["compare.tune={lr=[1e-3]}"]
        asked = "What is 1?\n" if verb == "chat" else ""
        done = run_typed([verb, *rest], cwd=workplace, input=asked)
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout, command


def test_the_python_snippets_run(workplace, tiny_model, monkeypatch):
    monkeypatch.chdir(workplace)
    for code in blocks("python"):
        small = code.replace('"rounds=1"', f'"rounds=1", "model.name={tiny_model}"')
        assert small != code or "silotune.run(" not in code
        exec(compile(small, "README.md", "exec"), {})
