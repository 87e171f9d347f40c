"""Open whatever a folder holds: a run, a comparison or a sweep."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import silotune


def open_finished(path: Path) -> "silotune.Run | silotune.Comparison | silotune.Sweep":
    """The finished work in a folder; a folder that holds none is opened as a run, which fails."""
    import silotune
    from silotune.results.listing import kind_of

    kind = kind_of(path)
    if kind is None or kind.name == "run":
        return silotune.Run(path)
    return silotune.Comparison(path) if kind.name == "comparison" else silotune.Sweep(path)
