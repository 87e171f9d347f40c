"""Charts of a run or a comparison, as SVG text for an HTML page.

This file knows only numbers and names. It does not know run folders or recipes. A chart with
nothing to draw is an empty string. No chart relies on colour alone: lines also differ by marker,
bars by hatch.

Reference:
    Okabe and Ito 2008, "Color Universal Design": the hues, here adjusted to a medium brightness, so
    that all have a contrast of 3 or more on white and on near-black.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from silotune.results.svg import INK, Legend, chart, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = Mapping[int, float]
"""A value per round."""
Interval = Mapping[str, float]
"""mean, low and high; if low and high are missing, only the mean is drawn."""
Split = Mapping[str, Mapping[str, Any]]
"""Per client: num_train, num_eval, tokens (p5, p25, p50, p75, p95, max), labels (name: count)."""

PALETTE = (
    *("#0072B2", "#D55E00", "#009E73", "#C06A9B"),
    *("#B58100", "#3592C9", "#8C6BB1", "#7A7A7A"),
)
MARKERS = "osD^vPX*"
HATCHES = ("", "////", "----", "\\\\\\\\", "xxxx")  # dots would make a file ten times as large
MAX_LINES = 8
"""Lines with a name; with more clients, only the best and the worst are named."""
MAX_CLIENTS = 30
"""Maximum number of clients in a chart with one line per client: those with the most rows."""
MAX_GROUPS = 12
"""Maximum number of clients in a chart with one line per client and arm."""
MAX_LABELS = 10

_MUTED = PALETTE[-1]
_LINE = 10.0  # height of a line in points
_BARS: tuple[dict[str, Any], ...] = (
    {"facecolor": PALETTE[0], "linewidth": 0.6},
    {"facecolor": PALETTE[1], "linewidth": 0.6, "hatch": "////"},
)
_THIRD: dict[str, Any] = {"facecolor": PALETTE[2], "linewidth": 0.6, "hatch": "----"}
_OTHER = {"facecolor": _MUTED, "edgecolor": INK, "linewidth": 0.6, "alpha": 0.5}

_Place = Callable[[int, int], float]
"""Group and line -> its y."""


# --- what is drawn ----------------------------------------------------------------------------


def held_out_loss(
    clients: Mapping[str, Points],
    overall: Points,
    unit: str = "nats per token",
    name: str = "held-out loss",
) -> str:
    """Held-out loss, or another of this name, of each client and overall, by rounds of training."""
    x_label = "rounds of training (0 = base)"
    return _lines(clients, overall, x_label=x_label, y_label=f"{name} ({unit})")


def training_loss(clients: Mapping[str, Points], unit: str = "nats per token") -> str:
    """Training loss of each client by round."""
    return _lines(clients, {}, x_label="round", y_label=f"training loss ({unit})")


def loss_by_run(
    runs: Mapping[str, Points], unit: str = "nats per token", name: str = "held-out loss"
) -> str:
    """Loss over all clients for each run of a sweep, by rounds of training."""
    x_label = "rounds of training (0 = base)"
    return _lines(runs, {}, x_label=x_label, y_label=f"{name} ({unit})", what="run")


def bytes_per_round(down: Points, up: Points) -> str:
    """Bytes received and sent by all clients together, per round."""
    rounds = sorted(down.keys() | up.keys())
    most = max([*down.values(), *up.values()], default=0)
    if not most:
        return ""
    power = min(4, int(math.log10(most) // 3))
    unit = ("B", "kB", "MB", "GB", "TB")[power]
    parts = {"to the clients": (down, -0.2), "from the clients": (up, 0.2)}

    def draw(ax: "Axes") -> Legend:
        for (values, shift), look in zip(parts.values(), _BARS, strict=True):
            heights = [values.get(r, 0) / 1000**power for r in rounds]
            ax.bar([r + shift for r in rounds], heights, width=0.4, **look)
        ax.grid(visible=False, axis="x")
        ax.set(xlabel="round", ylabel=f"sent per round ({unit})")
        _whole_numbers(ax)
        return _patches(dict(zip(parts, _BARS, strict=True)))

    return chart("Bytes per round, to and from the clients", 190, draw)


def seconds_per_client(training: Mapping[str, float], other: Mapping[str, float]) -> str:
    """Seconds that each client spent on training, and on everything else in its rounds."""
    parts = {"training": training, "loading and scoring": other}
    names = list(training)
    if not names:
        return ""

    def draw(ax: "Axes", y: _Place) -> Legend:
        for i, name in enumerate(names):
            left = 0.0
            for values, look in zip(parts.values(), _BARS, strict=True):
                ax.barh(y(i, 0), values[name], left=left, height=0.9, **look)
                left += values[name]
        ax.set_xlabel("time over all rounds (seconds)")
        return _patches(dict(zip(parts, _BARS, strict=True)))

    return _rows("Seconds per client", names, 1, draw)


def rows_per_client(split: Split) -> str:
    """Train, validation and held-out rows of each client."""
    parts = {"train": "num_train", "validation": "num_validation", "held-out": "num_eval"}
    looks = {"train": _BARS[0], "validation": _THIRD, "held-out": _BARS[1]}
    if not any(own.get("num_validation") for own in split.values()):
        del parts["validation"], looks["validation"]
    if not split:
        return ""

    def draw(ax: "Axes", y: _Place) -> Legend:
        for line, (part, look) in enumerate(looks.items()):
            places = [y(i, line) for i in range(len(split))]
            numbers = [split[name].get(parts[part], 0) for name in split]
            ax.barh(places, numbers, height=0.9, **look)
        ax.set_xlabel("number of rows")
        _whole_numbers(ax)
        return _patches(looks)

    return _rows("Rows per client", list(split), len(looks), draw)


def labels_per_client(split: Split) -> str:
    """Shares of the labels at each client; rare labels are grouped."""
    given = {name: Counter(c["labels"]) for name, c in split.items() if c["labels"]}
    total = sum(given.values(), Counter())
    if not total:
        return ""
    kept = [label for label, _ in total.most_common()]
    num_rest = len(kept) - MAX_LABELS + 1 if len(kept) > MAX_LABELS else 0
    kept = kept[: len(kept) - num_rest]
    looks = {label: _segment(i) for i, label in enumerate(kept)}
    if num_rest:
        looks[f"other ({num_rest} labels)"] = _OTHER

    def draw(ax: "Axes", y: _Place) -> Legend:
        for i, counts in enumerate(given.values()):
            size, left = sum(counts.values()), 0.0
            shares = [100 * counts[label] / size for label in kept]
            if num_rest:
                shares.append(100 - sum(shares))
            for share, look in zip(shares, looks.values(), strict=True):
                ax.barh(y(i, 0), share, left=left, height=1.1, **look)
                left += share
        ax.set(xlim=(0, 100), xlabel="share of the client's rows (%)")
        return _patches(looks)

    return _rows("Labels per client", list(given), 1, draw)


def tokens_per_client(split: Split) -> str:
    """Lengths of each client's rows: 5 %, 25 %, median, 75 % and 95 % as a box."""
    given = {name: c["tokens"] for name, c in split.items() if c.get("tokens")}
    if not given:
        return ""
    keys = {"whislo": "p5", "q1": "p25", "med": "p50", "q3": "p75", "whishi": "p95"}
    ink, face = {"color": INK}, {"facecolor": PALETTE[5], "edgecolor": INK}

    def draw(ax: "Axes", y: _Place) -> Legend:
        ax.bxp(
            [{k: tokens[p] for k, p in keys.items()} | {"fliers": []} for tokens in given.values()],
            positions=[y(i, 0) for i in range(len(given))],
            widths=0.9,
            orientation="horizontal",
            patch_artist=True,
            manage_ticks=False,
            boxprops=face,
            medianprops=ink | {"linewidth": 2},
            whiskerprops=ink,
            capprops=ink,
        )
        ax.set_xlim(left=0)
        ax.set_xlabel("length of a row (tokens)")
        return {}

    return _rows("Lengths of rows per client", list(given), 1, draw)


def scores(
    groups: Mapping[str, Mapping[str, Interval]], arms: Sequence[str], *, metric: str, x_label: str
) -> str:
    """A dot with its interval for every arm, client by client.

    Args:
        groups: Arm -> interval, by client or other group; an arm may be missing.
        arms: All arms, in drawing order.
        metric: What is shown, for example "held-out loss".
        x_label: The label of the axis, with its unit.
    """
    return _intervals(f"{metric}: every arm", groups, arms, x_label=x_label)


def differences(
    groups: Mapping[str, Mapping[str, Interval]], arms: Sequence[str], *, metric: str, x_label: str
) -> str:
    """Like `scores`, but for paired differences: a line marks zero."""
    title = f"{metric}: difference from local"
    return _intervals(title, groups, arms, x_label=x_label, zero=True)


# --- how it is drawn --------------------------------------------------------------------------


def biggest(clients: Mapping[str, Mapping[str, Any]], limit: int = MAX_CLIENTS) -> list[str]:
    """The clients with the most train rows, in their given order. This limits a chart's size."""
    chosen = set(sorted(clients, key=lambda name: -clients[name]["num_train"])[:limit])
    return [name for name in clients if name in chosen]


def _lines(
    clients: Mapping[str, Points],
    overall: Points,
    *,
    x_label: str,
    y_label: str,
    what: str = "client",
) -> str:
    drawn = {name: p for name, p in clients.items() if p}
    if not drawn:
        return ""
    named = _named(drawn) if len(drawn) > MAX_LINES else {name: name for name in drawn}

    def draw(ax: "Axes") -> Legend:
        legend: Legend = {}
        for name in sorted(drawn, key=lambda n: n in named):  # muted ones below
            xs, ys = zip(*sorted(drawn[name].items()), strict=True)
            if name not in named:
                (line,) = ax.plot(xs, ys, color=_MUTED, linewidth=0.8, alpha=0.7)
                legend[f"the other {len(drawn) - len(named)} clients"] = line
                continue
            look = _look(list(named).index(name))
            (legend[named[name]],) = ax.plot(xs, ys, linewidth=1.3, **look)
        if overall:
            xs, ys = zip(*sorted(overall.items()), strict=True)
            (line,) = ax.plot(xs, ys, color=INK, linewidth=3, linestyle=(0, (3, 1)))
            legend["all, weighted by tokens"] = line
        ax.set(xlabel=x_label, ylabel=y_label)
        _whole_numbers(ax)
        return legend

    return chart(f"{y_label} per round and {what}", 210, draw)


def _named(clients: Mapping[str, Points]) -> dict[str, str]:
    last = {name: points[max(points)] for name, points in clients.items()}
    best, worst = min(last, key=last.__getitem__), max(last, key=last.__getitem__)
    return {best: f"lowest: {best}", worst: f"highest: {worst}"}


def _intervals(
    label: str,
    groups: Mapping[str, Mapping[str, Interval]],
    arms: Sequence[str],
    *,
    x_label: str,
    zero: bool = False,
) -> str:
    drawn = [arm for arm in arms if any(group.get(arm) for group in groups.values())]
    if not drawn:
        return ""

    def draw(ax: "Axes", y: _Place) -> Legend:
        legend: Legend = {}
        for line, arm in enumerate(drawn):
            look = _look(arms.index(arm))  # the same look in all charts
            for g, group in enumerate(groups.values()):
                if not (given := group.get(arm)):
                    continue
                if None not in (given.get("low"), given.get("high")):
                    ax.hlines(y(g, line), given["low"], given["high"], look["color"], linewidth=1.6)
                (legend[arm],) = ax.plot(given["mean"], y(g, line), linestyle="none", **look)
        if zero:
            ax.axvline(0, color=INK, linewidth=1)
        ax.spines["left"].set_visible(False)
        ax.set_xlabel(x_label)
        return legend

    return _rows(label, list(groups), len(drawn), draw)


def _rows(
    label: str, names: Sequence[str], lines: int, draw: Callable[["Axes", _Place], Legend]
) -> str:
    """A group of horizontal lines per name, with the name above it: a phone has no room beside."""
    pitch = lines + 2.2

    def inside(ax: "Axes") -> Legend:
        legend = draw(ax, lambda group, line: group * pitch + 2.05 + line)
        for i, name in enumerate(names):
            text = ax.text(0.005, i * pitch + 0.95, short(name), va="center")
            text.set_transform(ax.get_yaxis_transform())
            text.set_in_layout(False)  # a long name must not squeeze the axes
        ax.set_ylim(len(names) * pitch, 0.1)
        ax.yaxis.set_visible(False)
        return legend

    return chart(label, len(names) * pitch * _LINE + 36, inside)


def _whole_numbers(ax: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def _look(i: int) -> dict[str, Any]:
    """Colour and marker; the ninth repeats the first colour with another marker."""
    marker = MARKERS[(i + i // len(PALETTE)) % len(MARKERS)]
    return {"color": PALETTE[i % len(PALETTE)], "marker": marker, "markersize": 4.5}


def _segment(i: int) -> dict[str, Any]:
    """Seven colours and five hatches: no two of ten labels look the same."""
    hatch = HATCHES[i % len(HATCHES)]
    return {"facecolor": PALETTE[i % 7], "edgecolor": INK, "linewidth": 0.6, "hatch": hatch}


def _patches(looks: Mapping[str, Mapping[str, Any]]) -> Legend:
    from matplotlib.patches import Patch

    return {text: Patch(**look) for text, look in looks.items()}
