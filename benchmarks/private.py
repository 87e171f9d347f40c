"""What privacy costs in accuracy: `python benchmarks/private.py [--resume] [--sums] [--out DIR]`.

Trains on the question types of MedQuAD (read from ../shared next to the repository if they are
there) with MiniLM of 6 layers: 9 clients by source and 20 alike; epsilon 1, 3, 8 and no privacy;
single rows and whole clients; FedAvg on both factors and FFA-LoRA; three seeds, the same for all.
It runs two sweeps, which --resume continues, and then prints the table and draws a plot of it.
With --sums, single rows are also trained with secure sums, at the same noise, in the arms of a
sweep of its own; what the sums guarantee, `silotune check` says of the same keys without a seed.
--algorithms and --epsilons run some of them only.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import silotune
from silotune.federation.progress_lines import PlainProgress
from silotune.recipes.parse import parse
from silotune.results.charts import MARKERS, PALETTE
from silotune.results.svg import Legend, chart

if TYPE_CHECKING:
    from collections.abc import Iterable

    from matplotlib.axes import Axes

DATA = Path(__file__).parents[2] / "shared" / "data" / "medquad_types"
SEEDS, EPSILONS = (17, 18, 19), (1, 3, 8)
ALGORITHMS = ("fedavg", "ffa_lora")
PARTITIONS: dict[str, dict[str, Any]] = {
    "9 clients by source": {"by": "source"},
    "20 clients alike": {"kind": "iid", "num_clients": 20},
}
SHORT = {
    "9 clients by source": "by source",
    "20 clients alike": "alike",
    "record": "rows",
    "client": "clients",
    "fedavg": "FedAvg",
    "ffa_lora": "FFA",
}
Arm = tuple[tuple[str, str, str], str]
"""A unit, an algorithm and an epsilon, and the keys of the run."""
NAMESPACE = "http://www.w3.org/2000/svg"
RECIPE: dict[str, Any] = {
    "rounds": 4,
    "task": "classify",
    "model": {"name": "minilm-l6"},
    # the values of the last layer: few numbers to noise, and hardly any backward pass
    "adapter": {
        "rank": 8,
        "alpha": 64,
        "targets": ["value"],
        "peft": {"layers_to_transform": [5]},
    },
    "data": {"text": "text", "label": "label_name"},
    "train": {"batch_size": 8, "lr": 5e-3, "max_length": 32},
    "algorithm": {"weights": "uniform"},
    "evaluate": {"every": 4, "batch_size": 64},
    "report": {"page": False, "samples": 0},
}
PRIVATE = "privacy.delta=1e-3 privacy.noise=seeded"
UNITS = {
    # SGD, because AdamW did not learn under noise. One step per round, because with sixteen each
    # client drifted off with its own noise before a mean removed most of it (docs/experiments.md).
    "record": (
        "privacy.unit=record privacy.clip_norm=0.3 train.optimizer=sgd train.lr=5 "
        "rounds=64 train.local_steps=1 evaluate.every=64"
    ),
    "client": "privacy.unit=client privacy.clip_norm=1.0",
}


def main() -> None:
    """Train what is missing, then print and plot the results."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, default=Path("runs/private"))
    options.add_argument("--resume", action="store_true")
    options.add_argument("--jobs", type=int, default=1)
    options.add_argument("--sums", action="store_true", help="only rows, with secure sums")
    options.add_argument("--epsilons", type=int, nargs="+", choices=EPSILONS, default=EPSILONS)
    options.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=ALGORITHMS)
    options.add_argument("overrides", nargs="*", metavar="key=value")
    args = options.parse_intermixed_args()
    if not DATA.is_dir():
        sys.exit("skipped: medquad_types is not next to this repository")
    scores: dict[str, dict[tuple[str, str, str], list[float]]] = {}
    for n, (name, cut) in enumerate(PARTITIONS.items()):
        arms = all_arms(args.algorithms, args.epsilons)
        arms = with_sums(arms) if args.sums else arms
        place = args.out / (f"sums-{n}" if args.sums else f"part-{n}")
        if args.resume and place.exists():
            done = silotune.sweep(resume=place, jobs=args.jobs, progress=PlainProgress())
        else:
            files = {"path": str(DATA / "train.jsonl"), "eval_path": str(DATA / "dev.jsonl")}
            recipe = {**RECIPE, "data": {**RECIPE["data"], **files}, "partition": cut}
            done = silotune.sweep(
                parse(recipe),
                args.overrides,
                runs=[keys for _, keys in arms],
                jobs=args.jobs,
                out=place,
                progress=PlainProgress(),
            )
        scores[name] = accuracies(done, [arm for arm, _ in arms])
        print_table(name, scores[name])
    if args.sums or (tuple(args.algorithms), tuple(args.epsilons)) != (ALGORITHMS, EPSILONS):
        return  # the plot shows all arms
    (args.out / "privacy.svg").write_text(draw(scores), encoding="utf-8")


def all_arms(algorithms: "Iterable[str]", epsilons: "Iterable[int]") -> list[Arm]:
    """Every run as (unit, algorithm, epsilon), with its keys."""
    found: list[Arm] = []
    for seed in SEEDS:
        for algorithm in algorithms:
            keys = f"seed={seed} algorithm.name={algorithm} algorithm.weights=uniform"
            found.append((("none", algorithm, "inf"), keys))
            for unit, own in UNITS.items():
                for epsilon in epsilons:
                    noise = f"{PRIVATE} {own} privacy.target_epsilon={epsilon}"
                    found.append(((unit, algorithm, str(epsilon)), f"{keys} {noise}"))
    return found


def with_sums(arms: "Iterable[Arm]") -> list[Arm]:
    """The arms of single rows, with the same noise and words that are summed in fixed point."""
    sums = "secure_sum.kind=masks secure_sum.simulate=true secure_sum.range=256"
    return [(arm, f"{keys} {sums}") for arm, keys in arms if arm[0] == "record"]


def accuracies(
    done: silotune.Sweep, arms: "list[tuple[str, str, str]]"
) -> "dict[tuple[str, str, str], list[float]]":
    """Accuracy over all held-out rows by arm, one value per seed."""
    found: dict[tuple[str, str, str], list[float]] = {}
    by_number = {own["number"]: own for own in done.result["runs"]}
    for number, arm in enumerate(arms, start=1):
        run = silotune.Run(done.path / by_number[number]["path"])
        right = run.summary["scores"]["overall"]["federated"]["accuracy"]
        found.setdefault(arm, []).append(right)
    return found


def print_table(name: str, scores: "dict[tuple[str, str, str], list[float]]") -> None:
    """Print means and ranges over the seeds, and FFA-LoRA minus FedAvg, paired by seed."""
    algorithms = list(dict.fromkeys(algorithm for _, algorithm, _ in scores))
    print(f"\n{name}: accuracy, mean (minimum to maximum of {len(SEEDS)} seeds)")
    for unit, epsilon in dict.fromkeys((unit, epsilon) for unit, _, epsilon in scores):
        cells = [f"{unit}, epsilon {epsilon}"]
        shown = [scores[unit, algorithm, epsilon] for algorithm in algorithms]
        for own in shown:
            cells.append(f"{statistics.fmean(own):.3f} ({min(own):.3f} to {max(own):.3f})")
        if len(shown) > 1:
            apart = [b - a for a, b in zip(*shown, strict=True)]
            cells.append(f"{statistics.fmean(apart):+.3f} ({min(apart):+.3f} to {max(apart):+.3f})")
        print(" | ".join(cells))


def draw(scores: "dict[str, dict[tuple[str, str, str], list[float]]]") -> str:
    """Plot mean accuracy by epsilon, one line per federation, unit and algorithm."""

    def lines(ax: "Axes") -> Legend:
        shown: Legend = {}
        ticks = [*map(str, EPSILONS), "inf"]
        looks = iter(zip(PALETTE, MARKERS, strict=False))
        for name, own in scores.items():
            for unit in UNITS:
                for algorithm in ALGORITHMS:
                    arms = [(unit, algorithm, str(e)) for e in EPSILONS]
                    arms.append(("none", algorithm, "inf"))
                    heights = [statistics.fmean(own[arm]) for arm in arms]
                    color, marker = next(looks)
                    (line,) = ax.plot(range(len(ticks)), heights, color=color, marker=marker)
                    texts = (SHORT[name], SHORT[unit], SHORT[algorithm])
                    shown[", ".join(texts)] = line
        ax.set(xlabel="epsilon (inf: no privacy)", ylabel="accuracy")
        ax.set_xticks(range(len(ticks)), ticks)
        return shown

    svg = chart("Accuracy by epsilon, unit and algorithm", 260, lines)
    # a separate file needs the namespace and background that a chart in a page inherits
    return svg.replace("<svg ", f'<svg xmlns="{NAMESPACE}" style="background: white" ', 1)


if __name__ == "__main__":
    main()
