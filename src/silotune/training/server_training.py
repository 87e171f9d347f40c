"""What the server does on its own rows after each aggregation: fine-tune, or distil a teacher.

The server may own labelled rows, and a larger model than the clients can run. What it learns enters
the clients' model only through the adapter; neither its rows nor its teacher are ever sent.

Fine-tuning is the plain baseline: if a teacher does no better, its gain comes from the server's
labels. Distillation trains teacher and student together, each on the labels and towards
the other's prediction (FedKD: Wu et al. 2022, "Communication-efficient federated learning via
knowledge distillation", Nature Communications 13, arXiv:2108.13323; here the teacher stays on the
server).
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from silotune.core.errors import ModelError, UpdateError
from silotune.core.seeds import derive, generator
from silotune.core.types import Config
from silotune.core.wording import counted
from silotune.models.loading import LoadedModel
from silotune.training.distill_losses import (
    attention_gap,
    joint_loss,
    layer_map,
    mutual,
    published_loss,
)
from silotune.training.loop import TrainConfig, build_batches, build_optimizer, plan_steps
from silotune.training.tasks.base import Batch, Example, Loss, Task


class ServerConfig(Config):
    """Rows that the server owns, and what it does with them."""

    data_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the train rows that goes to the server instead of a client. A keyed hash decides
    each row by itself, so the number varies around this share."""
    data_path: str | None = Field(default=None, min_length=1)
    """Instead: the server's own file or folder, with the same columns as the clients' rows."""
    work: Literal["none", "fine-tune", "distill"] = "none"
    """What the server does after each aggregation. fine-tune: train the adapter on these rows.
    distill: train it together with a teacher, see [distill]."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the server's rows after each aggregation."""
    lr: float = Field(default=5e-5, gt=0)
    """Learning rate at the start of each such training; it falls to 0 over its steps."""
    weight: float = Field(default=1.0, ge=0, le=1)
    """How much of what the server learned enters the adapter: aggregate + weight * (trained -
    aggregate). At 0 the adapter is the clients' alone."""


class DistillConfig(Config):
    """A teacher on the server."""

    teacher: str | None = Field(default=None, min_length=1)
    """A model with the base's tokenizer: a hub id, a folder, a named source, or a folder
    written by `silotune pretrain-teacher`."""
    pretrain_epochs: int = Field(default=0, ge=0)
    """Passes of the teacher over the server's rows before round 1. A folder written by `silotune
    pretrain-teacher` already includes them."""
    lr: float | None = Field(default=None, gt=0)
    """The teacher's learning rate, if it differs from server.lr: a teacher trains all its weights,
    while the student may train an adapter, which takes larger steps."""
    teacher_epochs: int = Field(default=1, ge=0)
    """Passes of the teacher alone over the server's rows after each aggregation, before both train
    together for server.epochs."""
    temperature: float = Field(default=2.0, gt=0)
    """Softens both predictions before they are compared; the loss is scaled by its square."""
    kl: float = Field(default=1.0, ge=0)
    """Weight of the Kullback-Leibler divergences, student from teacher and teacher from student. At
    0, and without attention, the student learns the same as with fine-tune."""
    attention: float = Field(default=0.0, ge=0)
    """Weight of the mean squared difference of attention maps."""
    attention_layers: tuple[tuple[int, int], ...] | None = None
    """Pairs (student layer, teacher layer) to compare, counted from 0. Absent: every layer of the
    student, spread evenly over the teacher's, last with last."""
    top_k: int = Field(default=0, ge=0)
    """Compare only this many of the other side's most likely tokens or labels; 0: all of them."""
    compat: Literal["none", "raw-logits"] = "none"
    """raw-logits: use the formula of the published FedKD-LoRA code, which is not a divergence, for
    comparison; it ignores temperature, kl and top_k, and any attention above 0 counts as 1."""

    @model_validator(mode="after")
    def _no_contradiction(self) -> "DistillConfig":
        if self.attention_layers is not None and self.attention == 0:
            raise ValueError("attention_layers has no effect with attention = 0")
        return self


@dataclass(frozen=True)
class Lesson:
    """The server's rows as tokens, and what it needs to train on them."""

    examples: tuple[Example, ...]
    task: Task
    train: TrainConfig
    """Batch size, clipping, weight decay and optimizer are the same as the clients'."""
    seed: int


Draw = Callable[[str], None]
"""Seeds the dropout of a model's next pass by name, so that a second model does not change it."""


def fine_tune(
    loaded: LoadedModel, lesson: Lesson, *, epochs: int, lr: float, seed_name: str
) -> dict[str, float]:
    """Train a model's adapter, or all its weights, on the server's rows.

    Args:
        loaded: Changed in place.
        lesson: The rows.
        epochs: Passes over them.
        lr: Learning rate of the first step; it falls linearly to 0.
        seed_name: Names the random draws for the order of the rows and the dropout.

    Returns:
        loss, num_steps, num_tokens and seconds.

    Raises:
        UpdateError: The loss became NaN or infinite.
    """

    def losses(batch: Batch, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        draw("student")
        found = lesson.task.loss(loaded, batch).loss_sum / batch.num_terms
        return found, {"loss": float(found.detach())}

    return _train([(loaded, lr)], lesson, losses, epochs=epochs, seed_name=seed_name)


def distill(
    student: LoadedModel,
    teacher: LoadedModel,
    lesson: Lesson,
    cfg: DistillConfig,
    *,
    epochs: int,
    lr: float,
    seed_name: str,
) -> dict[str, float]:
    """Train student and teacher together: both on the labels, each towards the other.

    Arguments, results and errors as in `fine_tune`; `cfg.lr` is the teacher's rate if given, and
    the losses in the result are loss (the student's), teacher_loss and divergence.
    """
    wants_maps = cfg.attention > 0
    pairs = _pairs(cfg, student, teacher) if wants_maps else ()

    def losses(batch: Batch, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        draw("student")
        mine = lesson.task.loss(student, batch, attentions=wants_maps)
        draw("teacher")
        its = lesson.task.loss(teacher, batch, attentions=wants_maps)
        ce_mine, ce_its = mine.loss_sum / batch.num_terms, its.loss_sum / batch.num_terms
        if cfg.compat == "raw-logits":
            total = published_loss(
                ce_mine, ce_its, mine.logits, its.logits, mine.attentions, its.attentions, pairs
            )
            distance = (total - ce_mine - ce_its).detach()
        else:
            distance = _distance(mine, its, cfg, pairs, batch)
            total = joint_loss(ce_mine, ce_its, distance)
        parts = {"loss": ce_mine, "teacher_loss": ce_its, "divergence": distance}
        return total, {name: float(value.detach()) for name, value in parts.items()}

    with _eager([student, teacher] if wants_maps else []):
        both = [(student, lr), (teacher, cfg.lr or lr)]
        return _train(both, lesson, losses, epochs=epochs, seed_name=seed_name)


def _distance(
    mine: Loss, its: Loss, cfg: DistillConfig, pairs: Sequence[tuple[int, int]], batch: Batch
) -> Tensor:
    """The weighted distance between student and teacher."""
    found = torch.zeros((), device=mine.logits.device)
    if cfg.kl > 0:
        temperature, top_k = cfg.temperature, cfg.top_k
        found = found + cfg.kl * mutual(
            mine.logits, its.logits, temperature=temperature, top_k=top_k
        )
    if cfg.attention > 0:
        mask = batch.mask.to(mine.logits.device)
        gap = attention_gap(mine.attentions, its.attentions, pairs, mask)
        found = found + cfg.attention * gap
    return found


def _pairs(
    cfg: DistillConfig, student: LoadedModel, teacher: LoadedModel
) -> tuple[tuple[int, int], ...]:
    mine, its = _num_layers(student), _num_layers(teacher)
    if cfg.attention_layers is None:
        return layer_map(mine, its)
    for a, b in cfg.attention_layers:
        if not (0 <= a < mine and 0 <= b < its):
            raise ModelError(
                f"distill.attention_layers: there is no pair ({a}, {b}): the student has "
                f"{counted(mine, 'layer')} and the teacher {its}, counted from 0.\n"
                "  Name layers that both models have."
            )
    return cfg.attention_layers


def _num_layers(loaded: LoadedModel) -> int:
    return loaded.model.config.get_text_config().num_hidden_layers


@contextmanager
def _eager(models: Sequence[LoadedModel]) -> Iterator[None]:
    """Make models compute attention maps, which fused kernels never store."""
    plain = [m.model.get_base_model() if m.has_adapter else m.model for m in models]
    before = [model.config._attn_implementation for model in plain]
    for model in plain:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        for model, kind in zip(plain, before, strict=True):
            model.set_attn_implementation(kind)


def _train(
    learners: Sequence[tuple[LoadedModel, float]],
    lesson: Lesson,
    losses: Callable[[Batch, Draw], tuple[Tensor, dict[str, float]]],
    *,
    epochs: int,
    seed_name: str,
) -> dict[str, float]:
    """Train one model, or two together, each with its own learning rate and optimizer."""
    began, cfg, count = time.perf_counter(), lesson.train, 0
    models = [loaded for loaded, _ in learners]
    weights = [[p for p in m.parameters.values() if p.requires_grad] for m in models]
    optimizers = [
        build_optimizer(own, cfg, lr, fused=True, device=m.device)
        for own, (m, lr) in zip(weights, learners, strict=True)
    ]
    steps = _plan(lesson, epochs, seed_name)
    sums: dict[str, float] = {}
    num_targets = num_tokens = 0
    cuda = [m.device for m in models if m.device.type == "cuda"]

    def draw(who: str) -> None:
        torch.manual_seed(derive(lesson.seed, "server-dropout", seed_name, who, count))

    with torch.random.fork_rng(devices=cuda):
        for m in models:
            m.model.train()
        for n, batches in enumerate(build_batches(steps, lesson.examples, lesson.task)):
            step_targets = sum(batch.num_terms for batch in batches)
            for batch in batches:
                loss, parts = losses(batch, draw)
                (loss * (batch.num_terms / step_targets)).backward()
                count += 1
                num_targets += batch.num_terms
                num_tokens += batch.num_real_tokens * len(models)
                for name, value in parts.items():
                    sums[name] = sums.get(name, 0.0) + value * batch.num_terms
            for own, optimizer, (_, lr) in zip(weights, optimizers, learners, strict=True):
                if cfg.clip_norm > 0:
                    nn.utils.clip_grad_norm_(own, cfg.clip_norm)
                for group in optimizer.param_groups:
                    group["lr"] = lr * (1 - n / len(steps))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        for m in models:
            m.model.eval()
    means = {name: value / num_targets for name, value in sums.items()}
    if not all(map(math.isfinite, means.values())):
        raise UpdateError(
            "the server's training ended with a loss that is not a number.\n"
            "  Lower server.lr or distill.lr, or set train.clip_norm."
        )
    seconds = time.perf_counter() - began
    return {**means, "num_steps": len(steps), "num_tokens": num_tokens, "seconds": seconds}


def _plan(lesson: Lesson, epochs: int, seed_name: str) -> list[list[list[int]]]:
    """The steps of several passes, each in its own order."""
    steps: list[list[list[int]]] = []
    lengths = [e.ids.numel() for e in lesson.examples]
    for epoch in range(epochs):
        gen = generator(lesson.seed, "server-order", seed_name, epoch)
        rows = torch.randperm(len(lengths), generator=gen).tolist()
        steps += plan_steps(rows, lengths, lesson.train, gen)
    return steps
