"""What a recipe may ask of clients that share a batch, or of processes that share a client."""

from collections.abc import Iterator

from silotune.recipes.schema import RunConfig


def of_shared_work(run: RunConfig) -> Iterator[tuple[str, str]]:
    """What cannot be done together, as (key, reason)."""
    yield from _of_clients_together(run)
    yield from _of_one_client(run)


def _of_clients_together(run: RunConfig) -> Iterator[tuple[str, str]]:
    """As above, if the recipe asks for a number of clients in one batch.

    With "auto", such clients are trained one after another instead.
    """
    if run.runtime.together in (1, "auto"):
        return
    for what, why in obstacles(run):
        yield "runtime.together", f"cannot be used with {what}: {why}"


def _of_one_client(run: RunConfig) -> Iterator[tuple[str, str]]:
    """As above, when several processes train one client."""
    if run.runtime.client_processes == 1:
        return
    if run.runtime.together != 1:
        yield (
            "runtime.client_processes",
            f"cannot be used with runtime.together = {run.runtime.together}: one trains a client "
            "on several processes, the other several clients on one",
        )
    if run.privacy.unit == "record":
        yield (
            "runtime.client_processes",
            "cannot be used with privacy.unit = 'record': the gradient of every row is clipped, "
            "and noise is added once, in one process",
        )


def obstacles(run: RunConfig) -> Iterator[tuple[str, str]]:
    """What keeps a recipe's clients from being trained in one batch, as (key and value, reason).

    More may follow from the model, see `stacked.why_not_stacked`.
    """
    adapter, model, train = run.adapter, run.model, run.train
    if adapter.kind != "lora":
        yield f"adapter.kind = '{adapter.kind}'", "only LoRA's factors can be stacked"
    if adapter.dora:
        yield "adapter.dora", "DoRA's norms need a copy of each weight for every client"
    if adapter.ranks:
        yield "adapter.ranks", "stacked factors have one rank"
    if model.quantization != "none":
        yield (
            f"model.quantization = '{model.quantization}'",
            "a quantised base may compute a row differently when other rows are beside it",
        )
    if model.gradient_checkpointing and adapter.dropout > 0:
        yield (
            "model.gradient_checkpointing and adapter.dropout",
            "the masks would have to be kept, which is the memory that checkpointing saves",
        )
    if run.task == "classify":
        yield "task = 'classify'", "the weights of a classification head are not stacked"
    if train.packing:
        yield "train.packing", "a packed batch is one row, and a row belongs to one client"
    if run.privacy.unit == "record":
        yield (
            "privacy.unit = 'record'",
            "the gradient of every row is clipped in passes of one client",
        )
