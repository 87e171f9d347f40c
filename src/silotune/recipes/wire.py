"""What [wire] needs of the rest of a recipe."""

from collections.abc import Iterator

from silotune.recipes.schema import RunConfig


def of_the_wire(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Contradictions between [wire] and other sections, as (key, reason)."""
    cfg = run.wire
    if cfg.up == "float32":
        if not cfg.error_feedback:
            yield "wire.error_feedback", "has no effect: float32 leaves nothing out"
    elif run.secure_sum.is_on:
        yield (
            "wire.up",
            f"'{cfg.up}' cannot be used with secure sums: masked changes add up as integers of 32 "
            "bits, and nothing shorter",
        )
    if cfg.block is not None and cfg.up in ("float32", "bf16"):
        yield "wire.block", f"has no effect: {cfg.up} has no blocks"
    if cfg.share != type(cfg).model_fields["share"].default and cfg.up != "topk":
        yield "wire.share", "only has an effect with wire.up = 'topk'"
