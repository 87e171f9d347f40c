"""Record-level privacy: at each client, every row's gradient is clipped, and their sum is noised.

Unit: one row of one client. Adversary: whoever sees what the client sends, the server included;
not who can look into the client. Neighbours: the client's rows with one row added or removed.
Assumes that nobody learns which rows a step took: each row is drawn by itself (Poisson), at the
client. A step's sum is divided by the expected number of rows, never by the drawn one. How many
rows the client has is taken as known.

Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1. arXiv:1607.00133. The
gradients of single rows are Opacus' (Yousefpour et al. 2021, arXiv:2109.12298).
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

Uniform = Callable[[int], Tensor]
"""count -> so many numbers in [0, 1), float64."""


def draw_lots(
    num_examples: int, *, sampling_rate: float, num_lots: int, uniform: Uniform
) -> list[list[int]]:
    """Poisson sampling: each step takes each row with the same probability; a lot may be empty.

    Args:
        num_examples: Rows of the client.
        sampling_rate: The probability, in (0, 1].
        num_lots: Steps.
        uniform: Where chance comes from; who can foresee it gets no gain by sampling.

    Returns:
        The rows of every step.
    """
    drawn = [(uniform(num_examples) < sampling_rate).numpy() for _ in range(num_lots)]
    return [[row for row in range(num_examples) if lot[row]] for lot in drawn]


class RowGuard:
    """One training's sums of clipped row gradients. Lives for one call of `train`.

    Args:
        clip_norm: Bound on the L2 norm of a row's gradient over all tensors that learn together.
        noise_multiplier: Standard deviation of the noise on a step's sum, in units of clip_norm.
        lot_size: The number of rows that a step is expected to take; what sums are divided by.
        noise: Where the noise comes from.
    """

    def __init__(
        self, *, clip_norm: float, noise_multiplier: float, lot_size: float, noise: Noise
    ) -> None:
        self.clip_norm = clip_norm
        self.noise_multiplier = noise_multiplier
        self.lot_size = lot_size
        self.noise = noise
        self._sums: dict[str, Tensor] = {}

    @contextmanager
    def watching(self, model: nn.Module) -> Generator[None]:
        """Inside, a backward pass leaves every row's own gradient at each tensor that learns.

        Raises:
            ConfigError: Opacus is not installed.
            ModelError: Opacus cannot tell rows apart in this model.
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
                    f"privacy.unit = 'record': {type(module).__name__} holds tensors that learn, "
                    "and Opacus cannot give their gradient for a single row.\n"
                    "  Use adapter.kind = 'lora' without dora, on linear layers."
                )
        hooks = library.GradSampleHooks(model, batch_first=True, loss_reduction="sum")
        try:
            with warnings.catch_warnings():
                # opacus 1.6 asks for hooks on the lowest adapter too, whose input is frozen
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                yield
        finally:
            hooks.cleanup()

    def add(self, row_losses: Tensor, learning: Mapping[str, nn.Parameter]) -> None:
        """Add the clipped gradients of a forward pass to the step's sum.

        Args:
            row_losses: One loss for each row, (batch,), with a graph.
            learning: The tensors that learn; their `grad` is left empty.
        """
        torch.autograd.backward(row_losses.sum())
        rows = {name: _row_gradients(name, p) for name, p in learning.items()}
        found = {name: own for name, own in rows.items() if own is not None}
        norms = row_norms(found.values())
        # a row that overflows counts for nothing, so that the sum of the others stays as it is
        usable = torch.isfinite(norms)
        factors = torch.where(usable, (self.clip_norm / norms.clamp(min=1e-300)).clamp(max=1), 0)
        all_usable = bool(usable.all())
        for name, own in found.items():
            whole = own if all_usable else torch.where(_beside(usable, own), own, 0)
            clipped = torch.einsum("n,n...->...", factors.to(own.dtype), whole)
            self._sums[name] = self._sums[name] + clipped if name in self._sums else clipped

    def release(self, learning: Mapping[str, nn.Parameter]) -> None:
        """End a step: the noised sum by the expected rows becomes the gradient of every tensor."""
        for name, p in learning.items():
            noise = self.noise(p.shape, self.noise_multiplier * self.clip_norm)
            total = noise.to(p.device)
            if name in self._sums:  # else the lot was empty, which must not show
                total = total + self._sums[name].double()
            p.grad = (total / self.lot_size).to(p.dtype)
        self._sums = {}


def _row_gradients(name: str, p: nn.Parameter) -> Tensor | None:
    """The gradient of every row, (batch, *shape), taken from the tensor; None if it has no part."""
    own: Tensor | None = getattr(p, "grad_sample", None)
    whole, p.grad = p.grad, None
    if own is None and whole is not None:
        raise ModelError(
            f"privacy.unit = 'record': '{name}' has a gradient, but not for single rows.\n"
            "  Switch model.gradient_checkpointing off, or use another kind of adapter."
        )
    cast(Any, p).grad_sample = None
    return own


def _beside(rows: Tensor, own: Tensor) -> Tensor:
    """(batch,) as (batch, 1, ...), to stand beside gradients of rows."""
    return rows.reshape(-1, *(1 for _ in own.shape[1:]))


def row_norms(gradients: Iterable[Tensor]) -> Tensor:
    """The L2 norm of every row's gradient over all tensors together, (batch,), float64.

    Args:
        gradients: Of every tensor, (batch, *shape).
    """
    squares = [own.flatten(1).square().sum(1, dtype=torch.float64) for own in gradients]
    return torch.stack(squares).sum(0).sqrt()
