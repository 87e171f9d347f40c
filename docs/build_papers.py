"""Write the table of algorithms in docs/papers.md from what each algorithm says about itself.

Run it with `make docs`; a test compares the page with it.
"""

import inspect
from pathlib import Path

from silotune.algorithms import ALGORITHMS

PAGE = Path(__file__).parent / "papers.md"
BEGIN = "<!-- Made by docs/build_papers.py from `facts` in each algorithm's file. -->\n"
END = "<!-- end -->\n"
HEAD = """\
| `algorithm.name` | paper | file | exact | sums suffice | mixed ranks | what differs |
|---|---|---|---|---|---|---|
"""


def build() -> str:
    """The page with its table made again."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    rows: list[str] = []
    for name, (config, build) in ALGORITHMS.items():
        facts, file = config.facts, Path(inspect.getfile(build)).name
        sums, mixed = ("yes" if fact else "no" for fact in (facts.by_sums, facts.mixed_ranks))
        cells = f"{facts.paper} | `algorithms/{file}` | {facts.exact} | {sums} | {mixed} | "
        cells += facts.differs
        rows.append(f"| `{name}` | {cells} |\n")
    return f"{before}{BEGIN}{HEAD}{''.join(rows)}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(build(), encoding="utf-8")
