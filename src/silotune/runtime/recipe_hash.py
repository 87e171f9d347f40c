"""The hash of a recipe that a client has at hand, as if a consortium's server had sent it."""

from pathlib import Path

from silotune.data.chat_templates import resolve_template
from silotune.federation.approval import consent_sha256
from silotune.recipes.auto import resolve_auto
from silotune.recipes.parse import load_recipe
from silotune.recipes.sections import RuntimeConfig
from silotune.runtime.flower.submit import travelling_name, without_places


def named_sha256(name: str | Path, folder: Path) -> str:
    """`consent_sha256` of a recipe that is at hand.

    Args:
        name: A shipped recipe, or a TOML file relative to `folder`.
        folder: Of the client.

    Raises:
        SilotuneError: There is no such recipe, or it has mistakes.
    """
    here = folder / name
    elsewhere = [f"runtime.{key}=none" for key in RuntimeConfig.model_fields]
    run = load_recipe(here if here.is_file() else name, [*elsewhere, "runtime.name=flower"])
    run = resolve_auto(run)
    model = run.model.model_copy(update={"name": travelling_name(run.model.name)})
    data = run.data.model_copy(update={"template": resolve_template(run.data.template)})
    return consent_sha256(without_places(run.model_copy(update={"model": model, "data": data})))
