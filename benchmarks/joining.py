"""When joining pays: `python benchmarks/joining.py [--set types] [--rows 20 50] [--out DIR]`.

Runs `silotune compare`, tuned as it is shipped, for the same rows cut into clients in several ways
and for several numbers of rows per client. Clients choose among alone, federated and steps of their
own. Rows are read from ../shared next to the repository if they are there. Finished cells are read
again, interrupted ones go on. Prints a table, and writes it and a figure into the folder.
"""

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import silotune
from silotune.recipes.parse import parse
from silotune.results.charts import MARKERS, PALETTE
from silotune.results.svg import Legend, chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DATA = Path(__file__).parents[2] / "shared" / "data"
NAMESPACE = "http://www.w3.org/2000/svg"
Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Rows of several owners, how they can be cut into clients, and what is trained on them."""

    train: str
    held_out: str
    """Absent, each client holds out a fifth of its rows."""
    owner: str
    """Column that says whose a row is; empty: nobody's, and only cut alike."""
    owners: tuple[str | int, ...]
    cuts: Mapping[str, Mapping[str, Any]]
    length: Mapping[int, tuple[int, int]]
    """Rounds, and steps of a client in each, by its number of rows."""
    recipe: Mapping[str, Any]
    metric: str
    sign: int
    """1 if more is better."""


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of a recipe over sections; the last value of a key counts."""
    found: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
            found[key] = merged(found[key], value) if both else value
    return found


TYPES = Rows(
    train="medquad_types/train.jsonl",
    held_out="medquad_types/dev.jsonl",
    owner="source",
    owners=("GARD", "GHR", "NIDDK", "NIHSeniorHealth"),
    cuts={
        "alike": {"kind": "iid", "num_clients": 4},
        "by source": {"by": "source"},
        "few types each": {
            "kind": "dirichlet",
            "alpha": 0.1,
            "label": "label_name",
            "num_clients": 4,
        },
    },
    length={20: (12, 2), 50: (8, 5), 120: (4, 12), 500: (4, 12)},
    recipe={
        "task": "classify",
        "model": {"name": "minilm-l6"},
        # the last layer: hardly any backward pass
        "adapter": {
            "rank": 8,
            "alpha": 16,
            "targets": ["query", "value"],
            "peft": {"layers_to_transform": [5]},
        },
        "data": {"text": "text", "label": "label_name"},
        "train": {"max_length": 32},
        "compare": {"group": "focus", "tune": {"lr": [5e-3, 2e-2, 8e-2], "server_lr": [1.0, 3.0]}},
    },
    metric="accuracy",
    sign=1,
)
ANSWERS: dict[str, Any] = {
    "model": {"name": "smollm2-135m-instruct"},
    "adapter": {"rank": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]},
    "train": {"batch_size": 4},
    "data": {"validation_fraction": 0.1},
    "compare": {"tune": {"lr": [1e-3, 3e-3, 1e-2], "server_lr": [1.0, 3.0]}},
}
"""Generated answers: a training takes minutes on a laptop's processor, so it is a short one."""
SENTIMENT = Rows(
    train="sst2/train.jsonl",
    held_out="sst2/dev.jsonl",
    owner="",
    owners=(1, 2, 3, 4),
    cuts={"alike": {"kind": "iid", "num_clients": 4}},
    length={20: (12, 2), 50: (8, 5), 120: (4, 12)},
    recipe=merged(
        TYPES.recipe,
        {"data": {"text": "sentence", "label": "label"}, "compare": {"group": None}},
    ),
    metric="accuracy",
    sign=1,
)
INSTITUTES = Rows(
    train="medquad_mini/train.jsonl",
    held_out="medquad_mini/eval.jsonl",
    owner="source",
    owners=("GARD", "GHR", "NIDDK", "NINDS"),
    cuts={"alike": {"kind": "iid", "num_clients": 4}, "by source": {"by": "source"}},
    length={20: (5, 2), 50: (10, 2)},
    recipe=merged(ANSWERS, {"compare": {"group": "focus"}}),
    metric="loss",
    sign=-1,
)
HOSPITALS = Rows(
    train="cardbiomed/five_hospitals.jsonl",
    held_out="",
    owner="hospital",
    owners=(1, 2, 3, 4, 5),
    cuts={"alike": {"kind": "iid", "num_clients": 5}, "by hospital": {"by": "hospital"}},
    length={20: (5, 2), 70: (10, 2)},
    recipe=ANSWERS,
    metric="loss",
    sign=-1,
)
ALPACA = Rows(
    train="alpaca_en/train.jsonl",
    held_out="",
    owner="",
    owners=(1, 2, 3, 4),
    cuts={"alike": {"kind": "iid", "num_clients": 4}},
    length={20: (5, 2), 50: (10, 2)},
    recipe=merged(
        ANSWERS,
        {
            "data": {"prompt": "{instruction}\n{input}", "completion": "{output}"},
            "train": {"max_length": 128},
        },
    ),
    metric="loss",
    sign=-1,
)
SETS = {
    "types": TYPES,
    "sentiment": SENTIMENT,
    "institutes": INSTITUTES,
    "hospitals": HOSPITALS,
    "alpaca": ALPACA,
}
COMMON: dict[str, Any] = {
    "train": {"batch_size": 8, "schedule": "cosine"},
    "data": {"validation_fraction": 0.2},
    "compare": {"seeds": 3, "centralized": False, "every": 2},
    "evaluate": {"batch_size": 64},
    "finish": {"interpolate": [0.0, 0.5, 1.0]},
    "report": {"page": False, "samples": 0},
}


def main() -> None:
    """Compare what is missing, then print and draw everything."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--set", choices=SETS, default="types")
    options.add_argument("--rows", type=int, nargs="+")
    options.add_argument("--cuts", nargs="+")
    options.add_argument("--out", type=Path, default=Path("runs/joining"))
    options.add_argument("--jobs", type=int, default=1)
    options.add_argument("--finished", action="store_true", help="train nothing, show what is done")
    options.add_argument("overrides", nargs="*", metavar="key=value")
    args = options.parse_intermixed_args()
    of = SETS[args.set]
    if not (DATA / of.train).is_file():
        sys.exit(f"skipped: {of.train} is not next to this repository")
    place = (args.out / args.set).resolve()
    cells = [
        (n, cut) for n in args.rows or of.length for cut in of.cuts if cut in (args.cuts or of.cuts)
    ]
    if args.finished:
        cells = [cell for cell in cells if (_folder(place, *cell) / "comparison.json").is_file()]
    # one thread each: two processes that wait for each other's threads take ten times as long
    keys = [*args.overrides, *(["runtime.threads=1"] if args.jobs > 1 else [])]
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        found = list(pool.map(partial(_cell, args.set, place, keys), cells))
    table = "\n".join(
        line for m in dict.fromkeys((of.metric, "loss")) for line in _table(of, found, m)
    )
    print(table)
    (place / "table.md").write_text(table + "\n", encoding="utf-8")
    (place / "joining.svg").write_text(_draw(of, found), encoding="utf-8")


Cell = dict[str, Any]
"""cut, rows, difference between clients, and the comparison's result."""


def _folder(place: Path, n: int, cut: str) -> Path:
    return place / f"{n}-{cut.replace(' ', '-')}"


def _cell(name: str, place: Path, overrides: Sequence[str], of_cell: tuple[int, str]) -> Cell:
    n, cut = of_cell
    of = SETS[name]
    own = _folder(place, n, cut)
    if (own / "comparison.json").is_file():
        result = json.loads((own / "comparison.json").read_text(encoding="utf-8"))
    elif own.exists():
        result = silotune.compare(resume=own).result
    else:
        recipe = parse(recipe_of(of, n, cut, place))
        result = silotune.compare(recipe, overrides, out=own).result
    print(f"{cut}, {n} rows per client: done", flush=True)
    return {"cut": cut, "rows": n, "result": result}


def recipe_of(of: Rows, n: int, cut: str, place: Path) -> dict[str, Any]:
    """The recipe of one cell, whose rows are written into a folder."""
    rounds, steps = of.length[n]
    own = {
        "rounds": rounds,
        "data": _write_rows(of, place, n),
        "partition": dict(of.cuts[cut]),
        "train": {"local_steps": steps},
        "finish": {"local_steps": steps},
    }
    return merged(COMMON, of.recipe, own)


def _write_rows(of: Rows, place: Path, n: int) -> dict[str, str]:
    """Paths of at most n rows of every owner; fewer rows are always among more rows."""
    place.mkdir(parents=True, exist_ok=True)
    kept: list[Row] = []
    rows = sorted(read_rows(of.train), key=_place)
    if not of.owner:
        kept = rows[: n * len(of.owners)]
    for owner in of.owners if of.owner else ():
        kept += [row for row in rows if row[of.owner] == owner][:n]
    paths = {"path": place / f"rows-{n}.jsonl"}
    write_rows(paths["path"], kept)
    if of.held_out:
        paths["eval_path"] = place / "held-out.jsonl"
        held = [r for r in read_rows(of.held_out) if not of.owner or r[of.owner] in of.owners]
        write_rows(paths["eval_path"], held)
    return {key: str(path) for key, path in paths.items()}


def read_rows(name: str) -> "list[Row]":
    """Rows of a file of the data beside the repository."""
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: "list[Row]") -> None:
    """Write JSON lines, whole or not at all."""
    # written beside and renamed, because another cell may be reading it
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)


def _place(row: Row) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()


def _table(of: Rows, found: "list[Cell]", metric: str) -> Iterator[str]:
    yield f"\n{metric}, mean over {len(of.owners)} clients:\n"
    heads = ("clients", "difference", "rows per client", "base", "alone", "federated")
    more = ("federated - alone", "both + own steps", "best - best alone", "gained", "lost")
    yield "| " + " | ".join((*heads, *more)) + " |"
    yield "|---" * (len(heads) + len(more)) + "|"
    for cell in found:
        result = cell["result"]
        means = result["overall"]["scores"][metric]
        words = Counter(own["verdicts"][metric]["federated"] for own in result["clients"].values())
        apart = _difference(result["split"])
        cells = [cell["cut"], "" if apart is None else f"{apart:.2f}", str(cell["rows"])]
        cells += [f"{means[arm]['mean']:.3f}" for arm in ("base", "local", "federated")]
        cells += [_interval(own) for own in _gains(result, metric).values()]
        cells += [str(words[word]) for word in ("gained", "lost")]
        yield "| " + " | ".join(cells) + " |"


def _interval(own: Mapping[str, float | None]) -> str:
    low, high = own["low"], own["high"]
    if low is None or high is None:  # a client holds out a single row
        return f"{own['mean']:+.3f} (no interval)"
    return f"{own['mean']:+.3f} ({low:+.3f} to {high:+.3f})"


def _gains(result: Mapping[str, Any], metric: str) -> "dict[str, dict[str, float]]":
    """Federated minus alone, the same after own steps, and what everyone gains if it may choose."""
    own = result["overall"]["differences"][metric]
    best = result["best"]["overall"]["differences"][metric]["best"]
    return {
        "federated": own["federated"],
        "own steps": own["federated + own steps"],
        "best": best,
    }


def _difference(split: Mapping[str, Any]) -> float | None:
    """Mean over rows of the total variation between a client's labels and everyone's: 0 to 1."""
    if not all(own["labels"] for own in split.values()):
        return None  # generated answers
    everyone: Counter[str] = Counter()
    for own in split.values():
        everyone.update(own["labels"])
    total = everyone.total()
    return sum(
        abs(own["labels"].get(label, 0) - everyone[label] * own["num_train"] / total) / 2 / total
        for own in split.values()
        for label in everyone
    )


def _draw(of: Rows, found: "list[Cell]") -> str:
    """Gain over the tuned lone client by rows per client, one line per cut."""

    def lines(ax: "Axes") -> Legend:
        shown: Legend = {}
        ax.axhline(0, linewidth=0.8, color=PALETTE[-1])
        for n, cut in enumerate(of.cuts):
            gain_of = [
                (cell["rows"], gain)
                for cell in found
                if cell["cut"] == cut
                and (gain := _gains(cell["result"], of.metric)["federated"])["high"] is not None
            ]
            gains = [gain for _, gain in gain_of]
            # a little apart, so that no interval hides another
            places = [rows * (1 + 0.04 * n) for rows, _ in gain_of]
            means = [of.sign * gain["mean"] for gain in gains]
            reach = [abs(gain["high"] - gain["low"]) / 2 for gain in gains]
            drawn = ax.errorbar(
                places, means, yerr=reach, color=PALETTE[n], marker=MARKERS[n], capsize=2
            )
            shown[cut] = drawn.lines[0]
        ax.set(xscale="log", xlabel="rows per client", ylabel=f"gain in {of.metric}")
        sizes = sorted({cell["rows"] for cell in found})
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.minorticks_off()
        return shown

    svg = chart("Federated minus alone, both tuned", 260, lines)
    # a separate file needs the namespace and background that a chart in a page inherits
    return svg.replace("<svg ", f'<svg xmlns="{NAMESPACE}" style="background: white" ', 1)


if __name__ == "__main__":
    main()
