"""Claims of papers, tried: `python benchmarks/algorithms.py [--setting skewed] [--only fedex ...]`.

Runs `silotune compare` with one arm per algorithm on the question types of MedQuAD: nine institutes
as clients, or the same rows cut by type, or institutes with adapters of several ranks, or with
single rows protected by noise. Every arm, the federated average included, tries the same number of
settings on validation rows. Rows are read from ../shared next to the repository, if they are there.
An interrupted comparison goes on, a finished one is read again. Prints each algorithm minus the
federated average, and what that says of its claim; the papers are those of docs/papers.md.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from joining import DATA, TYPES, merged, recipe_of

import silotune
from silotune.recipes.parse import parse

Changes = Mapping[str, Any]
"""Sections of the recipe that make an arm."""
OWNERS = (
    "GARD",
    "GHR",
    "NIDDK",
    "NIHSeniorHealth",
    "NINDS",
    "CancerGov",
    "NHLBI",
    "MPlusHealthTopics",
    "CDC",
)
RANKS = dict(zip(OWNERS, (16, 8, 8, 4, 4, 2, 2, 1, 1), strict=True))
INSTITUTES = replace(
    TYPES,
    owners=OWNERS,
    cuts={
        "by source": {"by": "source"},
        "few types each": {
            "kind": "dirichlet",
            "alpha": 0.1,
            "label": "label_name",
            "num_clients": len(OWNERS),
        },
    },
    length={50: (5, 4)},
)


BETTER, AS_GOOD = "better", "as good"
"""What a paper says of its algorithm, beside the federated average of the factors."""
CLAIMS: dict[str, tuple[str, Changes]] = {
    "fedprox": (BETTER, {"algorithm": {"name": "fedprox", "mu": 0.1}}),
    **{
        name: (AS_GOOD if name == "fed_sb" else BETTER, {"algorithm": {"name": name}})
        for name in (
            "ffa_lora",
            "rolora",
            "fedsvd",
            "fed_sb",
            "fedex",
            "flora",
            "flexlora",
            "lora_fair",
            "fedrot",
            "fedsa_lora",
        )
    },
}
MIXED: dict[str, tuple[str, Changes]] = {
    name: (
        BETTER,
        {
            "algorithm": {"name": name},
            "adapter": {"rank": max(RANKS.values()), "alpha": 32, "ranks": RANKS},
        },
    )
    for name in ("hetlora", "flexlora", "flora")
}
PRIVATE: dict[str, tuple[str, Changes]] = {
    # the noise on two factors is multiplied, so one factor at a time is said to suffer less
    name: (BETTER, {"algorithm": {"name": name}})
    for name in ("ffa_lora", "rolora", "fedsvd", "fed_sb")
}


@dataclass(frozen=True)
class Setting:
    """How rows are cut, and the rank of the federated average that claims are held against."""

    cut: str
    rank: int
    claims: Mapping[str, tuple[str, Changes]]
    more: Changes = field(default_factory=dict)
    """Sections of the recipe of all arms."""


SETTINGS = {
    "institutes": Setting("by source", 4, CLAIMS),
    "skewed": Setting("few types each", 4, CLAIMS),
    # the federated average needs one rank: the one that the weakest client can train
    "ranks": Setting("by source", 1, MIXED),
    "private": Setting(
        "by source",
        4,
        PRIVATE,
        # seeded noise protects nobody: the rows are public, and a comparison must be repeatable
        {"privacy": {"unit": "record", "target_epsilon": 8, "delta": 1e-3, "noise": "seeded"}},
    ),
}


def main() -> None:
    """Compare what has not been compared, then print the verdicts."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--setting", choices=SETTINGS, default="institutes")
    options.add_argument("--only", nargs="+", metavar="ALGORITHM")
    options.add_argument("--out", type=Path, default=Path("runs/algorithms"))
    options.add_argument("overrides", nargs="*", metavar="key=value")
    args = options.parse_intermixed_args()
    if not (DATA / TYPES.train).is_file():
        sys.exit(f"skipped: {TYPES.train} is not next to this repository")
    setting = SETTINGS[args.setting]
    claims = {n: c for n, c in setting.claims.items() if n in (args.only or setting.claims)}
    place = args.out / args.setting
    if place.exists():
        found = silotune.compare(resume=place).result
    else:
        recipe = parse(recipe_with(setting, claims, args.out.resolve() / "rows"))
        found = silotune.compare(recipe, args.overrides, out=place).result
    print("\n".join(table(found, claims)))


def recipe_with(
    setting: Setting, claims: Mapping[str, tuple[str, Changes]], place: Path
) -> dict[str, Any]:
    """The comparison's recipe: the federated average, and an arm per claim."""
    own: dict[str, Any] = {
        **setting.more,
        "adapter": {"rank": setting.rank, "alpha": 2 * setting.rank},
        "compare": {
            "seeds": 5,
            "tune": {"lr": [1e-2, 4e-2], "server_lr": [1.0, 3.0]},
            "arms": {name: dict(changes) for name, (_, changes) in claims.items()},
        },
    }
    found = merged(recipe_of(INSTITUTES, 50, setting.cut, place), own)
    return {key: value for key, value in found.items() if key != "finish"}


def table(found: Mapping[str, Any], claims: Mapping[str, tuple[str, Changes]]) -> Iterator[str]:
    """Each algorithm minus the federated average, with the verdict on its claim by accuracy."""
    means = found["overall"]["scores"]
    yield "| algorithm | said to be | accuracy | minus fedavg | loss | minus fedavg | verdict |"
    yield "|---|---|---|---|---|---|---|"
    average = [f"{means[metric]['federated']['mean']:.3f}" for metric in ("accuracy", "loss")]
    yield f"| `fedavg` | | {average[0]} | | {average[1]} | | |"
    for name, (said, _) in claims.items():
        arm = f"federated: {name}"
        cells = [f"`{name}`", said]
        for metric in ("accuracy", "loss"):
            # "against" is the recipe itself minus the arm
            own = found["overall"]["against"][metric][arm]
            cells.append(f"{means[metric][arm]['mean']:.3f}")
            cells.append(f"{-own['mean']:+.3f} ({-own['high']:+.3f} to {-own['low']:+.3f})")
        accuracy = found["overall"]["against"]["accuracy"][arm]
        cells.append(verdict(-accuracy["high"], -accuracy["low"], said))
        yield "| " + " | ".join(cells) + " |"


def verdict(low: float, high: float, said: str) -> str:
    """What an interval of differences in accuracy says of a claim; as good is within a point."""
    if high < 0:
        return "reversed"
    return "confirmed" if low > (0 if said == BETTER else -0.01) else "null"


if __name__ == "__main__":
    main()
