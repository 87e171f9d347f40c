"""The local loop: `train(loaded, steps, ...) -> LocalResult`. Plain PyTorch, on one screen.

No trainer object is built per client and round. The loop knows neither clients nor the network;
what an algorithm changes in local training arrives as a `LocalRule`. local_step.py has the parts of
a step.
"""

import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from silotune.core.algorithm import LocalContext, LocalRule
from silotune.core.errors import UpdateError
from silotune.core.own_code import PYTHON_NAME
from silotune.core.seeds import generator
from silotune.core.types import Config
from silotune.models.loading import LoadedModel
from silotune.models.quantization import tame_bitsandbytes
from silotune.privacy.record_level import RowGuard
from silotune.training.local_step import (
    LocalResult,
    Totals,
    apply_rule,
    backward,
    optimizer_state,
    restore_optimizer,
    take_step,
    training_mode,
)
from silotune.training.tasks.base import Batch, Example, Task

Gradient = Callable[
    [LoadedModel, Sequence[Batch], Task, Mapping[str, nn.Parameter], RowGuard | None, Totals], None
]
"""Runs a step's forward and backward passes, as `backward` does."""
Compat = Literal["late-schedule", "same-samples", "no-end-token"]


class TrainConfig(Config):
    """Local training at each client."""

    batch_size: int = Field(default=8, ge=1)
    """Rows in one forward pass."""
    accumulation: int = Field(default=1, ge=1)
    """Forward passes per optimizer step; the step equals that of one batch of batch_size *
    accumulation rows."""
    local_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps per round. Give this or local_epochs."""
    local_epochs: int | None = Field(default=None, ge=1)
    """Passes over the client's rows per round; 1 if local_steps is absent too."""
    optimizer: Literal["adamw", "sgd", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = (
        "adamw"
    )
    """Local optimizer. Its moments are reset for every client and round unless keep_moments is
    true. The 8-bit ones, and the paged ones, whose pages leave the GPU when it is full, are from
    bitsandbytes (Dettmers et al. 2022, arXiv:2110.02861); if the device does not support one, the
    closest supported optimizer is used, with a notice."""
    keep_moments: bool = False
    """adamw: whether each client keeps its moments from round to round, on its own disk. With few
    local steps, moments that begin again are mostly those of the first batch. Clients that are
    rarely asked keep old ones."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate of the first round."""
    lr_min: float = Field(default=0.0, ge=0)
    """Learning rate that linear and cosine schedules move towards over the rounds."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls from round to round; within a round it is constant after the
    warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps at the start of every round during which the learning rate rises to the round's
    value."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled for adamw, as an L2 term for sgd."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Bound on the L2 norm of the gradient over all trained tensors; 0 turns clipping off. Not
    used with privacy.unit = "record", which bounds every row's gradient instead."""
    loss: str | None = Field(default=None, pattern=f"^{PYTHON_NAME}$")
    """A loss of your own for the clients' training, in place of the likelihood:
    python:<module>:<function>, see docs/how-to/add-a-metric-or-a-loss.md. A real client accepts it
    only if its own limits.functions names it. Held-out losses stay likelihoods."""
    max_length: int = Field(default=512, ge=2)
    """Maximum length of a row in tokens; longer rows are truncated at the end."""
    packing: bool = False
    """instruct: concatenate the rows of a forward pass instead of padding them. No row attends to
    another, so the result is the same up to rounding."""
    compat: tuple[Compat, ...] = ()
    """Behave like published systems, for comparison. late-schedule: count rounds from 1, so lr
    itself is never used and the last round runs at lr_min. same-samples: a client starts every
    round with the same rows. no-end-token: answers have no end token, so models do not learn to
    stop; needs one of silotune's own templates."""

    @model_validator(mode="after")
    def _no_contradiction(self) -> "TrainConfig":
        if self.local_steps is not None and self.local_epochs is not None:
            raise ValueError("give local_steps or local_epochs, not both")
        if self.keep_moments and self.optimizer != "adamw":
            raise ValueError("keep_moments needs optimizer = 'adamw'")
        if self.lr_min > self.lr:
            raise ValueError(f"lr_min = {self.lr_min:g} is above lr = {self.lr:g}")
        if self.schedule == "constant" and self.lr_min > 0:
            raise ValueError(
                "lr_min has no effect with schedule = 'constant'; use linear or cosine"
            )
        if self.schedule == "constant" and "late-schedule" in self.compat:
            raise ValueError("compat = 'late-schedule' has no effect with schedule = 'constant'")
        if self.local_steps is not None and self.warmup_steps >= self.local_steps:
            raise ValueError("warmup_steps must be less than local_steps")
        return self


def round_lr(cfg: TrainConfig, round_: int, rounds: int) -> float:
    """The learning rate of round `round_`, counted from 1, out of `rounds`.

    cosine: `min + (max - min)(1 + cos(pi t / T)) / 2`; linear: `max + (min - max) t / T`; with t =
    round - 1, so that the first round uses `lr`, or t = round with compat = "late-schedule".
    """
    t = (round_ if "late-schedule" in cfg.compat else round_ - 1) / rounds
    if cfg.schedule == "cosine":
        return cfg.lr_min + (cfg.lr - cfg.lr_min) * (1 + math.cos(math.pi * t)) / 2
    if cfg.schedule == "linear":
        return cfg.lr + (cfg.lr_min - cfg.lr) * t
    return cfg.lr


def step_lr(cfg: TrainConfig, lr: float, step: int) -> float:
    """The learning rate of step `step`, counted from 0: it rises in equal parts and is never 0."""
    return lr * min(1.0, (step + 1) / (cfg.warmup_steps + 1))


def num_rows(cfg: TrainConfig, num_examples: int) -> int:
    """Rows that a client with `num_examples` examples takes from its stream in one round."""
    if cfg.local_steps is not None:
        return cfg.local_steps * cfg.batch_size * cfg.accumulation
    return (cfg.local_epochs or 1) * num_examples


def stream(num_examples: int, seed: int, client: str, *, start: int = 0) -> Iterator[int]:
    """A client's endless stream of row indices: one seeded permutation after another.

    Args:
        num_examples: Rows of the client's train part.
        seed: The run's seed.
        client: Names the stream.
        start: Rows that the client has already taken.
    """
    epoch, skip = divmod(start, num_examples)
    while True:
        gen = generator(seed, "stream", client, epoch)
        yield from torch.randperm(num_examples, generator=gen).tolist()[skip:]
        epoch, skip = epoch + 1, 0


def plan_steps(
    rows: Sequence[int],
    lengths: Sequence[int],
    cfg: TrainConfig,
    gen: torch.Generator,
) -> list[list[list[int]]]:
    """Split a round's rows into optimizer steps of forward batches, grouped by length.

    Rows are sorted by length only inside windows, and a window is never longer than the client's
    data, so that a small client does not get batches of one repeated row. The order of batches is
    random.

    Args:
        rows: Row indices as they come from the stream.
        lengths: Tokens of every row of the client.
        cfg: batch_size and accumulation.
        gen: Named by (seed, "order", client, round).

    Returns:
        Steps, each a list of batches, each a list of row indices.
    """
    size = cfg.batch_size
    longest = 32 * size * cfg.accumulation
    window = max(size, min(longest, len(lengths)) // size * size)
    batches: list[list[int]] = []
    for start in range(0, len(rows), window):
        ordered = sorted(rows[start : start + window], key=lambda row: (lengths[row], row))
        batches += [ordered[i : i + size] for i in range(0, len(ordered), size)]
    order = torch.randperm(len(batches), generator=gen).tolist()
    shuffled = [batches[i] for i in order]
    n = cfg.accumulation
    return [shuffled[i : i + n] for i in range(0, len(shuffled), n)]


def plan_lots(
    lots: Iterable[Sequence[int]], lengths: Sequence[int], cfg: TrainConfig
) -> list[list[list[int]]]:
    """Split lots of any size into forward batches of at most `batch_size` rows of similar length.

    Args:
        lots: The rows of every optimizer step; a step may have none.
        lengths: Tokens of every row of the client.
        cfg: batch_size.

    Returns:
        Steps, each a list of batches, each a list of row indices.
    """
    steps: list[list[list[int]]] = []
    for lot in lots:
        ordered = sorted(lot, key=lambda row: (lengths[row], row))
        size = cfg.batch_size
        steps.append([ordered[i : i + size] for i in range(0, len(ordered), size)])
    return steps


def build_batches(
    steps: Sequence[Sequence[Sequence[int]]],
    examples: Sequence[Example],
    task: Task,
    *,
    packed: bool = False,
    parts: int = 1,
) -> Iterator[list[Batch]]:
    """The planned steps as tensors, made only when they are needed.

    Args:
        steps: The rows of each forward batch of each step.
        examples: What the rows are.
        task: Joins them.
        packed: Whether rows are concatenated instead of padded.
        parts: Into how many batches each one is split, if it has as many rows. Rows are dealt out
            in turn, so that each part has long and short ones.
    """
    join = task.pack if packed and task.pack is not None else task.collate
    for step in steps:
        dealt = [batch[n::parts] for batch in step for n in range(min(parts, len(batch)))]
        yield [join([examples[row] for row in part]) for part in dealt]


def train(
    loaded: LoadedModel,
    steps: Iterable[Sequence[Batch]],
    task: Task,
    cfg: TrainConfig,
    rule: LocalRule,
    context: LocalContext,
    *,
    round_: int,
    lr: float,
    seed: int,
    guard: RowGuard | None = None,
    must_be_finite: bool = True,
    kept: Mapping[str, Mapping[str, Tensor]] | None = None,
    tell: Callable[[int, int], None] | None = None,
    gradient: Gradient = backward,
) -> LocalResult:
    """Train the model in place, one optimizer step per element of `steps`.

    Args:
        loaded: Contains the received adapter; afterwards the trained one.
        steps: The forward batches of each optimizer step. The step's loss is the mean over the
            trained tokens of all of them together, so accumulation changes memory and not the
            result.
        task: Computes the loss.
        cfg: Optimizer settings.
        rule: What the algorithm changes.
        context: What the rule can see.
        round_: Decides which tensors are trained.
        lr: The round's learning rate.
        seed: Seed of the dropout, in a forked generator; not used with a guard.
        guard: Clips each row's gradient and adds noise to every step; for record-level privacy.
        must_be_finite: Whether a loss that is not finite is an error; not if the client adds noise
            itself, because the error would reveal something about its rows.
        kept: The optimizer's memory from an earlier training, empty at the first; None for an
            optimizer that begins again. With it, only the first training has a warm-up.
        tell: Told the steps and the tokens so far, after every step; the device may be behind.
        gradient: Leaves a step's gradient at the trained tensors; by default in this process.

    Raises:
        UpdateError: The loss became NaN or infinite.
        ModelError: With a guard: this model gives no gradients for single rows.
    """
    learning = {n: p for n, p in loaded.parameters.items() if rule.trains(n, round_)}
    for name, p in loaded.parameters.items():
        p.requires_grad_(name in learning)
    fused = not loaded.has_adapter
    optimizer = build_optimizer(learning.values(), cfg, lr, fused=fused, device=loaded.device)
    restore_optimizer(optimizer, learning, kept or {})
    warm = cfg.warmup_steps if kept else 0
    totals = Totals.zero(loaded.device)
    with training_mode(loaded, seed, guard):
        for batches in steps:
            gradient(loaded, batches, task, learning, guard, totals)
            apply_rule(rule, learning, context, totals)
            if cfg.clip_norm > 0 and guard is None:
                nn.utils.clip_grad_norm_(learning.values(), cfg.clip_norm)
            take_step(optimizer, step_lr(cfg, lr, totals.num_steps + warm), totals)
            if tell is not None:
                tell(totals.num_steps, totals.num_tokens)
    result = totals.result()
    if kept is not None:
        result = replace(result, optimizer=optimizer_state(optimizer, learning))
    if must_be_finite:
        check_loss(result)
    return result


def check_loss(result: LocalResult) -> None:
    """Refuse a training that has ended in NaN or infinity.

    Raises:
        UpdateError: Its loss is not finite.
    """
    if not math.isfinite(result.train_loss):
        raise UpdateError(
            "the training loss is not a number.\n  Lower train.lr or set train.clip_norm."
        )


def pick_optimizer(wanted: str, device: torch.device) -> tuple[str, str]:
    """The optimizer to use on this device, and a notice if it is not the wanted one."""
    if wanted in ("adamw", "sgd"):
        return wanted, ""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "adamw", f"train.optimizer = '{wanted}' needs bitsandbytes; using adamw"
    if device.type == "mps":
        return "adamw", f"train.optimizer = '{wanted}' is not available on Apple GPUs; using adamw"
    if device.type == "cpu" and wanted.startswith("paged_"):
        found = "adamw_8bit" if wanted == "paged_adamw_8bit" else "adamw"
        return found, f"train.optimizer = '{wanted}' only pages GPU memory; using {found}"
    return wanted, ""


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    cfg: TrainConfig,
    lr: float,
    *,
    fused: bool,
    device: torch.device,
) -> torch.optim.Optimizer:
    """The recipe's optimizer, or the closest one that the device supports.

    Args:
        parameters: The trained tensors.
        cfg: Kind and weight decay.
        lr: Learning rate of the first step.
        fused: One pass over memory per step instead of about ten, which take up to a third of the
            step if all weights of a model are trained. The same update up to rounding.
        device: Where the parameters are, see `pick_optimizer`.
    """
    kind, _ = pick_optimizer(cfg.optimizer, device)
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=lr, weight_decay=cfg.weight_decay, fused=fused)
    if kind == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=cfg.weight_decay, fused=fused)
    tame_bitsandbytes()
    from bitsandbytes.optim import adamw

    build = {
        "adamw_8bit": adamw.AdamW8bit,
        "paged_adamw_8bit": adamw.PagedAdamW8bit,
        "paged_adamw_32bit": adamw.PagedAdamW32bit,
    }[kind]
    return build(parameters, lr=lr, weight_decay=cfg.weight_decay)
