"""docs/tutorials/consortium-of-three.md, as one person would follow it with several terminals."""

import json
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from silotune.runtime.flower.engine import free_port
from tests.forked import run_typed
from tests.shown import SMALL, commands

pytestmark = [pytest.mark.slow, pytest.mark.engine, pytest.mark.timeout(1800)]

PAGE = Path(__file__).parents[2] / "docs" / "tutorials" / "consortium-of-three.md"
START_S = 1200.0


def write_rows(place: Path) -> None:
    """The three files that the page describes."""
    for client in ("north", "south", "west"):
        rows = [f"What is {client} {i}?,It is {i}." for i in range(30)]
        text = "\n".join(["question,answer", *rows]) + "\n"
        (place / f"{client}.csv").write_text(text, encoding="utf-8")


class Terminals:
    """Commands that end, one after another, and commands that keep running beside them."""

    def __init__(self, place: Path, model: Path) -> None:
        self.place, self.model = place, model
        self.port = str(free_port())
        self.running: list[subprocess.Popen[bytes]] = []

    def type(self, command: str) -> str:
        """Type a command: what it printed, or "" if it keeps running."""
        words = shlex.split(command.replace("8443", self.port))[1:]
        if words[:2] in (["client", "doctor"], ["client", "join"]):
            words += ["--model", str(self.model)]
        if words[:2] == ["client", "doctor"]:
            self.wait_for("clients reach it", [0])
            self.wait_for_port()
        if words[:2] == ["server", "submit"]:
            words += [f"model.name={self.model}", *SMALL]
            self.wait_for("' is connected to", range(1, len(self.running)))
        if words[:2] in (["server", "up"], ["client", "join"]):
            with (self.place / f"{len(self.running)}.log").open("wb") as log:
                started = [sys.executable, "-m", "silotune", *words]
                self.running.append(
                    subprocess.Popen(started, cwd=self.place, stdout=log, stderr=log)
                )
            return ""
        done = run_typed(words, cwd=self.place)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def wait_for(self, text: str, terminals: Iterable[int]) -> None:
        """A person would look at these terminals before typing the next command."""
        deadline = time.monotonic() + START_S
        logs = [self.place / f"{n}.log" for n in terminals]
        while not all(text in log.read_text() for log in logs):
            assert time.monotonic() < deadline, [log.read_text() for log in logs]
            time.sleep(1)

    def wait_for_port(self) -> None:
        """The gate listens a moment after the line that names its port."""
        deadline = time.monotonic() + START_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", int(self.port)), timeout=5).close()
                return
            except OSError:
                assert time.monotonic() < deadline, (self.place / "0.log").read_text()
                time.sleep(0.5)

    def close(self) -> None:
        for process in reversed(self.running):
            process.terminate()
        for process in self.running:
            process.wait(60)


def test_the_page_is_followed_from_the_first_to_the_last_command(tmp_path, tiny_model):
    write_rows(tmp_path)
    terminals = Terminals(tmp_path, tiny_model)
    said: dict[str, str] = {}
    try:
        for command in commands(PAGE):
            if command.startswith("silotune rehearse"):
                continue  # test_deployment.py
            said[command] = terminals.type(command)
        (run,) = (tmp_path / "consortium" / "runs").iterdir()
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    finally:
        terminals.close()
    trained = {
        (r["round"], r["client"]) for r in rows if r["event"] == "train" and r["status"] == "ok"
    }
    assert trained == {(r, name) for r in (1, 2) for name in ("north", "south", "west")}
    assert "north" in said["silotune server status"]
