"""Supervised fine-tuning on conversations: the assistant's turns are learned, the prompts are not.

The recipe's template renders each row. The loss mask is placed by character offsets, and a prompt
has the same ids at inference as in training. The end token of each assistant turn is learned, even
if it doubles as the padding token. `answer_spans` says where answers are.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from silotune.core.errors import DataError, ModelError
from silotune.core.wording import counted
from silotune.data.conversations import Conversation
from silotune.data.placed_conversation import place_of
from silotune.models.loading import LoadedModel
from silotune.training.tasks.answer_spans import Spans, encode_rows, full_text, trained_spans
from silotune.training.tasks.base import Batch, Example, Loss, Prepared, Task, Written, each_nll


def prepare(rows: Sequence[Conversation], tokenizer: Any, max_length: int) -> Prepared:
    """Tokenise conversations and mark what is learned.

    Args:
        rows: Conversations with at least one assistant turn.
        tokenizer: A fast tokenizer with a chat template.
        max_length: Maximum length of a row in tokens; longer rows are truncated at the end.

    Raises:
        DataError: The chat template refuses a row, or its answers cannot be found in the text. The
            message names the row's place.
    """
    rendered = _rendered(rows, tokenizer)
    examples, kept, num_cut, num_dropped = [], [], 0, 0
    for row, ((_, spans), (ids, starts)) in enumerate(
        zip(rendered, encode_rows(tokenizer, rendered), strict=True)
    ):
        trained = torch.zeros(len(ids), dtype=torch.bool)
        places = torch.tensor(starts)
        for start, end in spans:
            trained |= (places >= start) & (places < end)
        trained[0] = False  # nothing predicts the first token
        num_cut += len(ids) > max_length
        if trained[:max_length].any():
            examples.append(Example(torch.tensor(ids[:max_length]), trained[:max_length]))
            kept.append(row)
        else:
            num_dropped += 1
    return Prepared(tuple(examples), num_cut, num_dropped, tuple(kept))


def _rendered(rows: Sequence[Conversation], tokenizer: Any) -> list[Spans]:
    """The text and the learned spans of every row; the mistakes of all rows are told together."""
    rendered: list[Spans] = []
    problems: list[str] = []
    for n, row in enumerate(rows, start=1):
        try:
            rendered.append(trained_spans(tokenizer, row))
        except DataError as error:
            problems.append(f"{place_of(row) or f'row {n}'}: {error}")
    if problems:
        more = len(problems) - 1
        head, _, fix = problems[0].partition("\n")
        others = f" ({counted(more, 'more row')} like it)" if more else ""
        raise DataError(f"{head}{others}\n{fix}")
    return rendered


def collate(examples: Sequence[Example]) -> Batch:
    """Pad on the right to the longest example.

    No attention mask is needed: with causal attention no real token sees the padding after it, and
    no padded position is among `positions`. The padding id is arbitrary for the same reason.
    """
    length = max(e.ids.numel() for e in examples)
    ids = torch.zeros(len(examples), length, dtype=torch.int64)
    trained = torch.zeros(len(examples), length, dtype=torch.bool)
    for i, example in enumerate(examples):
        ids[i, : example.ids.numel()] = example.ids
        trained[i, : example.ids.numel()] = example.trained
    # the token at t is predicted at t - 1
    where = trained[:, 1:].nonzero()  # (num_trained, 2): row, t - 1
    lengths = torch.tensor([e.ids.numel() for e in examples])
    return Batch(
        ids=ids,
        positions=where[:, 0] * length + where[:, 1],
        targets=ids[where[:, 0], where[:, 1] + 1],
        num_real_tokens=int(lengths.sum()),
        mask=torch.arange(length) < lengths[:, None],
    )


def pack(examples: Sequence[Example]) -> Batch:
    """All examples concatenated into one row, without padding."""
    ids = torch.cat([e.ids for e in examples])
    trained = torch.cat([e.trained for e in examples])
    lengths = torch.tensor([e.ids.numel() for e in examples])
    where = trained.nonzero()[:, 0]  # never the first token of an example
    return Batch(
        ids=ids[None],
        positions=where - 1,
        targets=ids[where],
        num_real_tokens=ids.numel(),
        mask=torch.ones(1, ids.numel(), dtype=torch.bool),
        owners=torch.arange(len(examples)).repeat_interleave(lengths),
    )


def _separate(loaded: LoadedModel, owners: Tensor) -> dict[str, Tensor]:
    """Positions that restart with each example, and a mask in which no example sees another."""
    places = torch.arange(owners.numel(), device=owners.device)
    same = owners[:, None] == owners[None, :]
    begins = torch.where(same, places[None, :], owners.numel()).amin(1)
    mask = torch.zeros(same.shape, dtype=_head(loaded).weight.dtype, device=owners.device)
    mask.masked_fill_(~(same & (places[:, None] >= places[None, :])), torch.finfo(mask.dtype).min)
    return {"attention_mask": mask[None, None], "position_ids": (places - begins)[None]}


def check_packing(loaded: LoadedModel, max_length: int = 0) -> None:
    """Refuse to pack for a model in which a row would still see the one before it.

    Args:
        loaded: The model. Not modified.
        max_length: Maximum length of a row, in tokens.

    Raises:
        ModelError: Packed rows have other logits than padded ones, the second row depends on the
            first, or attention does not reach as far as rows are long.
    """
    size = _head(loaded).weight.shape[0]

    def example(first: int, length: int) -> Example:
        return Example(torch.arange(first, first + length) % size, torch.arange(length) > 0)

    one, two, other = example(3, 8), example(20, 5), example(30, 8)
    try:
        with torch.inference_mode():
            found = [predicted(loaded, pack([a, two]))[0] for a in (one, other)]
            padded = predicted(loaded, collate([one, two]))[0]
    except (RuntimeError, TypeError, ValueError) as error:  # it does not accept such a mask
        raise ModelError(_UNPACKED) from error
    most = float(padded.abs().max())
    # in half precision, another order of sums changes such senseless texts by a few per cent
    error = 0.01 if loaded.dtype == torch.float32 else 0.3
    same = (found[0] - padded).norm() <= error * padded.norm()
    # masked attention carries nothing over; what a hybrid model carries over may be small
    independent = torch.allclose(found[0][-4:], found[1][-4:], rtol=0, atol=1e-6 * most)
    # the mask that separates rows replaces a sliding window
    config = loaded.model.config.get_text_config()
    reach = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    if not same or not independent or (reach or max_length) < max_length:
        raise ModelError(_UNPACKED)


_UNPACKED = (
    "train.packing: in this model, packed rows would see one another.\n  Set train.packing = false."
)


def loss(loaded: LoadedModel, batch: Batch, *, attentions: bool = False) -> Loss:
    """Negative log-likelihood of the trained tokens."""
    logits, seen = _written_logits(loaded, batch, attentions=attentions)
    if not torch.is_grad_enabled():
        return Loss(each_nll(logits, batch.targets.to(loaded.device)).sum(), logits, seen)
    return replace(loss_of(logits.float(), batch), attentions=seen)


def loss_of(logits: Tensor, batch: Batch) -> Loss:
    """The loss of a batch whose logits are known, (num_trained, vocabulary), float32."""
    targets = batch.targets.to(logits.device)
    return Loss(F.cross_entropy(logits, targets, reduction="sum"), logits)


def predicted_logits(loaded: LoadedModel, batch: Batch) -> Tensor:
    """The logits of the trained tokens, (num_trained, vocabulary), float32."""
    return predicted(loaded, batch)[0]


def predicted(
    loaded: LoadedModel, batch: Batch, *, attentions: bool = False
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The logits of the trained tokens, and attentions; the vocabulary is scored only at these.

    Returns:
        (num_trained, vocabulary), float32; and if asked for, what `Loss.attentions` holds.
    """
    logits, seen = _written_logits(loaded, batch, attentions=attentions)
    return logits.float(), seen


def _written_logits(
    loaded: LoadedModel, batch: Batch, *, attentions: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """As `predicted`, in the precision in which the model writes them."""
    device = loaded.device
    more: dict[str, Any] = {"output_attentions": True} if attentions else {}
    if batch.owners is not None:
        more |= _separate(loaded, batch.owners.to(device))
    with only_positions(_head(loaded), batch.positions.to(device), batch.ids.shape[1]):
        out = loaded.model(input_ids=batch.ids.to(device), use_cache=False, **more)
    return out.logits, tuple(out.attentions) if attentions else ()


@contextmanager
def only_positions(head: nn.Module, positions: Tensor, length: int) -> Iterator[None]:
    """Let the output head see only some positions: (batch, length, d) becomes (num_trained, d).

    The head is the widest matrix of a small model. What a family does to its logits afterwards
    (scaling, soft caps) works element by element and is unaffected.
    """

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        # prompt tuning puts trained vectors in front, whose outputs predict no token of the text
        own = hidden[:, hidden.shape[1] - length :]
        return (own.flatten(0, 1).index_select(0, positions), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def _head(loaded: LoadedModel) -> Any:
    model = loaded.model.get_base_model() if loaded.has_adapter else loaded.model
    return model.get_output_embeddings()


def num_tokens(rows: Sequence[Conversation], tokenizer: Any) -> list[int]:
    """Number of tokens of each conversation, with its template, before truncation."""
    texts = [full_text(tokenizer, row) for row in rows]
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def written(rows: Sequence[Conversation], tokenizer: Any) -> list[Written]:
    """Every conversation with its template, its answers and its tokens."""
    rendered = [trained_spans(tokenizer, row) for row in rows]
    encoded = encode_rows(tokenizer, rendered)
    pairs = zip(rendered, encoded, strict=True)
    return [Written(text, spans, ids, starts) for (text, spans), (ids, starts) in pairs]


INSTRUCT = Task(
    prepare=prepare,
    collate=collate,
    loss=loss,
    logits=predicted_logits,
    loss_of=loss_of,
    num_tokens=num_tokens,
    pack=pack,
    written=written,
    is_asked=True,
)
