"""What secure sums need of the rest of a recipe."""

from collections.abc import Iterator

from silotune.recipes.algorithm import chosen_algorithm
from silotune.recipes.each_algorithm import each_algorithm, foreign
from silotune.recipes.schema import RunConfig

WHERE = "secure_sum.kind"


def of_secure_sums(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Contradictions between [secure_sum] and other sections, as (key, reason)."""
    cfg, fields = run.secure_sum, type(run.secure_sum).model_fields
    if not cfg.is_on:
        given = [key for key in fields if getattr(cfg, key) != fields[key].default]
        yield from (
            (f"secure_sum.{key}", 'only has an effect with kind = "masks"') for key in given
        )
        return
    if cfg.kind == "ckks":
        yield from _of_encryption(run)
    if cfg.range is None:
        yield (
            "secure_sum.range",
            "is missing: the largest absolute value of one number of a client's change, for "
            "example 1.0",
        )
    if run.runtime.name != "in-process" and cfg.kind == "masks":
        yield from _of_messages(run)
    if run.privacy.clips_at_server:
        yield (
            "privacy.noise_at",
            "must be 'client' with secure sums: the server cannot clip a change that it cannot see",
        )
    if run.checkpoint.keep_updates:
        yield (
            "checkpoint.keep_updates",
            "cannot be used with secure sums: what is kept would be words under masks",
        )
    for where, arm in each_algorithm(run).items():
        if kind := foreign(arm):
            yield where, f"{kind} cannot be used with secure sums: it may want single changes"
            continue
        facts = arm.facts
        why = (
            "it is no weighted sum of the changes"
            if not facts.linear
            else "clients send more than their change, and that is not masked"
            if facts.sends_more
            else "its server has to know who answered"
            if facts.remembers
            else "changes of several ranks have several shapes"
            if facts.mixed_ranks
            else ""
        )
        if why:
            yield where, f"'{chosen_algorithm(arm)}' cannot be used with secure sums: {why}"


def _of_encryption(run: RunConfig) -> Iterator[tuple[str, str]]:
    """What encrypted sums cannot do."""
    if run.runtime.name != "in-process":
        yield (
            WHERE,
            f"'ckks' cannot be used with runtime.name = '{run.runtime.name}': all clients share "
            "one secret key, and nothing hands it out. Use 'masks', which hides more",
        )
    fields = type(run.secure_sum).model_fields
    for key in ("simulate", "colluding"):
        if getattr(run.secure_sum, key) != fields[key].default:
            yield f"secure_sum.{key}", 'only has an effect with kind = "masks"'


def _of_messages(run: RunConfig) -> Iterator[tuple[str, str]]:
    """What clients in other processes cannot do, or refuse."""
    if run.secure_sum.simulate:
        yield (
            "secure_sum.simulate",
            "needs runtime.name = 'in-process': elsewhere clients use masks",
        )
    if run.checkpoint.every > 1:
        yield (
            "checkpoint.every",
            "must be 1 with secure sums: a resumed run would repeat rounds, and clients open the "
            "sum of a round once",
        )
    if run.runtime.name == "flower" and run.evaluate.every > 0:
        yield (
            "evaluate.every",
            "must be 0 with secure sums and runtime.name = 'flower': real clients then send no "
            "number about themselves, and a loss is one. evaluate.server_path scores at the server",
        )
