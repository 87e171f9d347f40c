"""Contributions with a real model: `python benchmarks/contributions.py [--rows 120] [--out DIR]`.

Four institutes classify their questions. Two planted clients are beside them: a copy of the first
one's rows, and rows whose labels were dealt at random; both hold out rows with true labels. What
does `silotune contribution` say of them? Rows are read from ../shared, next to the repository, if
they are there. A run that is finished is not trained again.
"""

import argparse
import random
import sys
from pathlib import Path

from joining import DATA, TYPES, Row, merged, read_rows, write_rows

import silotune
from silotune.recipes.parse import parse

COPY, RANDOM = "copy of GARD", "labels at random"


def main() -> None:
    """Train once per seed with all six clients, then print what each gave the others."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rows", type=int, default=120)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--out", type=Path, default=Path("runs/contributions"))
    options.add_argument("overrides", nargs="*", metavar="key=value")
    args = options.parse_intermixed_args()
    if not (DATA / TYPES.train).is_file():
        sys.exit(f"skipped: {TYPES.train} is not next to this repository")
    place = args.out.resolve()
    place.mkdir(parents=True, exist_ok=True)
    rows = planted(read_rows(TYPES.train), args.rows)
    held = shared_out(read_rows(TYPES.held_out))
    write_rows(place / "rows.jsonl", rows)
    write_rows(place / "held-out.jsonl", held)
    print("| seed | client | leave one out | says | gradient | says |\n|---|---|---|---|---|---|")
    for seed in range(args.seeds):
        own = {
            "seed": seed,
            "rounds": 4,
            "data": {
                "path": str(place / "rows.jsonl"),
                "eval_path": str(place / "held-out.jsonl"),
            },
            "partition": dict(TYPES.cuts["by source"]),
            "train": {"batch_size": 8, "local_steps": 12, "lr": 2e-2, "schedule": "cosine"},
            "checkpoint": {"keep_updates": True},
            "evaluate": {"batch_size": 64},
        }
        recipe = {k: v for k, v in TYPES.recipe.items() if k != "compare"}
        run = place / f"seed-{seed}"
        if not run.exists():
            silotune.run(parse(merged(recipe, own)), args.overrides, out=run)
        result = silotune.contribution(run).result
        for client, found in result["clients"].items():
            cells = [f"| {seed} | {client}"]
            for estimate in ("leave_one_out", "gradient"):
                of = found[estimate]
                cells.append(f"{of['mean']:+.3f} ({of['low']:+.3f} to {of['high']:+.3f})")
                cells.append(of["verdict"])
            print(" | ".join(cells) + " |", flush=True)


def planted(rows: list[Row], n: int) -> list[Row]:
    """At most n rows of each institute, GARD's again, and n others of GHR with dealt labels."""
    draw = random.Random(0)
    draw.shuffle(rows)
    of = {name: [row for row in rows if row["source"] == name] for name in TYPES.owners}
    kept = [row for own in of.values() for row in own[:n]]
    kept += [{**row, "source": COPY} for row in of["GARD"][:n]]
    further = of["GHR"][n : 2 * n]
    labels = [row["label_name"] for row in further]
    draw.shuffle(labels)
    kept += [
        {**row, "label_name": label, "source": RANDOM}
        for row, label in zip(further, labels, strict=True)
    ]
    return kept


def shared_out(held: list[Row]) -> list[Row]:
    """Held-out rows of the institutes; every second one of GARD and GHR is a planted client's."""
    kept: list[Row] = []
    for name in TYPES.owners:
        for i, row in enumerate(row for row in held if row["source"] == name):
            planted_one = {"GARD": COPY, "GHR": RANDOM}.get(str(name)) if i % 2 else None
            kept.append({**row, "source": planted_one or name})
    return kept


if __name__ == "__main__":
    main()
