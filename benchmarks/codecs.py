"""What fewer bytes cost: `python benchmarks/codecs.py [--set types] [--rows 50] [--only int8 ...]`.

Runs `silotune compare` with one arm per codec, all with the same rows, learning rate and seeds.
Rows and recipe are those of benchmarks/joining.py. An interrupted comparison goes on, a finished
one is read again. Prints the difference of each codec from float32.
"""

import argparse
from pathlib import Path
from typing import Any

from joining import SETS, recipe_of

import silotune
from silotune.recipes.parse import parse

ARMS: dict[str, dict[str, Any]] = {
    "bf16": {"up": "bf16"},
    "int8": {"up": "int8"},
    "int4": {"up": "int4"},
    "int4 without feedback": {"up": "int4", "error_feedback": False},
    "sign": {"up": "sign"},
    "topk": {"up": "topk"},
}
LR = {"types": 2e-2, "sentiment": 2e-2, "institutes": 3e-3}
"""The same for all, so that only the codec differs."""


def main() -> None:
    """Compare what has not been compared, then print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--set", choices=LR, default="types")
    options.add_argument("--rows", type=int, default=50)
    options.add_argument("--cut", help="by default by source, or alike where nobody owns a row")
    options.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS))
    options.add_argument("--out", type=Path, default=Path("runs/codecs"))
    options.add_argument("overrides", nargs="*", metavar="key=value")
    args = options.parse_intermixed_args()
    of = SETS[args.set]
    cut = args.cut or ("by source" if of.owner else "alike")
    place = args.out / f"{args.set}-{args.rows}"
    if place.exists():
        found = silotune.compare(resume=place).result
    else:
        table = recipe_of(of, args.rows, cut, args.out.resolve() / "rows" / args.set)
        table |= {"finish": {}}
        table["train"] |= {"lr": LR[args.set]}
        table["compare"] |= {
            "seeds": 5,
            "arms": {name: {"wire": ARMS[name]} for name in args.only},
        }
        table["compare"] |= {"tune": False}
        found = silotune.compare(parse(table), args.overrides, out=place).result
    print(
        "| codec | bytes up | " + " | ".join(f"{m} - float32" for m in (of.metric, "loss")) + " |"
    )
    print("|---|---|---|---|")
    plain = found["arms"]["federated"]["bytes_up"]
    for name in args.only:
        arm = f"federated: {name}"
        cells = [name, f"1/{plain / found['arms'][arm]['bytes_up']:.1f}"]
        for metric in (of.metric, "loss"):
            # "against" is float32 minus the codec
            own = found["overall"]["against"][metric][arm]
            cells.append(f"{-own['mean']:+.4f} ({-own['high']:+.4f} to {-own['low']:+.4f})")
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
