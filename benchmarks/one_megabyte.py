"""A whole run in less than a megabyte: `python benchmarks/one_megabyte.py [--out DIR]`.

Question types of MedQuAD, nine sources as clients, MiniLM (read from ../shared next to the
repository if they are there). Compares, under the protocol of `silotune compare`, FedAvg in float32
with Fed-SB whose messages are int8 both ways: rates and server steps of both are chosen on
validation rows, five seeds decide. Then it runs the small one once as its own people would, and
prints all bytes that it sent, both ways, and the differences. An interrupted comparison goes on, a
finished one is read again.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from joining import DATA, TYPES

import silotune
from silotune.recipes.parse import parse

SMALL: dict[str, Any] = {
    "algorithm": {"name": "fed_sb"},
    "wire": {"up": "int8", "down": "int8"},
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
        "arms": {"small": SMALL},
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
    for arm in ("federated", "federated: small"):
        chosen, small = found["chosen"][arm], arm.endswith("small")
        place = args.out / ("small" if small else "float32")
        run = whole_run(SMALL if small else {}, chosen, place)
        sent = run.summary["bytes_up"] + run.summary["bytes_down"]
        score = found["overall"]["scores"]["accuracy"][arm]
        print(f"{arm}, {chosen}: {sent:,} bytes in a whole run, all clients, both ways")
        print(f"  accuracy {score['mean']:.3f} ({score['low']:.3f} to {score['high']:.3f})")
    for metric in ("accuracy", "loss"):
        # "against" is float32 minus the other
        own = found["overall"]["against"][metric]["federated: small"]
        print(
            f"{metric}, small - float32: {-own['mean']:+.4f} "
            f"({-own['high']:+.4f} to {-own['low']:+.4f})"
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
