"""Several clients in one forward and backward pass of the frozen base: `train`, for a group.

Each client keeps an optimizer, a schedule, a clipping norm, a loss mean and a dropout generator of
its own, and takes the same steps on the same rows as in the loop. Only the shapes of the products
differ, and with them the last bits. This file knows neither rounds nor the network.
"""

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from silotune.core.algorithm import LocalRule
from silotune.models.loading import LoadedModel
from silotune.models.stacked import Part, StackedAdapters
from silotune.training.local_step import (
    LocalResult,
    OwnTraining,
    Totals,
    apply_rule,
    optimizer_state,
    restore_optimizer,
    take_step,
    training_mode,
)
from silotune.training.loop import TrainConfig, build_optimizer, step_lr
from silotune.training.tasks.base import Batch, Task

PASS_TOKENS = 24
"""What one forward and backward pass costs a CPU besides its tokens, in tokens: measured 28 with
benchmarks/together.py --curve, and 16 to 31 elsewhere (docs/measurements.md)."""
MOST_TOKENS = 256
"""Tokens of a pass up to which joining was faster wherever it was measured on a CPU. In float32 it
still was with 512, in bfloat16 it was not."""


def train_together(
    loaded: LoadedModel,
    group: Sequence[OwnTraining],
    task: Task,
    cfg: TrainConfig,
    rule: LocalRule,
    *,
    round_: int,
    most_tokens: int | None = None,
) -> list[tuple[LocalResult, dict[str, Tensor]]]:
    """Train a group of clients from what each has received. The loaded adapter is not changed.

    Args:
        loaded: One for which `why_not_stacked` finds nothing.
        group: What is each client's own. Their steps may differ in number, rows and length.
        task: With `logits` and `loss_of`.
        cfg: Optimizer settings.
        rule: What the algorithm changes.
        round_: Decides which tensors are trained.
        most_tokens: Joins only what is cheaper together, and at most so many tokens, padding
            included, in a pass; None for one pass for the whole group.

    Returns:
        For every client what its training did, and the trained tensors. A loss that is not finite
        stays with the client that has it, and is for the caller to refuse.
    """
    starts = [own.context.received for own in group]
    stacked = StackedAdapters(loaded, starts, [own.seed for own in group])
    for name, stack in stacked.stacks.items():
        stack.requires_grad_(rule.trains(name, round_))
    for p in loaded.parameters.values():
        p.requires_grad_(False)
    clients = [
        _Client(stacked, k, own, cfg, rule, round_=round_, loaded=loaded)
        for k, own in enumerate(group)
    ]
    began = time.perf_counter()
    with training_mode(loaded, 0, None), stacked.attached():
        for steps in itertools.zip_longest(*(own.steps for own in group)):
            at = {k: step for k, step in enumerate(steps) if step is not None}
            _backward(stacked, at, task, clients, most_tokens)
            for k in at:
                clients[k].step()
            stacked.clear()
    results = [client.totals.result() for client in clients]
    seconds = time.perf_counter() - began
    whole = sum(result.num_padded_tokens for result in results)
    return [
        (
            replace(
                result,
                seconds=seconds * result.num_padded_tokens / max(1, whole),
                num_together=len(group),
                optimizer=client.memory(),
            ),
            client.tensors(),
        )
        for client, result in zip(clients, results, strict=True)
    ]


class _Client:
    """One client's half of the steps: everything behind the gradient, as in `train`."""

    def __init__(
        self,
        stacked: StackedAdapters,
        place: int,
        own: OwnTraining,
        cfg: TrainConfig,
        rule: LocalRule,
        *,
        round_: int,
        loaded: LoadedModel,
    ) -> None:
        self.stacked, self.place, self.own, self.cfg, self.rule = stacked, place, own, cfg, rule
        tensors = stacked.clients[place]
        self.learning = {n: p for n, p in tensors.items() if rule.trains(n, round_)}
        self.optimizer = build_optimizer(
            self.learning.values(), cfg, own.lr, fused=False, device=loaded.device
        )
        restore_optimizer(self.optimizer, self.learning, own.kept or {})
        self.warm = cfg.warmup_steps if own.kept else 0
        self.totals = Totals.zero(loaded.device)

    def step(self) -> None:
        """Take a step with the gradient that is in the stacks."""
        totals, cfg = self.totals, self.cfg
        self.stacked.gradients(self.place, self.learning)
        apply_rule(self.rule, self.learning, self.own.context, totals)
        if cfg.clip_norm > 0:
            nn.utils.clip_grad_norm_(self.learning.values(), cfg.clip_norm)
        take_step(self.optimizer, step_lr(cfg, self.own.lr, totals.num_steps + self.warm), totals)
        if self.own.tell is not None:
            self.own.tell(totals.num_steps, totals.num_tokens)

    def memory(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The optimizer's memory, if it is kept."""
        return {} if self.own.kept is None else optimizer_state(self.optimizer, self.learning)

    def tensors(self) -> dict[str, Tensor]:
        """A float32 copy of the client's tensors, on the CPU."""
        mine = self.stacked.clients[self.place]
        return {n: p.detach().to("cpu", torch.float32, copy=True) for n, p in mine.items()}


def _backward(
    stacked: StackedAdapters,
    at: Mapping[int, Sequence[Batch]],
    task: Task,
    clients: Sequence[_Client],
    most_tokens: int | None,
) -> None:
    """One step's passes for the clients that take it; gradients are left at the stacks."""
    assert task.logits is not None
    assert task.loss_of is not None
    targets = {k: sum(batch.num_terms for batch in batches) for k, batches in at.items()}
    for n in range(max(map(len, at.values()))):
        now = {k: batches[n] for k, batches in at.items() if n < len(batches)}
        for places in plan_passes(now, most_tokens):
            batches = [now[k] for k in places]
            joint = join(batches)
            stacked.expect(
                [Part(k, *batch.ids.shape) for k, batch in zip(places, batches, strict=True)]
            )
            logits = task.logits(stacked.loaded, joint).split([b.num_trained for b in batches])
            losses = list[Tensor]()
            for k, batch, own in zip(places, batches, logits, strict=True):
                loss, totals = task.loss_of(own, batch), clients[k].totals
                losses.append(loss.loss_sum / targets[k])
                totals.loss_sum += loss.loss_sum.detach()
                totals.num_tokens += batch.num_real_tokens
                totals.num_padded_tokens += batch.ids.shape[0] * joint.ids.shape[1]
            torch.stack(losses).sum().backward()
    for k, number in targets.items():
        clients[k].totals.num_targets += number


def join(batches: Sequence[Batch]) -> Batch:
    """The rows of several batches as one, padded to the longest. Packed batches cannot be joined.

    Args:
        batches: Of the same task.
    """
    length = max(batch.ids.shape[1] for batch in batches)
    positions, first = list[Tensor](), 0
    for batch in batches:
        rows, places = batch.positions // batch.ids.shape[1], batch.positions % batch.ids.shape[1]
        positions.append((first + rows) * length + places)
        first += batch.ids.shape[0]
    known = [batch.reference for batch in batches if batch.reference is not None]
    return Batch(
        ids=torch.cat([F.pad(b.ids, (0, length - b.ids.shape[1])) for b in batches]),
        positions=torch.cat(positions),
        targets=torch.cat([batch.targets for batch in batches]),
        num_real_tokens=sum(batch.num_real_tokens for batch in batches),
        mask=torch.cat([F.pad(b.mask, (0, length - b.mask.shape[1])) for b in batches]),
        sequences=batches[0].sequences,
        reference=torch.cat(known) if len(known) == len(batches) else None,
    )


def plan_passes(batches: Mapping[int, Batch], most_tokens: int | None) -> list[list[int]]:
    """Which clients share a pass: the cheapest split of them, sorted by length.

    A pass costs `PASS_TOKENS` and its tokens, with the padding that the longest row asks for.

    Args:
        batches: By the client's place in the group.
        most_tokens: As in `train_together`.

    Returns:
        Places, in order in each pass.
    """
    if most_tokens is None:
        return [list(batches)]
    order = sorted(batches, key=lambda k: (batches[k].ids.shape[1], k))
    rows = [batches[k].ids.shape[0] for k in order]
    lengths = [batches[k].ids.shape[1] for k in order]
    best: list[tuple[int, int]] = [(0, 0)]  # cost of the first n, and where their last pass begins
    for end in range(1, len(order) + 1):
        options: list[tuple[int, int]] = []
        for begin in range(end - 1, -1, -1):
            tokens = sum(rows[begin:end]) * lengths[end - 1]
            if tokens > most_tokens and begin < end - 1:
                break
            options.append((best[begin][0] + PASS_TOKENS + tokens, begin))
        best.append(min(options))
    passes, end = list[list[int]](), len(order)
    while end:
        begin = best[end][1]
        passes.append(sorted(order[begin:end]))
        end = begin
    return passes[::-1]
