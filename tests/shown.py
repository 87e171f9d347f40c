"""Commands and code that pages show, and what makes them small enough for a test."""

import re
import shlex
from pathlib import Path

from tests.forked import run_typed

TRAINS = ("run", "compare", "sweep", "plan", "audit")
SMALL = ["train.local_steps=1", "train.max_length=256", "runtime.threads=1"]


def blocks(page: Path, kind: str) -> list[str]:
    """The fenced blocks of a kind, such as sh or toml."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Every line of its sh blocks, without comments."""
    lines = [
        line.split("#")[0].strip() for block in blocks(page, "sh") for line in block.splitlines()
    ]
    return [line for line in lines if line]


def run_small(command: str, *, cwd: Path, model: Path) -> None:
    """Run a shown `silotune` command: as written, or with few steps on the tiny model if it trains.

    Raises:
        AssertionError: It failed, or printed nothing.
    """
    _, verb, *rest = shlex.split(command)
    if verb in TRAINS and "--resume" not in rest:
        rest += [f"model.name={model}", *SMALL]
    if verb == "sweep":
        rest += ["--jobs=1"]  # processes for two runs cost more than the runs
    if verb == "compare":
        rest += ["data.max_rows=4", "data.max_eval_rows=2", "report.max_new_tokens=2"]
        rest += [] if "compare.tune=" in command else ["compare.tune={lr=[1e-3]}"]
    asked = "What is 1?\n" if verb == "chat" else ""
    done = run_typed([verb, *rest], cwd=cwd, input=asked)
    assert done.returncode == 0, (command, done.stderr)
    assert done.stdout, command
