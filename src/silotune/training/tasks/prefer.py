"""Direct preference optimisation: the chosen answer of a pair is made likelier than the rejected.

Rafailov et al. 2023, "Direct Preference Optimization", eq. 7. arXiv:2305.18290. Label smoothing:
Mitchell 2023, "A note on DPO with noisy preferences" (cDPO). IPO: Azar et al. 2023, "A General
Theoretical Paradigm to Understand Learning from Human Preferences", eq. 17. arXiv:2310.12036. The
likelihood of the chosen answer beside the preference: Pang et al. 2024, "Iterative Reasoning
Preference Optimization", eq. 1 and 2. arXiv:2404.19733.

Both answers of a pair are sequences of one forward pass, with the same prompt in front, of which
nothing is learned. Log-probabilities are sums over an answer's tokens with its end token, as
published. The reference is what the run started from: the base, or adapter.start; it never trains,
so its log-probabilities are an input here, see references.py.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from silotune.core.types import Config
from silotune.data.placed_conversation import PlacedConversation, place_of
from silotune.data.preferences import ANSWERS, Preference, whole
from silotune.models.loading import LoadedModel
from silotune.training.tasks import instruct
from silotune.training.tasks.base import (
    Batch,
    Example,
    Loss,
    PairScores,
    Prepared,
    Task,
)
from silotune.training.tasks.instruct import prepare as prepare_talks


class PreferConfig(Config):
    """task = "prefer": the loss of a pair."""

    loss: Literal["dpo", "ipo"] = "dpo"
    """dpo: -log sigmoid of the margin between the implicit rewards (Rafailov et al. 2023,
    arXiv:2305.18290). ipo: the margin is pulled to a fixed size, which does not grow without bound
    on pairs that are easy to tell apart (Azar et al. 2023, arXiv:2310.12036)."""
    beta: float = Field(default=0.1, ge=1e-3, le=100)
    """Strength of the pull to the reference: smaller moves further away from it. With ipo, the
    paper's tau."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """dpo: the share of pairs that are taken to be labelled the wrong way round (cDPO)."""
    nll_weight: float = Field(default=0.0, ge=0)
    """Weight of the mean negative log-likelihood of the chosen answer's tokens, which is added to
    the loss of its pair: it keeps good answers likely (Pang et al. 2024, arXiv:2404.19733)."""
    length_normalized: bool = False
    """Take the mean log-probability of an answer's tokens instead of their sum, so that long
    answers count like short ones. beta then has to be larger, for example 2."""

    @model_validator(mode="after")
    def _no_contradiction(self) -> "PreferConfig":
        if self.label_smoothing and self.loss != "dpo":
            raise ValueError("label_smoothing only has an effect with loss = 'dpo'")
        return self


def prefer(cfg: PreferConfig) -> Task:
    """Build the task."""

    def loss(loaded: LoadedModel, batch: Batch, *, attentions: bool = False) -> Loss:
        logits, seen = instruct.predicted(loaded, batch, attentions=attentions)
        return replace(loss_of(logits, batch), attentions=seen)

    def loss_of(logits: Tensor, batch: Batch) -> Loss:
        assert batch.reference is not None, "the reference is computed with the tokens"
        logps, counts = answer_logps(logits, batch)
        pairs = score_pairs(logps, counts, batch.reference.to(logits.device), cfg)
        return Loss(pairs.losses.sum(), logits, pairs=pairs)

    return Task(
        prepare=prepare,
        collate=collate,
        loss=loss,
        logits=instruct.predicted_logits,
        loss_of=loss_of,
        num_tokens=num_tokens,
        reference=reference_logps,
    )


def score_pairs(logps: Tensor, counts: Tensor, reference: Tensor, cfg: PreferConfig) -> PairScores:
    """The loss of each pair, and how the model ranks its answers.

    Args:
        logps: Log-probabilities of the chosen and the rejected answers, (pairs, 2).
        counts: Their numbers of tokens, (pairs, 2).
        reference: Log-probabilities under the reference, (pairs, 2).
        cfg: The loss.
    """
    nll = -logps[:, 0] / counts[:, 0]
    if cfg.length_normalized:
        logps, reference = logps / counts, reference / counts
    moved = logps - reference
    h = moved[:, 0] - moved[:, 1]
    if cfg.loss == "ipo":
        losses = (h - 1 / (2 * cfg.beta)).square()
    else:
        s = cfg.label_smoothing
        margin = cfg.beta * h
        losses = -(1 - s) * F.logsigmoid(margin) - s * F.logsigmoid(-margin)
    if cfg.nll_weight:
        losses = losses + cfg.nll_weight * nll
    now = logps.detach()
    return PairScores(losses, cfg.beta * h.detach(), now[:, 0] - now[:, 1])


def answer_logps(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Each answer's log-probability and number of tokens, both (rows, 2), with a graph.

    Args:
        logits: (num_trained, vocabulary).
        batch: The pairs that they belong to.
    """
    device, sequences = logits.device, batch.ids.shape[0]
    nll = F.cross_entropy(logits, batch.targets.to(device), reduction="none")  # (num_trained,)
    owner = (batch.positions // batch.ids.shape[1]).to(device)
    zeros = nll.new_zeros(sequences)
    sums = zeros.index_add(0, owner, nll)
    counts = zeros.index_add(0, owner, torch.ones_like(nll))
    return -sums.reshape(-1, 2), counts.reshape(-1, 2)


def reference_logps(loaded: LoadedModel, batch: Batch) -> Tensor:
    """The answers' log-probabilities under the model as it is, (rows, 2), float32."""
    logits, _ = instruct.predicted(loaded, batch)
    return answer_logps(logits, batch)[0]


# --- rows -> tensors


def prepare(rows: Sequence[Preference], tokenizer: Any, max_length: int) -> Prepared:
    """Tokenise pairs. An answer may have `max_length` tokens with its prompt, like a row elsewhere.

    Both answers are cut at the same token, behind the same prompt, so that what is left of them is
    compared at the same length. A pair is dropped if nothing is left of an answer, or no
    difference.

    Args:
        rows: Pairs.
        tokenizer: A fast tokenizer with a chat template.
        max_length: Maximum length of a prompt with an answer, in tokens.

    Raises:
        DataError: As in `instruct.prepare`.
    """
    sides = [_prepare_side(rows, tokenizer, max_length, which) for which in ANSWERS]
    examples: list[Example] = []
    kept: list[int] = []
    num_cut = 0
    for row, (chosen, rejected) in enumerate(zip(*sides, strict=True)):
        num_cut += max(chosen[1], rejected[1]) > max_length
        one, other = chosen[0], rejected[0]
        if one is None or other is None or torch.equal(one.ids, other.ids):
            continue
        lengths = torch.tensor([one.ids.numel(), other.ids.numel()])
        examples.append(
            Example(
                torch.cat([one.ids, other.ids]),
                torch.cat([one.trained, other.trained]),
                segments=torch.arange(2).repeat_interleave(lengths),
            )
        )
        kept.append(row)
    return Prepared(tuple(examples), num_cut, len(rows) - len(kept), tuple(kept))


def _prepare_side(
    rows: Sequence[Preference], tokenizer: Any, max_length: int, which: str
) -> list[tuple[Example | None, int]]:
    """One answer of every row, if any of it is left, and its full length with the prompt."""
    talks = [whole(row, which) for row in rows]
    full = prepare_talks(_placed(talks, rows), tokenizer, NO_LIMIT)
    found: list[tuple[Example | None, int]] = [(None, 0)] * len(rows)
    for row, example in zip(full.rows, full.examples, strict=True):
        cut = Example(example.ids[:max_length], example.trained[:max_length])
        found[row] = (cut if cut.trained.any() else None, example.ids.numel())
    return found


NO_LIMIT = 2**62
"""More tokens than any row has."""


def _placed(talks: Sequence[Any], rows: Sequence[Preference]) -> list[Any]:
    """Conversations that know where their row was read, as errors name it."""
    return [PlacedConversation(talk, place_of(row)) for talk, row in zip(talks, rows, strict=True)]


def collate(examples: Sequence[Example]) -> Batch:
    """Pad on the right to the longest sequence. Each pair is two, the chosen one first."""
    sequences = [side for example in examples for side in _sides(example)]
    batch = instruct.collate(sequences)
    known = [example.reference for example in examples if example.reference is not None]
    return Batch(
        ids=batch.ids,
        positions=batch.positions,
        targets=batch.targets,
        num_real_tokens=batch.num_real_tokens,
        mask=batch.mask,
        sequences=2,
        reference=torch.stack(known) if len(known) == len(examples) else None,
    )


def _sides(example: Example) -> list[Example]:
    assert example.segments is not None, "a pair marks its two sequences"
    first = int((example.segments == 0).sum())
    return [
        Example(ids, trained)
        for ids, trained in zip(
            (example.ids[:first], example.ids[first:]),
            (example.trained[:first], example.trained[first:]),
            strict=True,
        )
    ]


def num_tokens(rows: Sequence[Preference], tokenizer: Any) -> list[int]:
    """Number of tokens of the longer sequence of each pair, which the limit is about."""
    sides = [instruct.num_tokens([whole(row, w) for row in rows], tokenizer) for w in ANSWERS]
    return [max(lengths) for lengths in zip(*sides, strict=True)]
