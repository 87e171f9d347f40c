"""What a private round checks first: the gradient of a single row is that of the row alone.

A library decides which hooks a model's layers need, and a wrong one would silently break the
guarantee. So each client compares two rows with a plain loop before it trains.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from silotune.core.errors import ModelError
from silotune.models.loading import LoadedModel
from silotune.privacy.record_level import RowGuard
from silotune.training.tasks.base import Example, Task, row_losses

LENGTHS = (5, 8)
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
        ModelError: They differ, so this model gives wrong gradients for single rows.
    """
    two = [_made_up(loaded, length, pairs=pairs) for length in LENGTHS]
    for name, p in loaded.parameters.items():
        p.requires_grad_(name in learning)
    with _without_dropout(loaded.model):
        found, expected = _guarded(loaded, task, two, learning), _plain(loaded, task, two, learning)
    error = sum(float((found[n] - expected[n]).square().sum()) for n in found) ** 0.5
    size = sum(float(t.square().sum()) for t in expected.values()) ** 0.5
    # half precision rounds differently if a batch is padded
    if error > (0.01 if loaded.dtype == torch.float32 else 0.3) * size:
        raise ModelError(
            "privacy.unit = 'record': this model gives a wrong gradient for a single row: it "
            "differs from that of the row alone.\n  Use another base, or fewer adapter.targets."
        )


def _made_up(loaded: LoadedModel, length: int, *, pairs: bool) -> Example:
    """Some tokens, none of which is the padding token."""
    size = loaded.model.get_input_embeddings().weight.shape[0]
    filling = loaded.tokenizer.pad_token_id
    ids = [n for n in range(7 * length, 7 * length + 2 * length) if n % size != filling]
    tokens = torch.tensor([n % size for n in ids[:length]])
    segments = torch.zeros_like(tokens) if pairs else None
    return Example(tokens, torch.arange(length) > 0, label=0, segments=segments)


def _guarded(
    loaded: LoadedModel, task: Task, rows: Sequence[Example], learning: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    batch = task.collate(rows)
    guard = RowGuard(clip_norm=TINY, noise_multiplier=0.0, lot_size=TINY, noise=_none)
    with guard.watching(loaded.model):
        guard.add(row_losses(task.loss(loaded, batch), batch), learning)
        guard.release(learning)
    return _taken(learning)


def _plain(
    loaded: LoadedModel, task: Task, rows: Sequence[Example], learning: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in learning.items()}
    for row in rows:
        batch = task.collate([row])
        row_losses(task.loss(loaded, batch), batch).sum().backward()
        own = _taken(learning)
        norm = sum(float(t.square().sum()) for t in own.values()) ** 0.5
        total = {name: t + own[name] / max(norm, TINY) for name, t in total.items()}
    return total


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
def _without_dropout(model: nn.Module) -> Generator[None]:
    """Turn off dropout, which is drawn per row; hooks need training mode at trained tensors."""
    was = [module for module in model.modules() if module.training]
    model.eval()
    for module in model.modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            module.train()
    try:
        yield
    finally:
        model.eval()
        for module in was:
            module.training = True
