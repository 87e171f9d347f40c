"""Write the tables of docs/papers.md that can be computed.

That of algorithms comes from what each algorithm says about itself, that of split learning from
shipped recipes and the published shapes of their models. Run it with `make docs`; a test compares
the page with it.
"""

import inspect
import tomllib
from dataclasses import dataclass
from pathlib import Path

from silotune.algorithms import ALGORITHMS
from silotune.recipes.parse import parse
from silotune.recipes.shipped import shipped_recipe

PAGE = Path(__file__).parent / "papers.md"
BEGIN = "<!-- Made by docs/build_papers.py from `facts` in each algorithm's file. -->\n"
END = "<!-- end -->\n"
HEAD = """\
| `algorithm.name` | paper | file | exact | sums suffice | mixed ranks | what differs |
|---|---|---|---|---|---|---|
"""

SPLIT_BEGIN = "<!-- Made by docs/build_papers.py from shipped recipes. -->\n"
SPLIT_END = "<!-- end of split -->\n"
SPLIT_HEAD = """\
| recipe | tokens a round, at most | LoRA, float32, both ways \
| one cut, 16 bits, both ways | of LoRA | trips a round | LoRA sends less from |
|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Shape:
    """A model's published sizes."""

    layers: int
    width: int
    values: int
    """Outputs of v_proj."""


SHAPES = {
    "hospitals": Shape(layers=30, width=576, values=192),
    "flowertune": Shape(layers=26, width=3200, values=3200),
    "flowertune-medical": Shape(layers=32, width=4096, values=1024),
}
"""From the config.json of the recipes' models."""


def split_row(name: str, shape: Shape) -> str:
    """What a client sends and receives in a round, by adapters and by activations."""
    run = parse(tomllib.loads(shipped_recipe(name).text))
    tokens = (run.train.local_steps or 0) * run.train.batch_size * run.train.max_length
    into_q, into_v = shape.width + shape.width, shape.width + shape.values
    adapter = 2 * 4 * shape.layers * run.adapter.rank * (into_q + into_v)
    per_token = 2 * 2 * shape.width  # the activation, and its gradient back
    return (
        f"| `{name}` | {tokens:,} | {adapter / 1e6:.1f} MB | {tokens * per_token / 1e6:.1f} MB "
        f"| {tokens * per_token / adapter:.1f} | 1 and {run.train.local_steps} "
        f"| {adapter / per_token:,.0f} tokens |\n"
    )


def build() -> str:
    """The page with its tables made again."""
    page = PAGE.read_text(encoding="utf-8")
    page = _put(page, BEGIN, END, HEAD + "".join(_algorithm_rows()))
    rows = [split_row(name, shape) for name, shape in SHAPES.items()]
    return _put(page, SPLIT_BEGIN, SPLIT_END, SPLIT_HEAD + "".join(rows))


def _put(page: str, begin: str, end: str, table: str) -> str:
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}{table}{end}{after}"


def _algorithm_rows() -> list[str]:
    rows: list[str] = []
    for name, (config, build) in ALGORITHMS.items():
        facts, file = config.facts, Path(inspect.getfile(build)).name
        sums, mixed = ("yes" if fact else "no" for fact in (facts.by_sums, facts.mixed_ranks))
        cells = f"{facts.paper} | `algorithms/{file}` | {facts.exact} | {sums} | {mixed} | "
        cells += facts.differs
        rows.append(f"| `{name}` | {cells} |\n")
    return rows


if __name__ == "__main__":
    PAGE.write_text(build(), encoding="utf-8")
