"""A matplotlib drawing as SVG text for an HTML page.

This file does not know what is drawn. A drawing is 360 units wide, so that a phone shows text at
its own size and a desktop enlarges it. Everything drawn in `INK` becomes `currentColor`, so it
follows the page's light or dark theme. Names are data: they are never read as mathematics or
markup.
"""

import contextlib
import html
import io
import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Literal, NamedTuple

from silotune.core.safe_text import one_line

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"
"""Placeholder for `currentColor`; no palette contains it."""
Legend = dict[str, "Artist"]
"""Legend handles by their texts."""

ChartKind = Literal["svg", "pdf"]


class Saved(NamedTuple):
    """A chart as a file of its own."""

    label: str
    """What it shows."""
    kind: ChartKind
    data: bytes
    lacks_glyphs: bool
    """Whether a PDF shows boxes instead of some letters, which its font does not have."""


_SAVING: ContextVar[tuple[ChartKind, list[Saved]] | None] = ContextVar("saving", default=None)

_WIDTH = 360.0  # all sizes in points; one point is one unit of the SVG
_STYLE = {
    "svg.fonttype": "none",
    "pdf.fonttype": 42,  # fonts that publishers accept
    "text.parse_math": False,
    "font.size": 10,
    "axes.titlesize": 10,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "legend.handlelength": 1.7,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.0,
    "hatch.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "grid.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.color": INK,
    "patch.edgecolor": INK,
}


@contextlib.contextmanager
def saving(kind: ChartKind | None) -> Iterator[list[Saved]]:
    """Also keep every chart that is drawn meanwhile as a file; nothing if `kind` is None.

    A page draws its charts somewhere inside; this collects them without drawing them again.
    """
    saved: list[Saved] = []
    token = _SAVING.set(None if kind is None else (kind, saved))
    try:
        yield saved
    finally:
        _SAVING.reset(token)


def _save(figure: "Figure", label: str) -> None:
    if (wanted := _SAVING.get()) is None:
        return
    kind, saved = wanted
    file = io.BytesIO()
    names = ("Date", "Creator") if kind == "svg" else ("CreationDate", "Creator", "Producer")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        figure.savefig(file, format=kind, transparent=True, metadata=dict.fromkeys(names))
    lacks = kind == "pdf" and any("missing from font" in str(own.message) for own in said)
    saved.append(Saved(label, kind, file.getvalue(), lacks))


def chart(label: str, height: float, draw: Callable[["Axes"], Legend]) -> str:
    """Draw on one pair of axes with the legend above it, and return the SVG.

    Args:
        label: What the chart shows, for screen readers. It also makes the chart's ids unique.
        height: Height of the axes with their labels, in points.
        draw: Draws, and returns the legend handles by their texts.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    # SVG settings exist only among matplotlib's global ones: the context restores them.
    style = ["default", {**_STYLE, "svg.hashsalt": label}]
    with matplotlib.style.context(style), warnings.catch_warnings():
        # the browser draws the text, so glyphs missing from matplotlib's font do not matter
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(layout="constrained")
        legend = draw(figure.subplots())
        if legend:
            texts = [short(text, 25 if len(legend) > 1 else 52) for text in legend]
            figure.legend(
                legend.values(), texts, loc="outside upper left", ncols=2, borderaxespad=0
            )
        figure.set_size_inches(_WIDTH / 72, (height + 15 * math.ceil(len(legend) / 2)) / 72)
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        _save(figure, label)
    return _inline(file.getvalue(), label)


def _inline(svg: str, label: str) -> str:
    """Make a standalone SVG part of a page: no header, no global styles, only unique ids."""
    size = re.search(r'viewBox="([^"]*)"', svg)
    assert size is not None, "matplotlib writes a viewBox"
    body = svg[svg.index("<defs>") :]
    body = re.sub(r"<style[^>]*>.*?</style>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r"<[^>]*>", _tidy_tag, body)  # tags only: names between them stay unchanged
    words = html.escape(short(label, 200))
    return (
        f'<svg class="chart" role="img" aria-label="{words}" viewBox="{size[1]}" '
        'stroke-linejoin="round" stroke-linecap="butt">\n'
        f"<title>{words}</title>\n{body}"
    )


def _tidy_tag(found: re.Match[str]) -> str:
    tag = found[0].replace(INK, "currentColor").replace("xlink:href", "href")
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag)  # use the page's font
    return re.sub(r'^<g id="[^"]*"', "<g", tag)  # axes_1 and so on: the same in every chart


def short(name: str, columns: float = 52) -> str:
    """Shorten a name to one line, with an ellipsis. Wide letters count more than one column.

    Matplotlib cannot measure the text, because the browser draws it in another font.
    """
    out, used = "", 0.0
    for char in one_line(str(name)):
        width = unicodedata.east_asian_width(char)
        wide = width in "WF" or char in "WM@%m"
        used += 1.7 if wide else 1.3 if width == "A" or char.isupper() or char == "w" else 1.0
        if used > columns:
            return out[:-1].rstrip() + "…"
        out += char
    return out
