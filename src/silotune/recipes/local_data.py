"""One override is enough to run a recipe on local rows: what belongs to its hub data set goes.

A published recipe names a data set on the hub, and with it the configuration, the split and the
commit. None of these says anything about a local file, so they fall away when `data.path` is
overridden with one; whoever gives them in the same command is told that they have no effect.
"""

from collections.abc import Collection
from typing import Any, cast

from silotune.core.errors import DataError
from silotune.data.files import locate
from silotune.data.reading import HUB_ONLY, DataConfig


def drop_hub_keys(table: dict[str, Any], overridden: Collection[str]) -> str | None:
    """Remove what only the recipe's own data set has, if an override points to local rows.

    Args:
        table: The recipe with its overrides applied. Changed in place.
        overridden: The keys of the overrides, dotted.

    Returns:
        A note that names the keys that fell away; None if none did.
    """
    section = table.get("data")
    if "data.path" not in overridden or not isinstance(section, dict):
        return None
    data = cast(dict[str, Any], section)
    if not _is_local(data.get("path")):
        return None
    dropped = [
        f"data.{key}"
        for key in HUB_ONLY
        if f"data.{key}" not in overridden
        and data.pop(key, None) not in (None, DataConfig.model_fields[key].default)
    ]
    if "track" not in overridden and table.pop("track", None) is not None:
        dropped.append("track")
    if not dropped:
        return None
    return (
        f"data.path is local, so {', '.join(dropped)} of the recipe no longer "
        f"{'apply' if len(dropped) > 1 else 'applies'}"
    )


def _is_local(path: object) -> bool:
    if not isinstance(path, str) or not path:
        return False
    try:
        return locate(path) is not None
    except (DataError, OSError, ValueError):  # no such file, or no path: said when rows are read
        return False
