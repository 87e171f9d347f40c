"""Greedy answers of a model, in batches, with the template that it was trained with."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from silotune.data.chat_templates import PROBE, render
from silotune.data.conversations import Conversation
from silotune.data.template_traits import traits_of
from silotune.models.loading import LoadedModel
from silotune.models.vocabulary import check_tokens


@dataclass(frozen=True)
class Answer:
    """What a model said."""

    text: str
    """Decoded without special tokens; whitespace at both ends is kept."""
    num_tokens: int
    """New tokens, without the end token."""
    ended: bool
    """Whether the model ended the answer itself, instead of reaching max_new_tokens."""


def answer(loaded: LoadedModel, messages: Conversation, *, max_new_tokens: int) -> str:
    """The model's answer to `messages`, choosing the most likely token each time.

    Args:
        loaded: The model. Not modified.
        messages: A conversation that ends with the user.
        max_new_tokens: Maximum length of an answer.
    """
    (only,) = answers(loaded, [messages], max_new_tokens=max_new_tokens)
    return only.text.strip()


def answers(
    loaded: LoadedModel,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    tell: Callable[[int], None] | None = None,
) -> list[Answer]:
    """The model's next turn in each conversation, in order. See `complete`."""
    prompts = [render(loaded.tokenizer, talk, ask=True) for talk in conversations]
    return complete(
        loaded,
        encode(loaded, prompts),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        tell=tell,
    )


def encode(
    loaded: LoadedModel, prompts: Sequence[str], *, special: bool = False
) -> list[list[int]]:
    """Token ids of texts. A rendered chat already has its special tokens; `special` adds them."""
    if not prompts:
        return []
    found = loaded.tokenizer(list(prompts), add_special_tokens=special)["input_ids"]
    for ids in found:
        check_tokens(ids, loaded.model, loaded.tokenizer, "the prompt")
    return found


def complete(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    tell: Callable[[int], None] | None = None,
    tell_text: Callable[[str], None] | None = None,
) -> list[Answer]:
    """Continue each prompt, greedily.

    Prompts are padded on the left and masked, so apart from rounding an answer does not depend on
    the rest of its batch: if two tokens are equally likely up to the last bits of a float, another
    batch size may choose the other one.

    Args:
        loaded: The model. Not modified.
        prompts: Token ids, none empty.
        max_new_tokens: Maximum length of an answer.
        batch_size: Prompts in one forward pass; it affects only speed and memory.
        tell: Told the number of answers so far, after every batch.
        tell_text: With a single prompt: told its answer so far, after every token.

    Returns:
        One answer per prompt, in order.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))  # for little padding
    found: dict[int, Answer] = {}
    for at in range(0, len(order), batch_size):
        batch = order[at : at + batch_size]
        new = _generate(loaded, [prompts[i] for i in batch], max_new_tokens, tell_text)
        found |= dict(zip(batch, new, strict=True))
        if tell is not None:
            tell(len(found))
    return [found[i] for i in range(len(prompts))]


def pad_left(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, each (batch, longest), int64."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask[i, longest - len(prompt) :] = 1
    return ids, mask


def _generate(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    tell_text: Callable[[str], None] | None = None,
) -> list[Answer]:
    ids, mask = pad_left(prompts, loaded.tokenizer.eos_token_id)
    ends = end_tokens(loaded)
    with torch.inference_mode(), warnings.catch_warnings():
        # PEFT counts the positions after trained vectors itself, and says so at every token
        warnings.filterwarnings("ignore", message="Position ids are not supported")
        out = loaded.model.generate(
            input_ids=ids.to(loaded.device),
            attention_mask=mask.to(loaded.device),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends,
            pad_token_id=loaded.tokenizer.eos_token_id,
            top_p=None,
            top_k=None,
            temperature=None,
            streamer=None if tell_text is None else _Streamer(loaded, ends, tell_text),
        )
    return [_until_end(loaded, row, ends) for row in out[:, ids.shape[1] :].tolist()]


class _Streamer:
    """Passes on what `generate` has written so far; it is given the prompt first."""

    def __init__(
        self, loaded: LoadedModel, ends: Sequence[int], tell: Callable[[str], None]
    ) -> None:
        self._loaded, self._ends, self._tell = loaded, ends, tell
        self._new: list[int] | None = None

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then token by token."""
        if self._new is None:
            self._new = []
            return
        self._new += value.flatten().tolist()
        text = _until_end(self._loaded, self._new, self._ends).text
        self._tell(text.removesuffix("\ufffd").strip())  # a letter of which bytes are missing

    def end(self) -> None:
        """Nothing to do: the last token has been passed on."""


def _until_end(loaded: LoadedModel, new: list[int], ends: Sequence[int]) -> Answer:
    """The tokens before the first end token; everything after it is padding."""
    length = next((i for i, token in enumerate(new) if token in ends), len(new))
    text = loaded.tokenizer.decode(new[:length], skip_special_tokens=True)
    return Answer(str(text), length, ended=length < len(new))


def end_tokens(loaded: LoadedModel) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those that the model knows.

    `teach_end` adds the one that the chat template writes.
    """
    own: Any = loaded.model.generation_config.eos_token_id
    base = own if isinstance(own, list) else [own]
    return sorted({loaded.tokenizer.eos_token_id, *(token for token in base if token is not None)})


def teach_end(loaded: LoadedModel) -> None:
    """Let a model end its answers with the token that its chat template writes there.

    A base model's end token usually ends documents, not turns. The model's generation settings and
    its tokenizer are changed, in memory and in everything that is saved or exported. Nothing
    changes if they know the token already.
    """
    tokenizer = loaded.tokenizer
    end = traits_of(tokenizer).end
    known = end_tokens(loaded)
    if end is None or (token := tokenizer.convert_tokens_to_ids(end)) in known:
        return
    loaded.model.generation_config.eos_token_id = [*known, token]
    text, before = render(tokenizer, PROBE, ask=False), tokenizer.eos_token
    tokenizer.eos_token = end
    if render(tokenizer, PROBE, ask=False) != text:  # the template writes eos_token elsewhere
        tokenizer.eos_token = before
