"""Which changes to a recipe fit a limit: a small, named list, tried from mild to severe."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from silotune.models.adapters import PROMPT_KINDS
from silotune.recipes.schema import RunConfig


@dataclass(frozen=True)
class Limits:
    """Limits for a run; None where there is no limit."""

    memory_bytes: int | None = None
    """Memory of the process that trains."""
    size_bytes: int | None = None
    """All messages, both ways."""
    seconds: float | None = None

    def allow(self, needed: "Prediction") -> bool:
        """Whether a run is known to stay within all limits."""
        pairs = (
            (self.memory_bytes, needed.peak_bytes),
            (self.size_bytes, needed.size_bytes),
            (self.seconds, needed.seconds),
        )
        return all(m is None or (n is not None and n <= m) for m, n in pairs)


@dataclass(frozen=True)
class Prediction:
    """What a run needs; None if unknown."""

    peak_bytes: int | None
    size_bytes: int
    seconds: float | None


@dataclass(frozen=True)
class Change:
    """Keys to change together, and what the run then needs."""

    overrides: Mapping[str, Any]
    needed: Prediction


Option = tuple[tuple[str, Any], ...]
"""Keys that change together, with their new values."""


def find_changes(
    run: RunConfig, limits: Limits, predict: Callable[[RunConfig], Prediction]
) -> Iterator[Change]:
    """Find every smallest set of changes that fits, each change as mild as possible.

    Args:
        run: The recipe, which does not fit.
        limits: The limits to fit.
        predict: Returns what a changed recipe needs.

    Yields:
        Single changes first, cheapest first; then sets of changes that only fit together.
    """
    options = _options(run, limits)
    found: list[set[str]] = []
    for size in range(1, len(options) + 1):
        for names in combinations(options, size):
            if any(own <= set(names) for own in found):
                continue
            for chosen in product(*(options[name] for name in names)):
                overrides = {key: value for option in chosen for key, value in option}
                needed = predict(changed(run, overrides))
                if limits.allow(needed):
                    found.append(set(names))
                    yield Change(overrides, needed)
                    break


def _options(run: RunConfig, limits: Limits) -> dict[str, list[Option]]:
    """What can be changed, by name, with its possible values: mildest first.

    Checkpointing costs a fifth more time. Smaller batches that add up to the same step cost some
    time. 4 bits cost some quality and time, a lower rank costs quality, and fewer rounds cost most.
    """
    options: dict[str, list[Option]] = {}
    train, model, adapter = run.train, run.model, run.adapter
    if limits.memory_bytes is not None:
        if not model.gradient_checkpointing and adapter.kind != "prefix":
            options["checkpointing"] = [(("model.gradient_checkpointing", True),)]
        options["batch"] = [
            (("train.batch_size", size), ("train.accumulation", train.accumulation * times))
            for size, times in _halves(train.batch_size)
        ]
        if model.quantization == "none" and adapter.kind not in ("full", *PROMPT_KINDS):
            options["bits"] = [(("model.quantization", "nf4"),)]
    smaller = limits.memory_bytes is not None or limits.size_bytes is not None
    if adapter.kind == "lora" and smaller:
        least = max(adapter.ranks.values(), default=1)  # no client's rank is above the server's
        lower = [rank for rank, _ in _halves(adapter.rank) if rank >= least]
        options["rank"] = [(("adapter.rank", rank),) for rank in lower]
    if limits.size_bytes is not None or limits.seconds is not None:
        options["rounds"] = [(("rounds", rounds),) for rounds, _ in _halves(run.rounds)]
    return {name: own for name, own in options.items() if own}


def _halves(number: int) -> list[tuple[int, int]]:
    """Repeated halves, down to 1, each with how many of them make up `number`.

    >>> _halves(12)
    [(6, 2), (3, 4), (1, 12)]
    """
    found: list[tuple[int, int]] = []
    half = number // 2
    while half >= 1:
        found.append((half, -(-number // half)))
        half //= 2
    return found


def changed(run: RunConfig, overrides: Mapping[str, Any]) -> RunConfig:
    """A recipe with new values for dotted keys."""
    for key, value in overrides.items():
        section, _, name = key.rpartition(".")
        if not section:
            run = run.model_copy(update={name: value})
            continue
        part = getattr(run, section).model_copy(update={name: value})
        run = run.model_copy(update={section: part})
    return run
