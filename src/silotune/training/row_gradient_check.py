"""What a private round checks first: the gradient of a single row is that of the row alone.

A library decides which hooks a model's layers need, and a wrong one would silently break the
guarantee. So would a random draw that depends on the other rows. So each client compares two rows
with a plain loop before it trains: once without dropout, with padding, and once with dropout, where
each row has the same masks in both.
"""

import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from silotune.core.errors import ModelError
from silotune.core.seeds import derive
from silotune.models.loading import LoadedModel
from silotune.privacy.record_level import RowGuard
from silotune.privacy.row_dropout import RowDropout, Seeds
from silotune.training.tasks.base import Example, Task, row_losses

PADDED, DROPPED = (5, 8), (8, 8)
"""Lengths of the two rows: without dropout, and with it, where a mask depends on the padding."""
TINY = 1e-9
"""A clip norm below every gradient, so that only the direction of each row's gradient counts."""


def check_row_gradients(
    loaded: LoadedModel, task: Task, learning: Mapping[str, nn.Parameter], *, pairs: bool = False
) -> None:
    """Compare the clipped sum of two made-up rows with that of each trained alone.

    The rows are not the client's: the server learns whether the check fails, which must not depend
    on a client's rows.

    Args:
        loaded: The model; its tensors keep their values, and only `learning` requires gradients.
        task: Computes the losses.
        learning: The tensors to be trained.
        pairs: Whether tokens are marked with the text of a pair that they belong to.

    Raises:
        ModelError: They differ, so this model gives wrong gradients for single rows; or the model
            draws random numbers that are not a row's own.
    """
    for name, p in loaded.parameters.items():
        p.requires_grad_(name in learning)
    for lengths, dropout in ((PADDED, False), (DROPPED, True)):
        make = _made_up_pair if task.reference is not None else _made_up
        two = [make(loaded, length, pairs=pairs) for length in lengths]
        with _training(loaded.model, dropout=dropout):
            found = _guarded(loaded, task, two, learning)
            expected = _plain(loaded, task, two, learning)
        error = sum(float((found[n] - expected[n]).square().sum()) for n in found) ** 0.5
        size = sum(float(t.square().sum()) for t in expected.values()) ** 0.5
        # half precision rounds differently if a batch is padded
        if error > (0.01 if loaded.dtype == torch.float32 else 0.3) * size:
            what = "with dropout, " if dropout else ""
            fix = "Set adapter.dropout = 0, or use" if dropout else "Use"
            raise ModelError(
                f"privacy.unit = 'record': {what}this model gives a wrong gradient for a single "
                f"row: it differs from that of the row alone.\n  {fix} another base, or fewer "
                "adapter.targets."
            )


def _made_up(loaded: LoadedModel, length: int, *, pairs: bool) -> Example:
    """Some tokens, none of which is the padding token."""
    size = loaded.model.get_input_embeddings().weight.shape[0]
    filling = loaded.tokenizer.pad_token_id
    ids = [n for n in range(7 * length, 7 * length + 2 * length) if n % size != filling]
    tokens = torch.tensor([n % size for n in ids[:length]])
    segments = torch.zeros_like(tokens) if pairs else None
    return Example(tokens, torch.arange(length) > 0, label=0, segments=segments)


def _made_up_pair(loaded: LoadedModel, length: int, *, pairs: bool) -> Example:  # noqa: ARG001
    """Two sequences of different lengths, and a reference that says nothing about them."""
    one, other = (_made_up(loaded, n, pairs=False) for n in (length, length - 2))
    return Example(
        torch.cat([one.ids, other.ids]),
        torch.cat([one.trained, other.trained]),
        segments=torch.arange(2).repeat_interleave(torch.tensor([length, length - 2])),
        reference=torch.zeros(2),
    )


def _guarded(
    loaded: LoadedModel, task: Task, rows: Sequence[Example], learning: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    batch = task.collate(rows)
    seeds = _seeds_of(range(batch.ids.shape[0]))
    guard = RowGuard(clip_norm=TINY, noise_multiplier=0.0, lot_size=TINY, noise=_none, seeds=seeds)
    with guard.watching(loaded.model):
        with guard.dropout(batch.ids.shape[0]), _no_other_draw(loaded.device):
            loss = task.loss(loaded, batch)
        guard.add(row_losses(loss, batch), learning, sequences=batch.sequences)
        guard.release(learning)
    return _taken(learning)


def _plain(
    loaded: LoadedModel, task: Task, rows: Sequence[Example], learning: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in learning.items()}
    for n, row in enumerate(rows):
        batch = task.collate([row])
        own_sequences = range(n * batch.sequences, (n + 1) * batch.sequences)
        with RowDropout(batch.sequences, _seeds_of(own_sequences)):
            row_losses(task.loss(loaded, batch), batch).sum().backward()
        own = _taken(learning)
        norm = sum(float(t.square().sum()) for t in own.values()) ** 0.5
        total = {name: t + own[name] / max(norm, TINY) for name, t in total.items()}
    return total


def _seeds_of(sequences: Sequence[int]) -> Seeds:
    """Seeds that a sequence has in every batch: from its number and that of the call."""
    calls = itertools.count()

    def draw(count: int) -> list[int]:
        call = next(calls)
        return [derive(0, "check", one, call) for one in sequences[:count]]

    return draw


@contextmanager
def _no_other_draw(device: torch.device) -> Iterator[None]:
    """Refuse a model that draws from PyTorch's common stream, as layers that are skipped do.

    What rows of one forward pass share depends on which rows these are.
    """
    before = _streams(device)
    yield
    if any(not torch.equal(a, b) for a, b in zip(before, _streams(device), strict=True)):
        raise ModelError(
            "privacy.unit = 'record': in training, this model draws random numbers other than "
            "dropout masks, which rows would share.\n  Use a base without layer dropout."
        )


def _streams(device: torch.device) -> list[Tensor]:
    on_gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_gpu]


def _taken(learning: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Take the gradients off the tensors; zeros if a tensor has none."""
    found = dict[str, Tensor]()
    for name, p in learning.items():
        found[name] = torch.zeros_like(p) if p.grad is None else p.grad
        p.grad = None
    return {name: t.double() for name, t in found.items()}


def _none(shape: Sequence[int], std: float) -> Tensor:  # noqa: ARG001 - the signature of Noise
    return torch.zeros(tuple(shape), dtype=torch.float64)


@contextmanager
def _training(model: nn.Module, *, dropout: bool) -> Generator[None]:
    """Training mode; without dropout, only of modules that have trained tensors: hooks need it."""
    was = [module for module in model.modules() if module.training]
    model.train(dropout)
    for module in model.modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            module.train()
    try:
        yield
    finally:
        model.eval()
        for module in was:
            module.training = True
