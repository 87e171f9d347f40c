"""The demo's work in the three runtimes: wall time as ratios to the plain loop, in one run.

Each line is `silotune run` as a user types it, including the engine's start and end. The last round
is the steady one: everything is loaded by then.

    python benchmarks/runtimes.py [--repeats 2] [key=value ...]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNTIMES = ("in-process", "flower-simulation", "flower")


def measure(runtime: str, overrides: list[str], out: Path) -> tuple[float, float, str]:
    """Seconds of the whole command and of its last round, and the adapter's fingerprint."""
    command = [sys.executable, "-m", "silotune", "run", "hospitals", *overrides]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, f"runtime.name={runtime}", "--out", str(out), "--json"],
        capture_output=True,
        text=True,
    )
    wall = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{runtime} failed:\n{done.stderr}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rounds = [row["seconds"] for row in rows if row["event"] == "round"]
    return wall, rounds[-1], json.loads(done.stdout)["adapter_sha256"]


def main() -> None:
    """Measure, and print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--repeats", type=int, default=2)
    options.add_argument("overrides", nargs="*", metavar="key=value")
    args = options.parse_args()
    found: dict[str, list[tuple[float, float, str]]] = {name: [] for name in RUNTIMES}
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(args.repeats):
            for name in RUNTIMES:
                found[name].append(
                    measure(name, args.overrides, Path(scratch) / f"{name}-{repeat}")
                )
    prints = {print_ for runs in found.values() for _, _, print_ in runs}
    print(f"recipe hospitals {' '.join(args.overrides)}, {args.repeats} repeats, medians")
    print("runtime             whole run s   ratio   last round s   ratio")
    middle = {
        name: (statistics.median(r[0] for r in runs), statistics.median(r[1] for r in runs))
        for name, runs in found.items()
    }
    base = middle["in-process"]
    for name, (wall, steady) in middle.items():
        print(
            f"{name:<19} {wall:>11.1f} {wall / base[0]:>7.2f} {steady:>14.1f} "
            f"{steady / base[1]:>7.2f}"
        )
    print(f"adapters: {'equal' if len(prints) == 1 else 'DIFFERENT'} ({prints.pop()[:12]})")


if __name__ == "__main__":
    main()
