"""What commands print before a run: its rows as the model reads them, and what it would cost."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from silotune.cli.frame import print_line
from silotune.cli.tables import print_table
from silotune.core.safe_text import visible
from silotune.core.wording import counted, human_bytes, human_seconds

if TYPE_CHECKING:
    import silotune
    from silotune.workflows.plan.fit import Prediction
    from silotune.workflows.preview import ClientPreview, Kind, Preview, Sample

BAR = 40
"""Length of the longest bar, in characters."""
MAX_CLIENTS = 40
"""Number of clients that get a line."""
MAX_LABELS = 6
"""Number of labels that get a column."""
STYLES: "dict[Kind, str]" = {
    "read": "",
    "learned": "bold green",
    "rejected": "bold red",
    "cut": "dim strike",
}
MARKS: "dict[Kind, tuple[str, str]]" = {
    "read": ("", ""),
    "learned": ("⟦", "⟧"),
    "rejected": ("⟪", "⟫"),
    "cut": ("⟨", "⟩"),
}
"""Used instead of colours if there are none."""
LEGEND: "dict[Kind, str]" = {
    "learned": "learned",
    "rejected": "made less likely",
    "cut": "cut off",
}
"""What every kind of text but the one that is only read is called."""
DUPLICATES = (
    (
        "num_repeated",
        "train row repeats an earlier one of the same client",
        "train rows repeat an earlier one of the same client",
    ),
    (
        "num_elsewhere",
        "train row is also a train row elsewhere",
        "train rows are also train rows elsewhere",
    ),
    (
        "num_other_answer",
        "train row has a question that another train row answers differently",
        "train rows have a question that another train row answers differently",
    ),
    ("num_leaked", "held-out row is also a train row", "held-out rows are also train rows"),
    (
        "num_leaked_own",
        "of these is a train row of the same client",
        "of these are train rows of the same client",
    ),
    (
        "num_eval_other_answer",
        "held-out row has a question that a train row answers differently",
        "held-out rows have a question that a train row answers differently",
    ),
)
"""A field of `Duplicates`, and what a count of it means: for one row, and for other numbers."""


# --- rows -----------------------------------------------------------------------------------------


def print_preview(found: "Preview") -> None:
    """Print split, lengths, duplicates and samples, and what may be surprising."""
    shown = _shown(found.clients)
    _print_split(found, shown)
    _print_lengths(found, shown)
    _print_duplicates(found.clients)
    for sample in found.samples:
        _print_sample(sample, found.run.train.max_length)
    print_line()
    for text in found.warnings:
        print_line(f"warning: {text}")
    print_line("no mistakes found")


def _shown(clients: "Mapping[str, ClientPreview]") -> "Mapping[str, ClientPreview]":
    """Those that get a line: all, or the ones with the most and with the fewest train rows."""
    by_size = sorted(clients, key=lambda name: -clients[name].num_train)
    chosen = {*by_size[: MAX_CLIENTS // 2], *by_size[-(MAX_CLIENTS // 2) :]}
    return clients if len(clients) <= MAX_CLIENTS else {n: clients[n] for n in sorted(chosen)}


def _print_split(found: "Preview", shown: "Mapping[str, ClientPreview]") -> None:
    server = f"; {counted(found.num_server, 'row')} at the server" if found.num_server else ""
    if found.num_server_test:
        server += f"; {counted(found.num_server_test, 'row')} in the server's test set"
    print_line(f"{counted(len(found.clients), 'client')}: {found.split}{server}")
    if len(shown) < len(found.clients):
        print_line(
            f"{len(shown)} of them are listed, with the most and the fewest train rows; "
            "--json has all"
        )
    validation = "▒ validation, " if _have_validation(found.clients) else ""
    print_line(f"\nrows (█ train, {validation}░ held out)\n")
    _print_bars(shown)
    if any(own.labels for own in found.clients.values()):
        print_line("\nlabels of the train rows\n")
        print_table(_label_table(shown))


def _have_validation(clients: "Mapping[str, ClientPreview]") -> bool:
    return any(own.num_validation for own in clients.values())


def _print_bars(clients: "Mapping[str, ClientPreview]") -> None:
    from silotune.results.svg import short

    names = [short(name, 30) for name in clients]
    width = max(map(cell_len, names))
    most = max(own.num_train + own.num_validation + own.num_eval for own in clients.values())
    for name, own in zip(names, clients.values(), strict=True):
        # what would be rounded to nothing gets a character
        parts = {"█": own.num_train, "▒": own.num_validation, "░": own.num_eval}
        bar = "".join(ink * max(1, round(BAR * n / most)) for ink, n in parts.items() if n)
        print_line(f"{set_cell_size(name, width)}  {bar}")


def _label_table(clients: "Mapping[str, ClientPreview]") -> list[tuple[str, ...]]:
    """Header and rows: one line per client, with the shares of the most common labels."""
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


def _print_lengths(found: "Preview", shown: "Mapping[str, ClientPreview]") -> None:
    limit = found.run.train.max_length
    print_line(f"\ntrain rows in tokens, and the effect of train.max_length = {limit}\n")
    tokens = ("tokens: median", "95 %", "longest")
    has_validation = _have_validation(found.clients)
    numbers = {
        "train rows": "num_train",
        **({"validation rows": "num_validation"} if has_validation else {}),
        "held-out rows": "num_eval",
    }
    lines: list[tuple[str, ...]] = [
        ("client", *numbers, *tokens, "truncated", "no answer left", "learned")
    ]
    for name, own in shown.items():
        part = own.train
        share = "-" if part.trained_share is None else f"{part.trained_share:.0%}"
        quantiles = (f"{part.tokens[key]:.0f}" for key in ("p50", "p95", "max"))
        counts = (str(getattr(own, key)) for key in numbers.values())
        lines.append((name, *counts, *quantiles, str(part.num_cut), str(part.num_dropped), share))
    print_table(lines)


def _print_duplicates(clients: "Mapping[str, ClientPreview]") -> None:
    from silotune.workflows.preview import name_counts

    print_line("\nduplicates\n")
    for key, one, many in DUPLICATES:
        count = attrgetter(f"duplicates.{key}")
        who = name_counts(clients, count)
        total = sum(map(count, clients.values()))
        print_line(f"{total:>5} {one if total == 1 else many}{f' ({who})' if who else ''}")


def _print_sample(sample: "Sample", max_length: int) -> None:
    cut = f", truncated at {max_length}" if sample.num_tokens > max_length else ""
    tokens = counted(sample.num_tokens, "token")
    print_line(f"\n{sample.client}, train row {sample.row}: {tokens}{cut}")
    _print_text(sample.pieces)


def _print_text(pieces: "Sequence[tuple[Kind, str]]") -> None:
    """A row's text behind a legend of what is marked in it."""
    legend: list[tuple[Kind, str]] = []
    for kind, word in LEGEND.items():
        if kind == "learned" or any(own == kind for own, _ in pieces):
            legend.append(("read", " "))
            legend.append((kind, word))
    _print_pieces(legend[1:])
    _print_pieces(pieces)


def _print_pieces(pieces: "Sequence[tuple[Kind, str]]") -> None:
    console = Console(highlight=False, markup=False)
    colourless = console.no_color or console.color_system is None  # no terminal has no colours
    line = Text()
    for kind, text in pieces:
        before, after = MARKS[kind] if colourless else ("", "")
        line.append(before + visible(text) + after, style="" if colourless else STYLES[kind])
    console.print(line, soft_wrap=True)


def print_new(made: "silotune.NewRecipe") -> None:
    """Print what was guessed, a few rows as the model will read them, and the next command."""
    print_line(f"{made.path}: a recipe for {counted(made.num_rows, 'row')}\n")
    for text in made.guesses:
        print_line(text)
    for text in made.warnings:
        print_line(f"warning: {text}")
    if made.samples and not made.samples[0].num_tokens:
        print_line(
            "\nrows are shown in a plain template: the model is not on this machine yet, or its "
            "own template does not fit them"
        )
    for found in made.samples:
        tokens = f": {counted(found.num_tokens, 'token')}" if found.num_tokens else ""
        print_line(f"\n{found.client}, train row {found.row}{tokens}")
        _print_text(found.pieces)
    print_line(f"\nread the recipe, then: silotune data {shlex.quote(str(made.path))}")


# --- costs ----------------------------------------------------------------------------------------


def print_plan(found: "silotune.Plan") -> None:
    """Print bytes, memory and time, changes that would fit the limits, and what is assumed."""
    _print_bytes(found)
    _print_memory(found)
    _print_times(found)
    _print_changes(found)
    print_line()
    for text in found.notes:
        print_line(f"note: {text}")


def _print_bytes(found: "silotune.Plan") -> None:
    sent = found.traffic
    asked = f"{sent.num_asked} of {counted(sent.num_clients, 'client')}"
    lines: list[tuple[str, int]] = [
        ("to one client, the whole adapter", sent.down),
        ("to one client that holds the one before", sent.news),
        ("from one client, per round", sent.up),
        (f"first round, {asked}", sent.per_round),
        (f"{counted(sent.rounds, 'round')} of training", sent.training),
        ("messages that only score", sent.scoring),
        ("total", sent.total),
    ]
    if sent.head_down:
        lines.insert(3, ("of which the head, to one client", sent.head_down))
        lines.insert(4, ("of which the head, from one client", sent.head_up))
    if sent.kept:
        lines.insert(2, ("learned and never sent", sent.kept))
    print_line(f"messages, with {sent.num_values:,} trained numbers\n")
    body = [(what, f"{size:,}", human_bytes(size)) for what, size in lines]
    print_table([("what", "bytes", ""), *body])
    print_line(f"as counted by FlowerTune's tracker: {sent.tracker_mib:.2f} MiB")


def _print_memory(found: "silotune.Plan") -> None:
    batch = found.batch
    print_line(
        f"\nmemory, estimated for {counted(batch.num_rows, 'row')} of "
        f"{counted(batch.length, 'token')}, {batch.num_trained} of them learned\n"
    )
    lines: list[tuple[str, ...]] = [("part", "client", "server")]
    client = {} if found.client is None else vars(found.client)
    server = vars(found.server)
    for part in (*client, *(part for part in server if part not in client)):
        own = (human_bytes(held[part]) if part in held else "-" for held in (client, server))
        lines.append((part, *own))
    total = "-" if found.client is None else human_bytes(found.client.total)
    lines.append(("peak", total, human_bytes(found.server.total)))
    print_table(lines)
    if found.measured is not None:
        peak = human_bytes(found.measured.peak_bytes)
        print_line(f"measured on {found.measured.device}: {peak}")


def _print_times(found: "silotune.Plan") -> None:
    times = found.times
    if times is None:
        return
    print_line("\ntime on this machine, one client at a time\n")
    seconds = {
        "until the first round": times.start,
        "one client, per round": times.client,
        "per round": times.round,
        f"{counted(found.traffic.rounds, 'round')} of training": times.training,
        "scoring": times.scoring,
        "total": times.total,
    }
    body = [(what, human_seconds(number)) for what, number in seconds.items()]
    print_table([("what", "time"), *body])


def _print_changes(found: "silotune.Plan") -> None:
    if found.fits is None:
        return
    if found.fits:
        print_line("\nit fits")
    elif not found.changes:
        print_line("\nit does not fit, and none of the changes that were tried makes it fit")
    else:
        print_line("\nit does not fit; each of these changes would make it fit, cheapest first\n")
        body = [
            (" ".join(f"{k}={_as_text(v)}" for k, v in own.overrides.items()), *_needs(own.needed))
            for own in found.changes
        ]
        print_table([("change", "memory", "bytes", "time"), *body])


def _as_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _needs(needed: "Prediction") -> tuple[str, ...]:
    peak, seconds = needed.peak_bytes, needed.seconds
    return (
        "-" if peak is None else human_bytes(peak),
        human_bytes(needed.size_bytes),
        "-" if seconds is None else human_seconds(seconds),
    )
