"""Feed silotune malformed input of nine kinds, and count how each case ends.

    python -m tests.fuzz [--per-kind 160] [--seed 1] [--kinds rows kit ...]

Prints a table and every fault; a line per case goes to build/fuzz-SEED.jsonl. The exit status is 1
if a case ended in a traceback, hung, died, or used damaged state in silence.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path
from random import Random

from tests.fuzz.isolation import ENDS, FAULTS, Outcome, run_case

Found = list[tuple[str, str, Outcome]]
"""(kind, what was done, how it ended) of every case."""


def fuzz(
    place: Path,
    *,
    seed: int,
    per_kind: int,
    kinds: list[str] | None = None,
    limit_s: float = 60.0,
    memory_gb: float = 6.0,
    log: Path | None = None,
) -> Found:
    """Run `per_kind` cases of each kind.

    Args:
        place: A new folder for what the cases read and write.
        seed: Every damage follows from it, from its kind and its number; keys in kits are fresh.
        per_kind: Number of cases of a kind.
        kinds: Which kinds; by default all.
        limit_s: Seconds after which a case counts as hanging.
        memory_gb: Address space of a case.
        log: Gets a line of JSON for each case.
    """
    from tests.fuzz.cases import KINDS, Assets

    assets, found = Assets(place), Found()
    for kind in kinds or list(KINDS):
        for number in range(per_kind):
            draw = Random(zlib.crc32(f"{seed} {kind} {number}".encode()))
            case = KINDS[kind](assets, draw)
            outcome = run_case(case.use, limit_s=limit_s, memory_gb=memory_gb)
            found.append((kind, case.what, outcome))
            if log is not None:
                line = {"kind": kind, "number": number, "what": case.what, **asdict(outcome)}
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            shutil.rmtree(place / "cases", ignore_errors=True)
    return found


def faults(found: Found) -> list[str]:
    """The faults, most frequent first, each with the inputs that show it."""
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for kind, what, outcome in found:
        if outcome.end in FAULTS:
            said = outcome.said.splitlines()[0] if outcome.said else ""
            groups[kind, outcome.end, outcome.where, said[:100]].append(what)
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    return [
        f"{len(whats)} x {' | '.join(filter(None, about))}\n    for example {whats[:3]}"
        for about, whats in ordered
    ]


def table(found: Found) -> str:
    """How many cases of each kind ended how, as Markdown."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, _, outcome in found:
        counts[kind][outcome.end] += 1
        counts["all"][outcome.end] += 1
    counts["all"] = counts.pop("all")
    lines = [f"| kind | {' | '.join(ENDS)} |", "|---" * (len(ENDS) + 1) + "|"]
    for kind, own in counts.items():
        lines.append(f"| {kind} | {' | '.join(str(own[end]) for end in ENDS)} |")
    return "\n".join(lines)


def main() -> int:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--per-kind", type=int, default=160)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--kinds", nargs="+")
    options.add_argument("--limit-s", type=float, default=60.0)
    given = options.parse_args()
    import torch

    torch.set_num_threads(1)
    log = Path("build") / f"fuzz-{given.seed}.jsonl"
    log.parent.mkdir(exist_ok=True)
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        found = fuzz(
            Path(scratch) / "fuzz",
            seed=given.seed,
            per_kind=given.per_kind,
            kinds=given.kinds,
            limit_s=given.limit_s,
            log=log,
        )
    wrong = faults(found)
    sys.stdout.write("\n".join([table(found), "", *wrong, f"{len(wrong)} kinds of fault", ""]))
    return 1 if wrong else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    sys.exit(main())
