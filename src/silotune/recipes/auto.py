"""`algorithm.name = "auto"`: which algorithm a recipe gets, by its keys and by facts.

Decided once, before anything is loaded. What only rounds can tell, such as the aggregation error,
has no part in it; docs/decisions/0060-auto-is-a-rule-about-facts.md says why.
"""

from silotune.algorithms import ALGORITHMS
from silotune.algorithms.base import Facts
from silotune.recipes.algorithm import ALGORITHM_CONFIGS, AutoConfig
from silotune.recipes.schema import RunConfig


def choose(run: RunConfig) -> tuple[str, str]:
    """The algorithm for a recipe, and why."""
    if run.adapter.kind != "lora" or run.adapter.dora:
        kind = "DoRA" if run.adapter.kind == "lora" else f"adapter.kind = '{run.adapter.kind}'"
        return "fedavg", f"{kind} has no two factors whose product is the change"
    if run.secure_sum.is_on and run.privacy.unit == "none":
        return first_exact_sum(), (
            "[secure_sum] hides single updates; it is linear in what clients send, so a sum "
            "suffices, and the mean is exact"
        )
    if run.privacy.unit != "none":
        return first_exact_sum(), (
            "[privacy] adds noise, which a product of two noisy factors multiplies; it is linear "
            "in what clients send, so a sum suffices, and the mean is exact"
        )
    return "fedavg", (
        "nothing hides single updates, and both factors are trained; aggregation_error says after "
        "every round how far their mean is from the mean of the clients' products"
    )


def first_exact_sum() -> str:
    """The first algorithm that `is_exact_sum` holds for."""
    return next(name for name, (config, _) in ALGORITHMS.items() if is_exact_sum(config.facts))


def is_exact_sum(facts: Facts) -> bool:
    """Whether a sum of deltas is all that a server needs, and its mean of products exact."""
    return facts.by_sums and facts.exact == "yes" and not facts.keeps


def why_chosen(run: RunConfig) -> str:
    """What is chosen for a recipe, in a sentence; empty if it names its algorithm."""
    if not isinstance(run.algorithm, AutoConfig):
        return ""
    name, why = choose(run)
    return f"algorithm.name = 'auto' is {name}: {why}"


def resolve_auto(run: RunConfig) -> RunConfig:
    """The recipe with the algorithm that is chosen for it; unchanged if it names one."""
    if not isinstance(run.algorithm, AutoConfig):
        return run
    name, _ = choose(run)
    chosen = ALGORITHM_CONFIGS[name](weights=run.algorithm.weights)
    return run.model_copy(update={"algorithm": chosen})
