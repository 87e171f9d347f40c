"""Dropout whose masks are drawn for each row, whatever other rows are in the forward pass.

PyTorch draws the masks of a forward pass from one stream. One more row shifts the stream, so all
rows behind it get other masks, and so other gradients: a row would move the sum by more than its
clipped gradient. Here every row's masks come from a seed of the row. This module knows neither
clipping nor noise; why it is needed is said in record_level.py.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from silotune.core.errors import ModelError

Seeds = Callable[[int], Sequence[int]]
"""count -> that many fresh seeds, each from 0 to 2**63 - 1."""


def _dropout_draws(*args: Any, **named: Any) -> bool:
    given = dict(zip(("input", "p", "training"), args, strict=False)) | named
    return given.get("training", True) and given.get("p", 0.5) > 0


def _attention_draws(*args: Any, dropout_p: float = 0.0, **_: Any) -> bool:
    return (args[4] if len(args) > 4 else dropout_p) > 0


DRAWS: dict[Callable[..., Any], Callable[..., bool]] = {
    F.dropout: _dropout_draws,
    torch.dropout: _dropout_draws,
    F.scaled_dot_product_attention: _attention_draws,
}
"""PyTorch's random functions of a forward pass, and whether a call with given arguments draws."""


class RowDropout(TorchFunctionMode):
    """Inside, dropout runs row by row, each row with a seed for every call.

    So a row's masks are a function of its seeds and of the padded length. At any length they are
    independent coins; with fresh seeds, their distribution does not depend on other rows.

    Args:
        num_rows: Rows of the forward pass, along the first dimension of its tensors.
        seeds: Called once for every call of a random function, with `num_rows`.
    """

    def __init__(self, num_rows: int, seeds: Seeds) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.seeds = seeds

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Called by PyTorch in place of each of its functions.

        Raises:
            ModelError: Dropout of a tensor that rows share.
        """
        named = kwargs or {}
        draws = DRAWS.get(func)
        if draws is None or not draws(*args, **named):
            return func(*args, **named)
        return self._row_by_row(func, args, named)

    def _row_by_row(
        self, func: Callable[..., Tensor], args: tuple[Any, ...], named: dict[str, Any]
    ) -> Tensor:
        first: Tensor = args[0] if args else next(iter(named.values()))
        if first.shape[0] % self.num_rows:
            raise ModelError(
                f"privacy.unit = 'record': dropout of a tensor of shape {tuple(first.shape)}, "
                f"which cannot be split into {self.num_rows} rows.\n"
                "  Set adapter.dropout = 0, or use a base without dropout."
            )

        def part(value: Any, row: int) -> Any:
            """One row of an argument; an argument that all rows share stays whole."""
            whole = not isinstance(value, Tensor) or value.ndim != first.ndim
            if whole or value.shape[0] != first.shape[0]:
                return value
            return value.chunk(self.num_rows)[row]

        found: list[Tensor] = []
        on_gpu = [first.device] if first.device.type == "cuda" else []
        with cast(Any, torch.random).fork_rng(devices=on_gpu):
            for row, seed in enumerate(self.seeds(self.num_rows)):
                _seed(first.device, seed)
                own = {key: part(value, row) for key, value in named.items()}
                found.append(func(*(part(value, row) for value in args), **own))
        return torch.cat(found)


def _seed(device: torch.device, seed: int) -> None:
    if device.type == "cpu":  # torch.manual_seed also looks for GPUs, which takes longer
        torch.default_generator.manual_seed(seed)
    else:
        cast(Any, torch).manual_seed(seed)
