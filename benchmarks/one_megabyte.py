"""A whole run in less than a megabyte: `python benchmarks/one_megabyte.py [--out DIR]`.

Question types of MedQuAD, nine sources as clients, MiniLM (read from ../shared next to the
repository if they are there). Compares, under the protocol of `silotune compare`, FedAvg in float32
with two runs below a megabyte: Fed-SB whose messages are int8 both ways, and FedAvg with half the
rank and int4 both ways. Every arm's rate and server step are chosen on validation rows, five seeds
decide. Then each is run once as its own people would, and all bytes that it sent, both ways, and
the differences are printed. An interrupted comparison goes on, a finished one is read again.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from joining import DATA, TYPES

import silotune
from silotune.recipes.parse import parse

ARMS: dict[str, dict[str, Any]] = {
    "fed_sb": {"algorithm": {"name": "fed_sb"}, "wire": {"up": "int8", "down": "int8"}},
    "rank 4": {
        "adapter": {**TYPES.recipe["adapter"], "rank": 4, "alpha": 8},
        "wire": {"up": "int4", "down": "int4"},
    },
}
RECIPE: dict[str, Any] = {
    "seed": 17,
    "rounds": 9,
    "task": TYPES.recipe["task"],
    "model": TYPES.recipe["model"],
    "adapter": TYPES.recipe["adapter"],
    "data": {
        **TYPES.recipe["data"],
        "path": str(DATA / "medquad_types" / "train.jsonl"),
        "eval_path": str(DATA / "medquad_types" / "dev.jsonl"),
    },
    "partition": {"by": "source"},
    "train": {"max_length": 32, "batch_size": 8, "local_steps": 12, "lr": 2e-2},
    "evaluate": {"every": 9, "batch_size": 64},
    "report": {"page": False},
    "compare": {
        **TYPES.recipe["compare"],
        "seeds": 5,
        "every": 3,
        "centralized": False,
        "arms": ARMS,
    },
}


def main() -> None:
    """Compare what has not been compared, run the small one, and print both."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, default=Path("runs/one-megabyte"))
    options.add_argument("overrides", nargs="*", metavar="key=value")
    args = options.parse_intermixed_args()
    if not DATA.is_dir():
        sys.exit("skipped: medquad_types is not next to this repository")
    place = args.out / "compared"
    if place.exists():
        found = silotune.compare(resume=place).result
    else:
        found = silotune.compare(parse(RECIPE), args.overrides, out=place).result
    for name, own in {"float32": {}, **ARMS}.items():
        arm = "federated" if name == "float32" else f"federated: {name}"
        run = whole_run(own, found["chosen"][arm], args.out / name)
        sent = run.summary["bytes_up"] + run.summary["bytes_down"]
        print(f"{name}, {found['chosen'][arm]}: {sent:,} bytes in a whole run, all clients")
        for metric in ("accuracy", "loss"):
            score = found["overall"]["scores"][metric][arm]
            print(f"  {metric} {score['mean']:.3f} ({score['low']:.3f} to {score['high']:.3f})")
            if arm != "federated":
                # "against" is float32 minus the other
                apart = found["overall"]["against"][metric][arm]
                print(
                    f"  {metric}, minus float32's: {-apart['mean']:+.4f} "
                    f"({-apart['high']:+.4f} to {-apart['low']:+.4f})"
                )


def whole_run(own: dict[str, Any], chosen: dict[str, Any], place: Path) -> silotune.Run:
    """One run without validation rows, at the rates that the comparison has chosen."""
    if place.exists():
        return silotune.Run(place)
    recipe = {key: value for key, value in RECIPE.items() if key != "compare"} | own
    recipe["train"] = {**recipe["train"], "lr": chosen["lr"]}
    recipe["algorithm"] = {**recipe.get("algorithm", {}), "server_lr": chosen["server_lr"]}
    return silotune.run(parse(recipe), out=place)


if __name__ == "__main__":
    main()
