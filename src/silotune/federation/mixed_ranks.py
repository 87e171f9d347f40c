"""Clients that train LoRA factors of a lower rank than the server's.

In simulation the recipe says who (`adapter.ranks`), in deployment each client's own configuration
(`limits.rank`). The scaling of the factors is the same at every rank, so a truncated adapter is the
function of its first columns and rows, and products of all clients can be added.
"""

from collections.abc import Callable, Collection

from silotune.core.algorithm import Algorithm, with_ranks
from silotune.core.errors import ConfigError, UpdateError
from silotune.core.lora import pairs_of
from silotune.core.types import Broadcast
from silotune.core.wording import did_you_mean
from silotune.models.adapters import AdapterConfig
from silotune.recipes.schema import RunConfig


def with_client_ranks(
    algorithm: Algorithm, run: RunConfig, reported: Callable[[str], int] | None = None
) -> Algorithm:
    """The algorithm of a run whose clients may have lower ranks; as it is if they cannot.

    Args:
        algorithm: The recipe's.
        run: The recipe.
        reported: The rank that a client says it trains at, 0 if unknown; None in simulation, where
            `adapter.ranks` says it.
    """
    adapter = run.adapter
    if adapter.kind != "lora" or not run.algorithm.facts.mixed_ranks:
        return algorithm
    if reported is None and not adapter.ranks:
        return algorithm
    said = adapter.rank_of if reported is None else reported

    def rank_of(client: str) -> int | None:
        rank = said(client)
        return rank if 0 < rank < adapter.rank else None

    return with_ranks(algorithm, rank_of)


def check_client_ranks(run: RunConfig, names: Collection[str], *, real: bool) -> None:
    """Refuse ranks of clients that the run does not have, or that set their rank themselves.

    Raises:
        ConfigError: Names the client; a similar name is suggested.
    """
    ranks = run.adapter.ranks
    if ranks and real:
        raise ConfigError(
            "adapter.ranks only has an effect in simulation: real clients set rank in [limits] of "
            "their own configuration.\n  Remove adapter.ranks."
        )
    for client in ranks:
        if client not in names:
            raise ConfigError(
                f"adapter.ranks.{client}: this run has no client '{client}'."
                f"{did_you_mean(client, names)}\n  Its clients: {', '.join(sorted(names)[:20])}."
            )


def own_adapter(run: RunConfig, limit: int | None) -> AdapterConfig:
    """The adapter that a real client with `limits.rank = limit` trains.

    Raises:
        ValueError: The recipe's rank is above the limit, and its algorithm or its options need the
            same rank at every client.
    """
    adapter, facts = run.adapter.model_copy(update={"ranks": {}}), run.algorithm.facts
    if limit is None or adapter.kind != "lora" or adapter.highest_rank <= limit:
        return adapter
    above = f"adapter.rank = {adapter.highest_rank} is above limits.rank = {limit}, and "
    if not facts.mixed_ranks:
        name = getattr(run.algorithm, "name", "")
        raise ValueError(f"{above}algorithm.name = '{name}' needs one rank at all clients")
    if "rank_pattern" in adapter.peft:
        raise ValueError(f"{above}adapter.peft.rank_pattern sets ranks of single modules")
    return adapter.at_rank(limit)


def check_rank(run: RunConfig, client: str, broadcast: Broadcast) -> None:
    """Refuse an adapter of a higher rank than a client trains at: its memory was planned for it.

    Raises:
        UpdateError: Names both ranks.
    """
    if run.adapter.kind != "lora":
        return
    own = run.adapter.ranks.get(client, run.adapter.highest_rank)
    for pair in pairs_of(broadcast.adapter):
        if (rank := len(broadcast.adapter[pair.right])) > own:
            raise UpdateError(
                f"client '{client}', round {broadcast.round}: '{pair.right}' arrives at rank "
                f"{rank}, this client trains at rank {own}.\n"
                "  Use the same version of silotune and the same recipe on both sides."
            )
