"""The distillation experiment without a hub: `python benchmarks/glue.py cola [key=value]`.

Compares six arms on CoLA, SST-2 or the question types of MedQuAD, which are read from ../shared
next to the repository if they are there. Teacher and student are MiniLM with 6 and 3 layers, with
real weights and the same tokenizer. minilm_l3.py converts the student, which needs
`pip install onnx` once.
"""

import argparse
import json
import sys
from pathlib import Path

from minilm_l3 import build_student

import silotune
from silotune.federation.progress_lines import PlainProgress
from silotune.workflows.compare.statistics import (
    against_table,
    cost_table,
    difference_table,
    score_table,
)
from silotune.workflows.compare.verdicts import comparison_verdict, worse_off_warnings

DATA = Path(__file__).parents[2] / "shared" / "data"
WORDS = "MiniLM of 6 and 3 layers in place of BERT and DistilBERT"
SETS = {
    # recipe, train file, held-out file, and what else differs from the recipe
    "cola": ("glue-cola", "cola/train.jsonl", "cola/dev_part.jsonl", []),
    "sst2": ("glue-sst2", "sst2/train.jsonl", "sst2/dev.jsonl", []),
    "medquad_types": (
        "glue-cola",
        "medquad_types/train.jsonl",
        "medquad_types/dev.jsonl",
        ["data.text=text", "data.label=label_name", "data.labels=none"],
    ),
}


def main() -> None:
    """Run the comparison and print the tables."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("set", choices=SETS)
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--student", type=Path, default=Path("runs/minilm-l3"))
    options.add_argument("--out", type=Path)
    options.add_argument("--resume", type=Path)
    options.add_argument("overrides", nargs="*", metavar="key=value")
    args = options.parse_intermixed_args()
    recipe, train, held_out, more = SETS[args.set]
    if not (DATA / train).is_file():
        sys.exit(f"skipped: {train} is not next to this repository")
    progress = PlainProgress()
    if args.resume:
        done = silotune.compare(resume=args.resume, progress=progress)
    else:
        keys = [
            f"model.name={build_student(args.student)}",
            "distill.teacher=minilm-l6",
            f"data.path={DATA / train}",
            f"data.eval_path={DATA / held_out}",
            "data.name=none",
            "data.split=none",
            "data.eval_split=none",
            f"report.note={WORDS}",
            f"compare.seeds={args.seeds}",
            *more,
            *args.overrides,
        ]
        done = silotune.compare(recipe, keys, out=args.out, progress=progress)
    result = done.result
    print(f"seeds {result['seeds']}")
    for key in result["metrics"]:
        for make in (score_table, difference_table, against_table):
            table = make(result, key)
            print(f"\n{key}")
            for row in table:
                print(" | ".join(row))
    print()
    for row in cost_table(result):
        print(" | ".join(row))
    history = json.loads((done.path / "results.json").read_text(encoding="utf-8"))["history"]
    for arm, by_seed in history.items():
        print(f"\n{arm}: round, loss, accuracy, macro F1, Matthews; the first seed")
        for row in next(iter(by_seed.values())):
            print("  " + "  ".join(f"{value:.4g}" for value in row.values()))
    print()
    said = [*comparison_verdict(result), *worse_off_warnings(result), *result["notes"]]
    print(*said, sep="\n")


if __name__ == "__main__":
    main()
