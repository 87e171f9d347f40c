"""The command before a run that shows its rows: data."""

from operator import attrgetter
from typing import TYPE_CHECKING, Annotated

import typer

from silotune.cli.frame import errors_as_exit_codes, print_json, print_table
from silotune.cli.run import Overrides, Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from silotune.workflows.preview import ClientPreview, Kind, Preview, Sample

BAR = 40
"""Characters of the longest bar."""
MAX_LABELS = 6
"""Labels with a column of their own."""
STYLES: "dict[Kind, str]" = {"read": "", "learned": "bold green", "cut": "dim strike"}
MARKS: "dict[Kind, tuple[str, str]]" = {"read": ("", ""), "learned": ("⟦", "⟧"), "cut": ("⟨", "⟩")}
"""In the place of colours, where there are none."""
LEGEND: "tuple[tuple[Kind, str], ...]" = (("learned", "learned"), ("read", " "), ("cut", "cut off"))


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(data)


def data(
    recipe: Recipe,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=0, help="Train rows to show as text.")] = 1,
    client: Annotated[
        str | None, typer.Option(help="Whose rows to show; without it, the first client's.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the numbers, and no row.")] = False,
) -> None:
    """Show a recipe's rows as the model reads them: split, lengths, cuts, duplicates, samples."""
    with errors_as_exit_codes():
        import silotune

        found = silotune.preview(recipe, overrides or (), num_samples=rows, client=client)
        if json:
            print_json(found.numbers())
            return
        _print_split(found)
        _print_lengths(found)
        _print_duplicates(found.clients)
        for sample in found.samples:
            _print_sample(sample, found.run.train.max_length)
        typer.echo()
        for text in found.warnings:
            typer.echo(f"warning: {text}")
        typer.echo("no mistakes found")


def _print_split(found: "Preview") -> None:
    server = f"; {found.num_server} rows of the server's own" if found.num_server else ""
    typer.echo(f"{len(found.clients)} client(s): {found.split}{server}")
    typer.echo("\nrows (█ train, ░ held out)\n")
    _print_bars(found.clients)
    if any(own.labels for own in found.clients.values()):
        typer.echo("\nlabels of the train rows\n")
        print_table(_label_table(found.clients))


def _print_bars(clients: "Mapping[str, ClientPreview]") -> None:
    from rich.cells import cell_len, set_cell_size

    from silotune.results.svg import short

    names = [short(name, 30) for name in clients]
    width = max(map(cell_len, names))
    most = max(own.num_train + own.num_eval for own in clients.values())
    for name, own in zip(names, clients.values(), strict=True):
        # what would be rounded to nothing gets a character
        train, held_out = (max(1, round(BAR * n / most)) for n in (own.num_train, own.num_eval))
        typer.echo(f"{set_cell_size(name, width)}  {'█' * train}{'░' * held_out}")


def _label_table(clients: "Mapping[str, ClientPreview]") -> "list[tuple[str, ...]]":
    """Header and rows: a client a line; the shares of the commonest labels."""
    from collections import Counter

    from silotune.results.svg import short

    total: Counter[str] = Counter()
    for own in clients.values():
        total.update(own.labels)
    named = [label for label, _ in total.most_common(MAX_LABELS)]
    others = (f"{len(total) - len(named)} others",) if len(total) > len(named) else ()
    lines = [("client", *(short(label, 20) for label in named), *others)]
    for name, own in clients.items():
        counts = [own.labels.get(label, 0) for label in named]
        if others:
            counts.append(own.num_train - sum(counts))
        lines.append((name, *(f"{n / own.num_train:.0%}" if n else "-" for n in counts)))
    return lines


def _print_lengths(found: "Preview") -> None:
    limit = found.run.train.max_length
    typer.echo(f"\nthe train rows in tokens, and what train.max_length = {limit} does to them\n")
    tokens = ("tokens: median", "95 %", "longest")
    lines: list[tuple[str, ...]] = [
        ("client", "train rows", "held-out rows", *tokens, "cut", "no answer left", "learned")
    ]
    for name, own in found.clients.items():
        part = own.train
        share = "-" if part.trained_share is None else f"{part.trained_share:.0%}"
        quantiles = (f"{part.tokens[key]:.0f}" for key in ("p50", "p95", "max"))
        counts = (str(own.num_train), str(own.num_eval))
        lines.append((name, *counts, *quantiles, str(part.num_cut), str(part.num_dropped), share))
    print_table(lines)


def _print_duplicates(clients: "Mapping[str, ClientPreview]") -> None:
    from silotune.workflows.preview import name_counts

    lines = {
        "train rows repeat one of the same client": "num_repeated",
        "train rows are someone else's train rows too": "num_elsewhere",
        "train rows have a question with another answer in another train row": "num_other_answer",
        "held-out rows are train rows too": "num_leaked",
        "of these are train rows of the same client": "num_leaked_own",
        "held-out rows have a question with another answer in a train row": (
            "num_eval_other_answer"
        ),
    }
    typer.echo("\nduplicates\n")
    for words, key in lines.items():
        count = attrgetter(f"duplicates.{key}")
        who = name_counts(clients, count)
        total = sum(map(count, clients.values()))
        typer.echo(f"{total:>5} {words}{f' ({who})' if who else ''}")


def _print_sample(sample: "Sample", max_length: int) -> None:
    cut = f", cut at {max_length}" if sample.num_tokens > max_length else ""
    typer.echo(f"\n{sample.client}, train row {sample.row}: {sample.num_tokens} tokens{cut}")
    _print_pieces(LEGEND if any(kind == "cut" for kind, _ in sample.pieces) else LEGEND[:1])
    _print_pieces(sample.pieces)


def _print_pieces(pieces: "Sequence[tuple[Kind, str]]") -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, markup=False)
    colourless = console.no_color or console.color_system is None  # no terminal has no colours
    line = Text()
    for kind, text in pieces:
        before, after = MARKS[kind] if colourless else ("", "")
        line.append(before + _visible(text) + after, style="" if colourless else STYLES[kind])
    console.print(line, soft_wrap=True)


def _visible(text: str) -> str:
    """A row's own control characters as codes: they must not steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
