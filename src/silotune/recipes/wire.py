"""What [wire] needs of the rest of a recipe."""

from collections.abc import Iterator

from silotune.recipes.schema import RunConfig


def of_the_wire(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Contradictions between [wire] and other sections, as (key, reason)."""
    cfg, both = run.wire, {run.wire.up, run.wire.down}
    if not cfg.error_feedback and both == {"float32"}:
        yield "wire.error_feedback", "has no effect: float32 leaves nothing out"
    if cfg.down != "float32" and run.adapter.ranks:
        yield "wire.down", "cannot be used with clients of several ranks: each receives its own"
    if cfg.up != "float32" and run.secure_sum.is_on:
        yield (
            "wire.up",
            f"'{cfg.up}' cannot be used with secure sums: masked changes add up as integers of 32 "
            'bits, and nothing shorter; set wire.up = "float32"',
        )
    if cfg.block is not None and both <= {"float32", "bf16"}:
        yield "wire.block", "only has an effect with int8, int4, sign or topk"
    if cfg.share != type(cfg).model_fields["share"].default and "topk" not in both:
        yield "wire.share", "has no effect: neither wire.up nor wire.down is topk"
