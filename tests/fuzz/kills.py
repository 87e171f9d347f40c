"""Kill runs at random moments, resume them, and compare the adapter with the undisturbed run's.

    python -m tests.fuzz.kills [--kills 100] [--seed 1] [--kinds fedavg compare ...] [--signal TERM]

Every command runs in a process that forks from one with the libraries loaded, so that a kill falls
into our work and not into imports. Prints a table; the exit status is 1 if a resume failed, an
adapter differs, or something was left behind.
"""

import argparse
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from random import Random

import psutil

from tests.conftest import build_tiny_model, write_tiny_recipe

CLIENT_LEVEL = (
    *("privacy.unit=client", "privacy.noise=seeded", "privacy.noise_multiplier=1"),
    *("privacy.clip_norm=1", "privacy.delta=1e-3", "algorithm.weights=uniform"),
)
RECORD_LEVEL = (
    *("privacy.unit=record", "privacy.noise_multiplier=1", "privacy.clip_norm=1"),
    *("privacy.delta=1e-3", "adapter.dropout=0"),
)
KINDS: Mapping[str, tuple[str, Sequence[str]]] = {
    "fedavg": ("run", ()),
    "fedadam": ("run", ("algorithm.name=fedadam",)),
    "ffa_lora": ("run", ("algorithm.name=ffa_lora",)),
    "client level": ("run", CLIENT_LEVEL),
    "record level": ("run", RECORD_LEVEL),
    "compare": ("compare", ("compare.seeds=1",)),
    "tuned compare": (
        "compare",
        ("compare.seeds=1", "compare.tune={lr=[1e-2]}", "data.eval_fraction=0.4"),
    ),
    "sweep": ("sweep", ("train.lr=1e-3,1e-2",)),
}
OPTIONS = {"sweep": ("--jobs=2",)}
"""Of the command and of every resume: without this one, a sweep measures memory for seconds."""
WITH_FRESH_NOISE = ("record level",)
"""Their noise is the system's, so a repeated round differs; that they end well is what counts."""
MOST_TRIES = 4
"""Kills of one trial; the next try is left alone."""


@dataclass
class Tally:
    """What happened to the trials of one kind."""

    kills: int = 0
    trials: int = 0
    identical: int = 0
    problems: list[str] = field(default_factory=list)


def kill_and_resume(
    place: Path, *, kills: int, seed: int, kinds: Sequence[str] = (), signum: int = signal.SIGKILL
) -> dict[str, Tally]:
    """Kill each kind of command `kills` times in all its trials, and compare the results."""
    place.mkdir(parents=True)
    recipe = write_tiny_recipe(place, build_tiny_model(place / "model"))
    found: dict[str, Tally] = {}
    for kind in kinds or list(KINDS):
        draw, tally = Random(f"{seed} {kind}"), Tally()
        whole = place / f"{kind} undisturbed"
        began = time.monotonic()
        assert _ended(_started(kind, recipe, whole), 600) == 0, f"{kind} failed undisturbed"
        seconds, wanted = time.monotonic() - began, adapters(whole)
        while tally.kills < kills:
            out = place / f"{kind} {tally.trials}"
            limit = kills - tally.kills
            _one_trial(kind, recipe, out, tally, draw, seconds, limit=limit, signum=signum)
            _judge(kind, out, wanted, tally)
            shutil.rmtree(out, ignore_errors=True)
        found[kind] = tally
        sys.stderr.write(f"{kind}: {tally.kills} kills, {seconds:.1f} s undisturbed\n")
    return found


def _one_trial(
    kind: str,
    recipe: Path,
    out: Path,
    tally: Tally,
    draw: Random,
    seconds: float,
    *,
    limit: int,
    signum: int,
) -> None:
    """One command from its start to its end, with up to `MOST_TRIES` kills on the way."""
    tally.trials += 1
    for number in range(MOST_TRIES + 1):
        process = _started(kind, recipe, out)
        is_last = number >= min(limit, MOST_TRIES)
        wait_s = 60 + 30 * seconds if is_last else draw.uniform(0, 1.02 * seconds)
        status = _ended(process, wait_s)
        if status is not None:
            if status != 0:
                tally.problems.append(f"{kind}: a resume ended with {status}")
            return
        if is_last:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            tally.problems.append(f"{kind}: a resume did not end within {wait_s:.0f} s")
            return
        os.kill(process.pid, signum)
        process.join()
        tally.kills += 1
        if left := processes_left(process.pid):
            tally.problems.append(f"{kind}: {left} of its processes did not end")


def _judge(kind: str, out: Path, wanted: Mapping[str, str], tally: Tally) -> None:
    found = adapters(out)
    same = found.keys() == wanted.keys() if kind in WITH_FRESH_NOISE else found == wanted
    tally.identical += same
    if not same:
        tally.problems.append(f"{kind}: the adapter differs")
    if left := leftovers(out):
        tally.problems.append(f"{kind}: left behind: {', '.join(left[:3])}")


def adapters(folder: Path) -> dict[str, str]:
    """The SHA-256 of every finished adapter in a folder, by its path."""
    files = sorted(folder.rglob("adapter_model.safetensors"))
    return {str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() for p in files}


def leftovers(folder: Path) -> list[str]:
    """Parts of files, spools and half checkpoints that a finished folder still has."""
    parts = [p for p in folder.rglob("*") if p.name.endswith((".part", ".gone"))]
    spools = list(folder.rglob("spool/*"))
    rounds = folder.rglob("checkpoints/round-*")
    half = [p for p in rounds if not (p / "adapter.safetensors").is_file()]
    return [str(p.relative_to(folder)) for p in (*parts, *spools, *half)]


def processes_left(session: int, wait_s: float = 5.0) -> int:
    """How many processes of a session are still there after a while; they are ended then."""
    until = time.monotonic() + wait_s
    while left := [p for p in psutil.process_iter() if _session_of(p) == session]:
        if time.monotonic() > until:
            for process in left:
                process.kill()
            break
        time.sleep(0.05)
    return len(left)


def _session_of(process: psutil.Process) -> int | None:
    try:
        gone = process.status() == psutil.STATUS_ZOMBIE
        return None if gone else os.getsid(process.pid)
    except (psutil.Error, ProcessLookupError):
        return None


def _started(kind: str, recipe: Path, out: Path) -> "multiprocessing.Process":
    command, keys = KINDS[kind]
    fresh = [command, str(recipe), "rounds=4", *keys, "--out", str(out)]
    words = [command, "--resume", str(out)] if out.is_dir() else fresh
    words += OPTIONS.get(kind, ())
    forks = multiprocessing.get_context("fork")
    process = forks.Process(target=_command, args=(words,))
    process.start()
    return process


def _command(words: list[str]) -> None:
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    from silotune.cli import app

    app(words)


def _ended(process: "multiprocessing.Process", wait_s: float) -> int | None:
    process.join(wait_s)
    return process.exitcode


def table(found: Mapping[str, Tally]) -> str:
    """Kills, trials and results by kind, as Markdown."""
    lines = ["| kind | kills | trials | same adapter | problems |", "|---|---|---|---|---|"]
    for kind, own in found.items():
        mark = " (ended well)" if kind in WITH_FRESH_NOISE else ""
        numbers = f"{own.kills} | {own.trials} | {own.identical}{mark} | {len(own.problems)}"
        lines.append(f"| {kind} | {numbers} |")
    return "\n".join(lines)


def main() -> int:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=140, help="of all kinds together")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    options.add_argument("--signal", choices=["KILL", "TERM", "INT", "HUP"], default="KILL")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = kill_and_resume(
            Path(scratch) / "kills",
            kills=-(-given.kills // len(given.kinds)),
            seed=given.seed,
            kinds=given.kinds,
            signum=getattr(signal, f"SIG{given.signal}"),
        )
    problems = [problem for own in found.values() for problem in own.problems]
    sys.stdout.write("\n".join([table(found), "", *problems, f"{len(problems)} problems", ""]))
    return 1 if problems else 0


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    sys.exit(main())
