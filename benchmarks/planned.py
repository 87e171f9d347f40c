"""Predicted against actual cost: `python benchmarks/planned.py [--case NAME]... [key=value]`.

Every case runs with `plan.measure` in a fresh process, as it would for a user, and prints the ratio
of actual to predicted bytes, memory and time. A case whose rows are not available is skipped, and
its name is printed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from silotune.core.wording import human_bytes, human_seconds

SHARED = Path(__file__).parents[2] / "shared" / "data"
BASE = "model.name=smollm2-135m-instruct"
CASES: dict[str, tuple[str, list[str]]] = {
    "hospitals": (
        "hospitals",
        [BASE, "rounds=2", "train.local_steps=3", "data.max_eval_rows=8"],
    ),
    "flowertune": (
        "flowertune",
        [
            *(BASE, "model.quantization=none", f"data.path={SHARED / 'alpaca_en/train.jsonl'}"),
            *("rounds=2", "train.local_steps=2", "train.batch_size=4"),
            *("data.max_rows=100", "data.max_eval_rows=2"),
        ],
    ),
    "cola": (
        "glue-cola",
        [
            *(
                "model.name=minilm-l6",
                "server.work=none",
                "server.data_fraction=0",
                "compare.arms=none",
            ),
            f"data.path={SHARED / 'cola/train.jsonl'}",
            f"data.eval_path={SHARED / 'cola/dev_part.jsonl'}",
            *("data.name=none", "data.split=none", "data.eval_split=none"),
            *("rounds=3", "train.local_epochs=none", "train.local_steps=20"),
        ],
    ),
}
"""A recipe and its keys: a few rounds and steps of a real base on real rows."""
MOST = {"bytes": 0.01, "memory": 0.15, "seconds": 0.25}
"""How far the actual cost may be from the predicted cost, as a share of the latter."""


def run(recipe: str, keys: list[str], *, out: Path) -> dict[str, Any]:
    """Run a recipe in a separate process; return what its summary says about the prediction."""
    quiet = ["plan.measure=true", "report.samples=0", "report.page=false"]
    command = [sys.executable, "-m", "silotune", "run", recipe, *keys, *quiet]
    command += ["--out", str(out), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)["predicted"]


def main() -> None:
    """Run the cases, and print predicted cost, actual cost and their ratio."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--case", action="append", choices=CASES, help="default: all")
    options.add_argument("overrides", nargs="*", metavar="key=value")
    args = options.parse_args()
    beyond: list[str] = []
    for name in args.case or CASES:
        recipe, keys = CASES[name]
        missing = [k for k in keys if str(SHARED) in k and not Path(k.split("=")[1]).is_file()]
        if missing:
            print(f"{name}: skipped, its rows are not next to this repository")
            continue
        with tempfile.TemporaryDirectory() as place:
            found = run(recipe, [*keys, *args.overrides], out=Path(place) / "run")
        load = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
        for cost, most in MOST.items():
            if (pair := found[cost]) is None:
                continue
            shown = human_seconds if cost == "seconds" else human_bytes
            ratio = 1 + pair["difference"]
            print(
                f"{name:<12} {cost:<8} predicted {shown(pair['predicted']):>12}  "
                f"actual {shown(pair['actual']):>12}  ratio {ratio:.3f}  {load}",
                flush=True,
            )
            if abs(pair["difference"]) > most:
                beyond.append(f"{name}: {cost}, {100 * pair['difference']:+.1f} %")
        for note in found["notes"]:
            print(f"{name:<12} {note}")
    print("outside the tolerance: " + ("; ".join(beyond) or "nothing"))


if __name__ == "__main__":
    main()
