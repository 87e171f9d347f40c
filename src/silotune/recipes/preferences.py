"""What task = "prefer" cannot be used with, and where its own section has no effect."""

from collections.abc import Iterator

from silotune.recipes.schema import RunConfig

ASKED = ("instruct", "prefer")
"""The tasks whose rows are questions with answers, which a chat template renders."""


def of_preferences(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Contradictions of a recipe that learns preferences, as (key, reason)."""
    if run.task != "prefer":
        for key, field in type(run.prefer).model_fields.items():
            if getattr(run.prefer, key) != field.default:
                yield f"prefer.{key}", 'only has an effect with task = "prefer"'
        return
    if run.adapter.kind == "full":
        yield (
            "adapter.kind",
            "'full' cannot be used with task = \"prefer\": the reference is the model without its "
            "adapter, and would need a second copy of all weights. Use lora",
        )
    if run.train.loss is not None:
        yield "train.loss", 'cannot be used with task = "prefer", whose loss is set in [prefer]'
    if run.server.work == "distill":
        yield "server.work", "'distill' cannot be used with task = \"prefer\"; use fine-tune"
