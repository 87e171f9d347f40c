"""Write docs/recipe.md, the recipe reference, and the list of keys for shells, from the configs.

The fields are the only home of names, defaults, ranges and help texts; this file adds headings. The
result is the same on every machine. Run it with `make docs`.
"""

import json
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from silotune.federation.client_config import (
    ClientConfig,
    LimitsConfig,
    OwnRuntimeConfig,
    RunsConfig,
)
from silotune.federation.own_sums import OwnSumsConfig
from silotune.recipes.algorithm import ALGORITHM_CONFIGS
from silotune.recipes.mistakes import sections
from silotune.recipes.schema import RunConfig

PAGE = Path(__file__).parent / "recipe.md"
KEYS = Path(__file__).parents[1] / "src" / "silotune" / "recipes" / "keys.json"

HEAD = """\
# Recipe reference

<!-- Made by docs/build_recipe_reference.py. Do not edit; change the field and run `make docs`. -->

A recipe is a TOML file. `rounds` and `data.path` are required, all else has a default. Every key
can be changed on the command line with its dotted name:

```sh
silotune check hospitals rounds=3 train.lr=5e-4 'adapter.targets=["q_proj"]'
```

A value is read as TOML, or as text if it is not valid TOML; `key=none` removes a key from the recipe.
Unknown keys, wrong types and contradictions are reported together, before a model is loaded.
"absent" as a default means that the key is not set; TOML has no word for it. Paths are
read from the folder in which the command runs.
"""

ALGORITHM = """\
`name` says which, by default `"fedavg"`; the other keys depend on it. Papers, files and what
differs: [papers.md](papers.md).
"""

CLIENT = """\
## A client's own configuration

Another TOML file, written by the client's own people; it wins over the recipe
([runtimes.md](runtimes.md)). Its `[data]` takes the keys of a recipe's `[data]`.
"""

NAMES = {str: "text", int: "integer", float: "number", bool: "true or false"}
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def build() -> str:
    """The whole page."""
    own = sections()
    top = {name: field for name, field in RunConfig.model_fields.items() if name not in own}
    parts = [HEAD, "## Top level\n", _table(top)]
    for section, cls in own.items():
        if section != "algorithm":
            parts += [f"## [{section}]\n", _about(cls), _table(cls.model_fields)]
            continue
        parts += ["## [algorithm]\n", ALGORITHM]
        for name, choice in ALGORITHM_CONFIGS.items():
            fields = {key: f for key, f in choice.model_fields.items() if key != "name"}
            shown = name.replace("<", "\\<")  # a page would take <module> for a tag
            parts += [f'### name = "{shown}"\n', _about(choice), _table(fields)]
    parts.append(CLIENT)
    tables = {"data", "limits", "runs", "secure_sum", "runtime"}
    top = {name: f for name, f in ClientConfig.model_fields.items() if name not in tables}
    parts += ["### Top level of a client\n", _table(top)]
    client = (
        ("limits", LimitsConfig),
        ("runs", RunsConfig),
        ("secure_sum", OwnSumsConfig),
        ("runtime", OwnRuntimeConfig),
    )
    for section, own in client:
        parts += [f"### [{section}] of a client\n", _about(own), _table(own.model_fields)]
    return "\n".join(parts)


def build_keys() -> str:
    """Every dotted key of a recipe with the first sentence of its help, as JSON."""
    found: dict[str, str] = {}
    own = sections()
    for name, field in RunConfig.model_fields.items():
        if name not in own:
            found[name] = field.description or ""
            continue
        choices = ALGORITHM_CONFIGS.values() if name == "algorithm" else [own[name]]
        for cls in choices:
            for key, inner in cls.model_fields.items():
                found.setdefault(f"{name}.{key}", inner.description or "")
    first = {key: _first_sentence(_one_line(text)) for key, text in found.items()}
    return json.dumps(first, indent=1, ensure_ascii=False) + "\n"


def _first_sentence(text: str) -> str:
    return re.split(r"(?<!al)(?<!eq)\. (?=[A-Z])", text, maxsplit=1)[0].rstrip(".")


def _about(cls: type[BaseModel]) -> str:
    return f"{_one_line(cls.__doc__ or '')}\n"


def _table(fields: dict[str, FieldInfo]) -> str:
    lines = ["| key | type | default | range | meaning |", "|---|---|---|---|---|"]
    for name, field in fields.items():
        cells = (
            f"`{name}`",
            type_text(field.annotation),
            default_text(field),
            range_text(field),
            _one_line(field.description or ""),
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def type_text(annotation: Any) -> str:
    """An annotation in the words of a recipe."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " or ".join(f'`"{choice}"`' for choice in inner)
    if origin in (typing.Union, types.UnionType):  # absent shows in the default
        return " or ".join(type_text(t) for t in inner if t is not type(None))
    if origin in (tuple, list):
        return f"list of {type_text(inner[0])}s"
    if origin is typing.Annotated:
        return type_text(inner[0])
    if origin is dict:
        return f"table of {type_text(inner[1])}"
    return NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def default_text(field: FieldInfo) -> str:
    """A default as it would stand in TOML, or in words."""
    if field.is_required():
        return "required"
    if field.default_factory is not None:  # it may differ from machine to machine
        return "chosen at run time"
    value = field.default
    if value is None:
        return "absent"
    if value == {}:
        return "empty"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return "`[" + ", ".join(f'"{item}"' for item in value) + "]`"
    if isinstance(value, (int, float)):
        # 16 stands for 16.0 where any number is meant
        return f"`{value}`"
    return f'`"{value}"`'


def range_text(field: FieldInfo) -> str:
    """The bounds that a value must keep."""
    bounds: list[str] = []
    for rule in field.metadata:
        bounds += [
            f"{sign} {getattr(rule, key):g}" for key, sign in SIGNS.items() if hasattr(rule, key)
        ]
        if getattr(rule, "min_length", None):
            bounds.append("not empty")
    return ", ".join(bounds)


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    PAGE.write_text(build(), encoding="utf-8")
    KEYS.write_text(build_keys(), encoding="utf-8")
