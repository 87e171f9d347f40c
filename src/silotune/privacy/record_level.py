"""Record-level privacy: each client clips every row's gradient and adds noise to their sum.

Unit: one row of one client; with the task prefer, a prompt with both of its answers. Adversary:
anyone who sees what the client sends, including the server, but not anyone with access to the
client itself. Neighbours: the client's rows with one row added or removed, while everything that
follows from the number of rows (sampling rate, noise, steps, lot size) stays the same and is
public. Assumes that nobody learns which rows a step used: each row is drawn independently
(Poisson), at the client. A step's sum is divided by the expected number of rows, never by the drawn
number.

Dropout: every row of a step has a mask of its own, drawn from a fresh secret seed (row_dropout.py).
The masks of different rows and steps are independent and do not depend on which other rows there
are. So the proof of DP-SGD holds: compare two neighbours with the same lots and the same masks for
all rows that both have. Given these, the sums differ by the clipped gradient of the added row,
whose length is at most the clip norm whatever its mask. As this holds for all lots and masks, it
holds for their mixture (the divergence is jointly convex). It would not hold for masks from a
public seed or one stream per forward pass, where an added row changes the masks of the others, nor
for a draw that the rows of a forward pass share: `check_row_gradients` refuses models with either.
With seeded noise, masks follow the recipe's seed and a row's place; that protects nobody.

Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1. arXiv:1607.00133. Opacus
computes the gradients of single rows (Yousefpour et al. 2021, arXiv:2109.12298).
"""

import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn

from silotune.core.errors import ConfigError, ModelError
from silotune.privacy.noise import Noise
from silotune.privacy.row_dropout import RowDropout, Seeds

Uniform = Callable[[int], Tensor]
"""count -> that many numbers in [0, 1), float64."""


def draw_lots(
    num_examples: int, *, sampling_rate: float, num_lots: int, uniform: Uniform
) -> list[list[int]]:
    """Poisson sampling: each step takes each row with the same probability; a lot may be empty.

    Args:
        num_examples: Rows of the client.
        sampling_rate: The probability, in (0, 1].
        num_lots: Steps.
        uniform: Source of randomness; sampling amplifies nothing against someone who can predict
            it.

    Returns:
        The rows of every step.
    """
    drawn = [(uniform(num_examples) < sampling_rate).numpy() for _ in range(num_lots)]
    return [[row for row in range(num_examples) if lot[row]] for lot in drawn]


class RowGuard:
    """The sums of clipped row gradients during one call of `train`.

    Args:
        clip_norm: Bound on the L2 norm of a row's gradient over all trained tensors together.
        noise_multiplier: Standard deviation of the noise on a step's sum, in units of clip_norm.
        lot_size: Expected number of rows of a step; sums are divided by it.
        noise: Source of the noise.
        seeds: Source of the seeds from which rows draw their dropout masks.
    """

    def __init__(
        self,
        *,
        clip_norm: float,
        noise_multiplier: float,
        lot_size: float,
        noise: Noise,
        seeds: Seeds,
    ) -> None:
        self.clip_norm = clip_norm
        self.noise_multiplier = noise_multiplier
        self.lot_size = lot_size
        self.noise = noise
        self.seeds = seeds
        self._sums: dict[str, Tensor] = {}

    @contextmanager
    def watching(self, model: nn.Module) -> Generator[None]:
        """Inside, a backward pass stores every row's gradient at each trained tensor.

        Raises:
            ConfigError: Opacus is not installed.
            ModelError: Opacus cannot compute gradients of single rows in this model.
        """
        try:
            library: Any = import_module("opacus.grad_sample")
        except ImportError as error:
            raise ConfigError(
                "privacy.unit = 'record' needs opacus, which is not installed.\n"
                "  Install it: make env EXTRAS=privacy"
            ) from error
        for module in model.modules():
            own = any(p.requires_grad for p in module.parameters(recurse=False))
            if own and type(module) not in library.GradSampleHooks.GRAD_SAMPLERS:
                raise ModelError(
                    f"privacy.unit = 'record': {type(module).__name__} has trained tensors, and "
                    "Opacus cannot compute their gradient for a single row.\n"
                    "  Use adapter.kind = 'lora' without dora, on linear layers."
                )
        hooks = library.GradSampleHooks(model, batch_first=True, loss_reduction="sum")
        try:
            with warnings.catch_warnings():
                # opacus 1.6 also puts hooks on the lowest adapter, whose input is frozen
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                yield
        finally:
            hooks.cleanup()

    def dropout(self, num_rows: int) -> RowDropout:
        """Inside, a forward pass of this many rows draws each row's dropout masks by itself."""
        return RowDropout(num_rows, self.seeds)

    def add(
        self, row_losses: Tensor, learning: Mapping[str, nn.Parameter], *, sequences: int = 1
    ) -> None:
        """Add the clipped gradients of a forward pass to the step's sum.

        Args:
            row_losses: One loss for each row, (batch,), with a graph.
            learning: The trained tensors; their `grad` is left empty.
            sequences: How many sequences of the forward pass, one behind the other, are one row: 2
                for a pair, whose gradient is the sum of what both of its answers contribute.
        """
        torch.autograd.backward(row_losses.sum())
        rows = {name: _row_gradients(name, p, sequences) for name, p in learning.items()}
        found = {name: own for name, own in rows.items() if own is not None}
        norms = row_norms(found.values())
        # a row that overflows contributes nothing, so the sum of the others is unaffected
        usable = torch.isfinite(norms)
        factors = torch.where(usable, (self.clip_norm / norms.clamp(min=1e-300)).clamp(max=1), 0)
        all_usable = bool(usable.all())
        for name, own in found.items():
            whole = own if all_usable else torch.where(_like_rows(usable, own), own, 0)
            clipped = torch.einsum("n,n...->...", factors.to(own.dtype), whole)
            self._sums[name] = self._sums[name] + clipped if name in self._sums else clipped

    def release(self, learning: Mapping[str, nn.Parameter]) -> None:
        """End a step: each tensor's gradient becomes the noised sum over the expected rows."""
        for name, p in learning.items():
            noise = self.noise(p.shape, self.noise_multiplier * self.clip_norm)
            total = noise.to(p.device)
            if name in self._sums:  # otherwise the lot was empty, which must not show
                total = total + self._sums[name].double()
            p.grad = (total / self.lot_size).to(p.dtype)
        self._sums = {}


def _row_gradients(name: str, p: nn.Parameter, sequences: int) -> Tensor | None:
    """The gradient of every row, (batch, *shape), taken off the tensor; None if it has none."""
    own: Tensor | None = getattr(p, "grad_sample", None)
    whole, p.grad = p.grad, None
    if own is None and whole is not None:
        raise ModelError(
            f"privacy.unit = 'record': '{name}' has a gradient, but not for single rows.\n"
            "  Turn off model.gradient_checkpointing, or use another kind of adapter."
        )
    cast(Any, p).grad_sample = None
    if own is None or sequences == 1:
        return own
    return own.reshape(-1, sequences, *own.shape[1:]).sum(1)


def _like_rows(values: Tensor, own: Tensor) -> Tensor:
    """Reshape (batch,) to (batch, 1, ...), to broadcast over the gradients of rows."""
    return values.reshape(-1, *(1 for _ in own.shape[1:]))


def row_norms(gradients: Iterable[Tensor]) -> Tensor:
    """The L2 norm of every row's gradient over all tensors together, (batch,), float64.

    Args:
        gradients: One per tensor, (batch, *shape).
    """
    squares = [own.flatten(1).square().sum(1, dtype=torch.float64) for own in gradients]
    return torch.stack(squares).sum(0).sqrt()
