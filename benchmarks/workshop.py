"""The workshop's comparison without a hub: `python benchmarks/workshop.py [--seeds N] [key=value]`.

Reads the workshop's reference answers from ../shared next to the repository, if they are there. The
figures are comparable with the published ones only in direction, and always carry the note in
WORDS: another model, fewer rows, other questions.
"""

import argparse
import sys
from pathlib import Path

import silotune
from silotune.federation.progress_lines import PlainProgress
from silotune.workflows.compare.statistics import cost_table, difference_table, score_table
from silotune.workflows.compare.verdicts import comparison_verdict, worse_off_warnings

ROWS = Path(__file__).parents[2] / "shared" / "data" / "cardbiomed" / "five_hospitals.jsonl"
WORDS = "Instruct model, 4-bit-rounded base, reconstructed questions"
OVERRIDES = [
    "model.name=smollm2-135m-instruct",
    f"data.path={ROWS}",
    "data.split=train",
    "data.eval_split=none",
    "data.eval_fraction=0.4",  # 24 to 33 of 70 or 71 questions per hospital: enough for a verdict
    "data.label=none",  # the file has no reasoning_category
    f"report.note={WORDS}",
    "compare.max_new_tokens=64",  # answers here have 125 characters on average
]


def main() -> None:
    """Run the comparison and print the tables."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--out", type=Path)
    options.add_argument("--resume", type=Path)
    options.add_argument("overrides", nargs="*", metavar="key=value")
    args = options.parse_args()
    if not ROWS.is_file():
        sys.exit(f"skipped: {ROWS.name} is not next to this repository")
    progress = PlainProgress()
    if args.resume:
        done = silotune.compare(resume=args.resume, progress=progress)
    else:
        keys = [*OVERRIDES, f"compare.seeds={args.seeds}", *args.overrides]
        done = silotune.compare("workshop", keys, out=args.out, progress=progress)
    result = done.result
    print(f"seeds {result['seeds']}")
    for key in ("loss", "rougeL"):
        for table in (score_table(result, key), difference_table(result, key)):
            print()
            for row in table:
                print(" | ".join(row))
    print()
    for row in cost_table(result):
        print(" | ".join(row))
    print()
    said = [*comparison_verdict(result), *worse_off_warnings(result), *result["notes"]]
    print(*said, sep="\n")


if __name__ == "__main__":
    main()
