"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from silotune.cli.completion import key_names, recipe_names
from silotune.cli.frame import errors_as_exit_codes


def _a_run(context: typer.Context, path: Path) -> Path:
    """A run folder as it was typed; a sweep or comparison is refused with its best run."""
    if not context.resilient_parsing:
        with errors_as_exit_codes():
            from silotune.results.listing import refuse_collection

            refuse_collection(path, context.command_path)
    return path


Recipe = Annotated[
    str,
    typer.Argument(help="A shipped recipe's name, or a TOML file.", autocompletion=recipe_names),
]
OptionalRecipe = Annotated[
    str | None,
    typer.Argument(help="A shipped recipe's name, or a TOML file.", autocompletion=recipe_names),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Keys to change, such as train.lr=5e-4",
        metavar="[KEY=VALUE]...",
        autocompletion=key_names,
    ),
]
Out = Annotated[
    Path | None, typer.Option(help="Folder to create; by default runs/<time>-<recipe>.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", callback=_a_run)]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")]
AsSummary = Annotated[bool, typer.Option("--json", help="Print summary.json instead of tables.")]


def recipe_and_overrides(
    recipe: str | None, overrides: list[str] | None, resume: Path | None
) -> tuple[str | None, list[str]]:
    """Tell the recipe from the overrides: with --resume, the first word may be an override.

    Raises:
        ConfigError: There is neither a recipe nor a folder to resume.
    """
    import silotune
    from silotune.core.errors import ConfigError

    changed = list(overrides or ())
    if recipe is not None and "=" in recipe and not Path(recipe).is_file():
        recipe, changed = None, [recipe, *changed]
    if recipe is None and resume is None:
        shipped = ", ".join(silotune.shipped_recipes())
        raise ConfigError(
            "there is no recipe.\n"
            f"  Give a TOML file or a shipped name ({shipped}), or --resume FOLDER."
        )
    return recipe, changed


OfClient = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Use the model as this client has it: after its own steps, or with what it keeps.",
    ),
]
