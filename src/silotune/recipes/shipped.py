"""The recipes in the package: where they are, what they are, and where they are from.

Nothing here reads a recipe's keys, so listing them costs no torch.
"""

from importlib import resources
from pathlib import Path
from typing import NamedTuple

from silotune.core.errors import ConfigError
from silotune.core.wording import did_you_mean

FROM = "# From: "
"""The second line of a shipped recipe begins with this."""


class ShippedRecipe(NamedTuple):
    """A recipe in the package."""

    name: str
    what: str
    """One sentence."""
    source: str
    """Where the system it describes was published."""
    text: str
    """The file."""


def shipped_recipes() -> dict[str, Path]:
    """The recipes in the package, by name."""
    folder = Path(str(resources.files("silotune.recipes")))
    return {p.stem: p for p in sorted(folder.glob("*.toml"), key=lambda p: p.stem)}


def shipped_recipe(name: str) -> ShippedRecipe:
    """A recipe in the package, with what its head says about it.

    Raises:
        ConfigError: There is none of this name.
    """
    known = shipped_recipes()
    if name not in known:
        raise ConfigError(
            f"there is no shipped recipe '{name}'.{did_you_mean(name, known)}\n"
            f"  There are: {', '.join(known)}."
        )
    text = known[name].read_text(encoding="utf-8")
    head = [line for line in text.partition("\n\n")[0].splitlines() if line.startswith("#")]
    words = " ".join(line.lstrip("# ") for line in head[2:])
    return ShippedRecipe(
        name,
        words.partition(". ")[0].rstrip(".") + ".",
        next((line.removeprefix(FROM) for line in head if line.startswith(FROM)), ""),
        text,
    )
