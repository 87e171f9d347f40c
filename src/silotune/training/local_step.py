"""One optimizer step of the local loop, and what a training adds up over its steps."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from silotune.core.algorithm import LocalContext, LocalRule
from silotune.models.loading import LoadedModel
from silotune.privacy.record_level import RowGuard
from silotune.training.tasks.base import Batch, Task, row_losses


@dataclass(frozen=True)
class LocalResult:
    """What one client's training did."""

    train_loss: float
    """Mean over all targets of the round (tokens, labels or pairs), in nats, without penalties."""
    penalty: float
    """The rule's penalty at the last step; 0 without one."""
    num_steps: int
    num_tokens: int
    """Real tokens that went through the model, prompts included, padding excluded."""
    num_padded_tokens: int
    """The same, padding included."""
    num_targets: int
    """Number of targets of the loss: the weight of `train_loss` in a mean over clients."""
    lr_sum: float
    """Sum of the step sizes used."""
    seconds: float
    """Wall time of the loop; in a group, the client's share of it, by its padded tokens."""
    optimizer: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """The optimizer's memory, if it was asked for; see `optimizer_state`."""
    num_together: int = 1
    """How many clients were trained in the same passes."""


@dataclass(frozen=True)
class OwnTraining:
    """What is one client's own in a round of training: everything but model, task and settings."""

    steps: Iterable[Sequence[Batch]]
    context: LocalContext
    lr: float
    """The round's learning rate."""
    seed: int
    """Of its dropout."""
    must_be_finite: bool = True
    """Whether a loss that is not finite is an error."""
    kept: Mapping[str, Mapping[str, Tensor]] | None = None
    """The optimizer's memory, as in `train`."""
    tell: Callable[[int, int], None] | None = None
    """Told the steps and tokens so far, after every step."""


@dataclass
class Totals:
    """What one training adds up, step by step. Sums stay on the device, so that no step waits."""

    loss_sum: Tensor
    penalty: Tensor
    started: float
    num_steps: int = 0
    num_tokens: int = 0
    num_padded_tokens: int = 0
    num_targets: int = 0
    lr_sum: float = 0.0

    @classmethod
    def zero(cls, device: torch.device) -> "Totals":
        """Start the clock."""
        loss_sum = torch.zeros((), device=device, dtype=torch.float64)
        return cls(loss_sum, torch.zeros((), device=device), time.perf_counter())

    def result(self) -> LocalResult:
        """Wait for the device, and stop the clock."""
        return LocalResult(
            train_loss=float(self.loss_sum) / max(1, self.num_targets),
            penalty=float(self.penalty.detach()),
            num_steps=self.num_steps,
            num_tokens=self.num_tokens,
            num_padded_tokens=self.num_padded_tokens,
            num_targets=self.num_targets,
            lr_sum=self.lr_sum,
            seconds=time.perf_counter() - self.started,
        )


@contextlib.contextmanager
def training_mode(loaded: LoadedModel, seed: int, guard: RowGuard | None) -> Iterator[None]:
    """Inside, the model is in training mode, watched by the guard, and dropout follows the seed.

    With a guard, dropout follows the guard's seeds instead.
    """
    cuda = [loaded.device] if loaded.device.type == "cuda" else []
    watched = contextlib.nullcontext() if guard is None else guard.watching(loaded.model)
    with torch.random.fork_rng(devices=cuda), watched:
        torch.manual_seed(seed if guard is None else guard.seeds(1)[0])
        loaded.model.train()
        yield
        loaded.model.eval()


def backward(
    loaded: LoadedModel,
    batches: Sequence[Batch],
    task: Task,
    learning: Mapping[str, nn.Parameter],
    guard: RowGuard | None,
    totals: Totals,
    *,
    num_terms: int | None = None,
) -> None:
    """Run a step's forward and backward passes; its gradient is left at the trained tensors.

    Args:
        loaded: The model.
        batches: The step's, or this process's share of them.
        task: Computes the loss.
        learning: The trained tensors, by name.
        guard: As in `train`.
        totals: Where the step is counted.
        num_terms: What the loss of the whole step is a mean over, if these are not all its batches.
    """
    step_targets = sum(batch.num_terms for batch in batches) if num_terms is None else num_terms
    for batch in batches:
        num_rows = batch.ids.shape[0]
        with contextlib.nullcontext() if guard is None else guard.dropout(num_rows):
            loss = task.loss(loaded, batch)
        if guard is None:
            (loss.loss_sum / step_targets).backward()
        else:
            guard.add(row_losses(loss, batch), learning, sequences=batch.sequences)
        totals.loss_sum += loss.loss_sum.detach()
        totals.num_tokens += batch.num_real_tokens
        totals.num_padded_tokens += batch.ids.numel()
    totals.num_targets += step_targets
    if guard is not None:
        guard.release(learning)  # what follows sees the noised gradient only


def apply_rule(
    rule: LocalRule, learning: Mapping[str, nn.Parameter], context: LocalContext, totals: Totals
) -> None:
    """Change a step's gradient as the algorithm says: once per step, not per forward batch."""
    if rule.penalty is not None:
        totals.penalty = rule.penalty(learning, context)
        totals.penalty.backward()
    if rule.correct is not None:
        for name, p in learning.items():
            assert p.grad is not None
            p.grad = rule.correct(name, p.grad, context)


def take_step(optimizer: torch.optim.Optimizer, lr: float, totals: Totals) -> None:
    """Move the trained tensors by one step of size `lr`, and drop the gradient."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    totals.lr_sum += lr
    totals.num_steps += 1


OPTIMIZER = "optimizer."
"""Begins the names under which an optimizer's memory is kept."""


def optimizer_state(
    optimizer: torch.optim.Optimizer, learning: Mapping[str, nn.Parameter]
) -> dict[str, dict[str, Tensor]]:
    """What an optimizer remembers, by kind and tensor name, for example optimizer.exp_avg."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, p in learning.items():
        for kind, value in optimizer.state.get(p, {}).items():
            kept = value.detach().cpu().clone() if torch.is_tensor(value) else torch.tensor(value)
            found.setdefault(f"{OPTIMIZER}{kind}", {})[name] = kept
    return found


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    learning: Mapping[str, nn.Parameter],
    kept: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Give an optimizer the memory that `optimizer_state` took from another one of its kind."""
    for purpose, tensors in kept.items():
        kind = purpose.removeprefix(OPTIMIZER)
        for name, value in tensors.items():
            if name not in learning:  # not trained this time
                continue
            p = learning[name]
            # counts of steps: torch's own optimizers keep a float tensor, bitsandbytes an int
            is_count = value.dtype == torch.int64 and value.ndim == 0
            there = value if value.ndim == 0 else value.to(p.device)
            optimizer.state[p][kind] = int(value) if is_count else there.clone()
