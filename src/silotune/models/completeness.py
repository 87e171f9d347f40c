"""Whether a base's files hold the model that its config.json describes.

transformers gives random values to what the files lack, leaves out what the model has no place for,
and reports both. This file decides what that means. It does not know how a model is loaded.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from silotune.core.errors import ModelError
from silotune.core.safe_text import one_line
from silotune.core.wording import counted

SHOWN = 3
"""Most names in a message."""


def check_complete(
    base: nn.Module, found: Mapping[str, Any], what: str, *, classifier: bool
) -> tuple[list[str], tuple[str, ...]]:
    """Judge what transformers reports about a model that it has just loaded.

    Args:
        base: The plain model; its weights are not read.
        found: The `loading_info` of `from_pretrained`.
        what: The setting and its value, for messages.
        classifier: Whether a head, and a pooler below it, may be new.

    Returns:
        The names of the tensors of a head or pooler that are not in the files; and notes on what
        the files contain and the model does not use.

    Raises:
        ModelError: The files are not those of this model: tensors are missing or have other shapes,
            or belong to a part of the model that has no place for them.
    """
    wrong = {name: (tuple(theirs), tuple(ours)) for name, theirs, ours in found["mismatched_keys"]}
    fresh = sorted({*found["missing_keys"], *wrong})
    new = set(_may_be_new(base, fresh)) if classifier else set[str]()
    lost, extra = [name for name in fresh if name not in new], sorted(found["unexpected_keys"])
    if lost:
        raise ModelError(_lacking(base, lost, wrong, extra, what))
    if inside := [name for name in extra if _is_in_a_layer(base, name)]:
        raise ModelError(
            f"{what}: the files contain {_named(inside)} for layers that have no place for "
            f"{'it' if len(inside) == 1 else 'them'}, so the model would compute something else.\n"
            f"  {_lora(inside) or 'Correct config.json, or get it again with the weights.'}"
        )
    return fresh, _notes(base, extra)


def _may_be_new(base: Any, fresh: Sequence[str]) -> list[str]:
    """What a checkpoint of another task lacks: modules of the head, and a pooler, as a whole."""
    within = f"{base.base_model_prefix}."
    lacks = Counter(name.rpartition(".")[0] for name in fresh)

    def is_whole(module: str) -> bool:
        return lacks[module] >= len(list(base.get_submodule(module).parameters(recurse=False)))

    return [
        name
        for name in fresh
        if (not name.startswith(within) or "pool" in name) and is_whole(name.rpartition(".")[0])
    ]


def _lacking(
    base: nn.Module,
    lost: Sequence[str],
    wrong: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    extra: Sequence[str],
    what: str,
) -> str:
    """What is lost, and the most likely reason."""
    total = sum(1 for _ in base.parameters())
    misfits = [name for name in lost if name in wrong]
    if misfits:
        theirs, ours = wrong[misfits[0]]
        return (
            f"{what}: {_named(misfits)} of the model's {total} tensors "
            f"{'has' if len(misfits) == 1 else 'have'} another shape in the files than config.json "
            f"says: {theirs} and not {ours} for the first.\n"
            "  Get config.json and the weights again, from the same place."
        )
    first = (
        f"{what}: the files lack {_named(lost)} of the model's {total} tensors, which would start "
        "at random values.\n  "
    )
    if hint := _lora(extra):
        return first + hint
    if prefix := _common_prefix(lost, extra):
        return (
            f"{first}They are there under names that begin with '{one_line(prefix)}': rename them, "
            "or save the model again without its wrapper."
        )
    return f"{first}Get all of the model's files again; if they are complete, correct config.json."


def _named(names: Sequence[str]) -> str:
    """How many tensors, and the first names."""
    first = ", ".join(f"'{one_line(name, longest=120)}'" for name in names[:SHOWN])
    return f"{counted(len(names), 'tensor')} ({first}{', ...' if len(names) > SHOWN else ''})"


def _lora(extra: Collection[str]) -> str:
    """How to fix files that hold an adapter beside the weights; empty if they do not."""
    if not any("lora_" in name or ".base_layer." in name for name in extra):
        return ""
    return (
        "The files hold a LoRA adapter that was not merged: merge it (merge_and_unload in PEFT), "
        "then save the model with save_pretrained."
    )


def _common_prefix(lost: Sequence[str], extra: Collection[str]) -> str:
    """What stands in front of most of the lost names in the files, such as 'module.'."""
    wanted = set(lost)
    found = Counter[str]()
    for name in extra:
        parts = name.split(".")
        for n in range(1, len(parts)):
            if ".".join(parts[n:]) in wanted:
                found[".".join(parts[:n]) + "."] += 1
    prefix, count = found.most_common(1)[0] if found else ("", 0)
    return prefix if 2 * count > len(lost) else ""


def _is_in_a_layer(base: Any, name: str) -> bool:
    """Whether a tensor belongs to a single layer of the model's body: a bias, a scale, a factor."""
    module, body = _deepest_module(base, name), getattr(base, base.base_model_prefix, base)
    return (
        module is not None
        and any(module is part for part in body.modules())
        and not list(module.children())
        and any(True for _ in module.parameters())
    )


def _notes(base: Any, extra: Sequence[str]) -> tuple[str, ...]:
    """What the model's body leaves out. Heads for other tasks need no note."""
    body = getattr(base, base.base_model_prefix, base)
    parts = {id(part) for part in body.modules()} - {id(base), id(body)}
    left = [
        name for name in extra if "pool" not in name and id(_deepest_module(base, name)) in parts
    ]
    if not left:
        return ()
    return (
        f"the base's files contain {_named(left)} that the model does not use; check config.json",
    )


def _deepest_module(base: Any, name: str) -> nn.Module | None:
    """The innermost module of the model on the way to a tensor.

    Files of a plain encoder or decoder have names without the body's prefix.
    """
    for path in (name, f"{base.base_model_prefix}.{name}"):
        module, deepest = base, None
        for part in path.split(".")[:-1]:
            module = module._modules.get(part)
            if module is None:
                break
            deepest = module
        if deepest is not None:
            return deepest
    return None
