"""Supervised fine-tuning on conversations: the assistant's turns are learned, the prompts are not.

The text is the model's own chat template, rendered once per row; the loss mask is placed by
character offsets, so that ids are those of the template and a prompt at inference has the ids it
had in training. The end token of each assistant turn is learned, also where it doubles as the
padding token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from silotune.errors import DataError, ModelError
from silotune.models import LoadedModel
from silotune.rows import Conversation
from silotune.tasks.base import Batch, Example, Loss, Prepared, Task

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'].capitalize() + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
"""For base models, whose tokenizers bring no chat template. Stored with the adapter like any
other."""


THREE_BLOCK_TEMPLATE = (
    "{% for message in messages %}"
    "{{ {'system': '### Instruction:', 'user': '### Input:', 'assistant': '### Response:'}"
    "[message['role']] + '\n' + message['content'].strip() }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last %}{{ '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\n### Response:\n' }}{% endif %}"
)
"""Instruction (the system text), input (the question) and response, a blank line between them."""

TEMPLATES = {"auto": None, "plain": PLAIN_TEMPLATE, "three-block": THREE_BLOCK_TEMPLATE}
"""By the name that data.template uses; auto is the model's own, or plain where it has none."""


def set_template(tokenizer: Any, name: str = "auto") -> bool:
    """Give a tokenizer the template of a recipe; with "auto" the plain one if it has none.

    Returns:
        Whether the plain one had to stand in.
    """
    if tokenizer.eos_token is None:
        raise ModelError(
            "the tokenizer has no end token, so the model could never learn to stop.\n"
            "  Use a model whose tokenizer defines eos_token."
        )
    if TEMPLATES[name] is not None:
        tokenizer.chat_template = TEMPLATES[name]
    if tokenizer.chat_template:
        return False
    tokenizer.chat_template = PLAIN_TEMPLATE
    return True


def render(tokenizer: Any, messages: Conversation, *, ask: bool) -> str:
    """The text of a conversation; with `ask` it ends where the assistant begins to speak."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
    assert isinstance(text, str)
    return text


def trained_spans(tokenizer: Any, messages: Conversation) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and the character spans that are learned.

    A span runs from the first character of an assistant's answer to the end of the end token behind
    it, or to the end of the turn where the template writes none.

    Raises:
        DataError: The template rewrites earlier turns when later ones follow, so no span can be
            placed.
    """
    text, spans = render(tokenizer, messages, ask=False), []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = len(render(tokenizer, messages[:i], ask=True))
        turn = render(tokenizer, messages[: i + 1], ask=False)
        if not text.startswith(turn) or not turn.startswith(
            render(tokenizer, messages[:i], ask=True)
        ):
            raise DataError(
                "the chat template changes earlier turns when later ones follow, so the loss mask "
                "cannot be placed.\n  Use rows with one assistant turn, at the end."
            )
        end = turn.rfind(tokenizer.eos_token, start)
        spans.append((start, len(turn) if end < 0 else end + len(tokenizer.eos_token)))
    return text, spans


def prepare(rows: Sequence[Conversation], tokenizer: Any, max_length: int) -> Prepared:
    """Tokenise conversations and mark what is learned.

    Args:
        rows: Conversations with at least one assistant turn.
        tokenizer: A fast tokenizer with a chat template.
        max_length: Tokens after which a row is cut, at its end.
    """
    rendered = [trained_spans(tokenizer, row) for row in rows]
    encoded = tokenizer(
        [text for text, _ in rendered], add_special_tokens=False, return_offsets_mapping=True
    )
    examples, kept, num_cut, num_dropped = [], [], 0, 0
    for row, ((_, spans), ids, offsets) in enumerate(
        zip(rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ):
        starts = torch.tensor([start for start, _ in offsets])
        trained = torch.zeros(len(ids), dtype=torch.bool)
        for start, end in spans:
            trained |= (starts >= start) & (starts < end)
        trained[0] = False  # nothing predicts the first token
        num_cut += len(ids) > max_length
        if trained[:max_length].any():
            examples.append(Example(torch.tensor(ids[:max_length]), trained[:max_length]))
            kept.append(row)
        else:
            num_dropped += 1
    return Prepared(tuple(examples), num_cut, num_dropped, tuple(kept))


def collate(examples: Sequence[Example]) -> Batch:
    """Pad on the right to the longest example.

    No attention mask is needed: with causal attention no real token sees the padding behind it, and
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


def loss(loaded: LoadedModel, batch: Batch, *, attentions: bool = False) -> Loss:
    """Negative log-likelihood of the trained tokens; only there the vocabulary is scored."""
    device = loaded.device
    more = {"output_attentions": True} if attentions else {}
    with only_positions(_head(loaded), batch.positions.to(device)):
        out = loaded.model(input_ids=batch.ids.to(device), use_cache=False, **more)
    logits = (
        out.logits.float()
    )  # (num_trained, vocabulary); fp32: bf16 log-sums lose the small classes
    nll = F.cross_entropy(logits, batch.targets.to(device), reduction="sum")
    return Loss(nll, logits, tuple(out.attentions) if attentions else ())


@contextmanager
def only_positions(head: nn.Module, positions: Tensor) -> Iterator[None]:
    """Let the output head see only some positions: (batch, length, d) becomes (num_trained, d).

    The head is the widest matrix of a small model. What a family does to its logits afterwards
    (scaling, soft caps) works element by element and is left as it is.
    """

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        return (hidden.flatten(0, 1).index_select(0, positions), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def _head(loaded: LoadedModel) -> nn.Module:
    model = loaded.model.get_base_model() if loaded.has_adapter else loaded.model
    return model.get_output_embeddings()


def num_tokens(rows: Sequence[Conversation], tokenizer: Any) -> list[int]:
    """Tokens of each conversation, with its template, before anything is cut."""
    texts = [render(tokenizer, row, ask=False) for row in rows]
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


INSTRUCT = Task(prepare=prepare, collate=collate, loss=loss, num_tokens=num_tokens)
