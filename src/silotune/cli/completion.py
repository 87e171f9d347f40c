"""What a shell offers when TAB is pressed: recipe names, and the keys of a recipe.

This has to answer while a person waits, so it imports nothing but lists: the keys are in a file
that `make docs` writes from the config models.
"""

import json
from importlib import resources

KEYS = "keys.json"
"""In silotune.recipes: every key that a recipe may have, with its help text."""


def recipe_names(incomplete: str) -> list[tuple[str, str]]:
    """Shipped recipes that begin with what was typed, with what they are."""
    from silotune.recipes.shipped import shipped_recipe, shipped_recipes

    names = [name for name in shipped_recipes() if name.startswith(incomplete)]
    return [(name, shipped_recipe(name).what) for name in names]


def key_names(incomplete: str) -> list[tuple[str, str]]:
    """Keys that begin with what was typed, each with the sign that a value follows."""
    if "=" in incomplete:
        return []
    text = resources.files("silotune.recipes").joinpath(KEYS).read_text(encoding="utf-8")
    return [
        (f"{key}=", meaning)
        for key, meaning in json.loads(text).items()
        if key.startswith(incomplete)
    ]
