"""A conversation with a finished run: its base and the federated model answer the same messages.

Each of them sees only its own earlier answers. This file knows loaded models and a recipe. It does
not know terminals, pages or run folders.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from silotune.core.errors import ConfigError
from silotune.core.wording import counted
from silotune.data.chat_templates import render
from silotune.data.conversations import Conversation
from silotune.models.adapters import PROMPT_KINDS
from silotune.models.loading import LoadedModel, base_only
from silotune.recipes.schema import RunConfig
from silotune.training.generate import complete, encode
from silotune.training.tasks.classify import predictions

Speaker = Literal["base", "federated"]
SPEAKERS: tuple[Speaker, ...] = ("base", "federated")
"""The order in which they are asked and shown."""

NO_HEAD = "the base has no head for these labels, so it cannot answer"
"""Why a classifier's base is not asked."""

Tell = Callable[[str, str], None]
"""(speaker, what it has said so far): called while it speaks."""
Exchange = tuple[str, str]
"""A message and the answer to it."""
History = Mapping[str, tuple[Exchange, ...]]
"""Speaker -> its messages and answers, oldest first; {} before the first message."""


@dataclass(frozen=True)
class Reply:
    """The answers to one message."""

    answers: Mapping[str, str]
    """By speaker."""
    history: History
    """Includes this exchange; pass it in with the next message."""
    num_unseen: Mapping[str, int]
    """How many of the oldest exchanges did not fit before this message, by speaker."""
    cut: tuple[str, ...] = ()
    """Speakers whose answer ended because it had become too long."""

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence for each speaker that no longer sees the entire conversation."""
        return tuple(
            f"{name} no longer sees the oldest {unseen} of "
            f"{counted(len(self.history[name]) - 1, 'exchange')}: its context is full"
            for name, unseen in self.num_unseen.items()
            if unseen
        )


@dataclass(frozen=True)
class Speakers:
    """The models of a run, loaded once, and how to ask them. A conversation goes in and out.

    Not thread-safe: while the base answers, the adapter of the same model is switched off.
    """

    run: RunConfig
    models: Mapping[str, LoadedModel]
    """By speaker, in the order of `SPEAKERS`. Both share one model, unless all weights were
    trained: then the base is a separate model."""
    max_new_tokens: int = 128
    """Maximum length of an answer, in tokens."""

    def reply(self, text: str, history: History, *, tell: Tell | None = None) -> Reply:
        """Let every speaker answer, greedily, with the system text and the template of training.

        If a conversation has become too long for the model's context, the oldest exchanges are
        dropped from the prompt. A classifier judges every message separately.

        Args:
            text: The message; with the task classify, the text to label.
            history: The conversation so far. Not modified.
            tell: Called with every new piece of an answer.

        Raises:
            ConfigError: This message alone is too long.
        """
        seen = {name: self._prompt(name, text, history.get(name, ())) for name in self.models}
        said = {name: self._answer(name, text, ids, tell) for name, (ids, _) in seen.items()}
        answers = {name: one for name, (one, _) in said.items()}
        return Reply(
            answers,
            {name: (*history.get(name, ()), (text, said)) for name, said in answers.items()},
            {name: unseen for name, (_, unseen) in seen.items()},
            tuple(name for name, (_, ended) in said.items() if not ended),
        )

    def _answer(
        self, name: str, text: str, ids: list[int], tell: Tell | None = None
    ) -> tuple[str, bool]:
        """What a speaker says, and whether it came to an end."""
        loaded = self.models[name]
        if self.run.task == "classify":
            shares = predictions(loaded, [{"text": text}], self.run.train.max_length)[0]
            label = (self.run.data.labels or ())[int(shares.argmax())]
            return f"{label} ({float(shares.max()):.1%})", True
        asleep = name == "base" and loaded.has_adapter
        with base_only(loaded) if asleep else contextlib.nullcontext():
            so_far = None if tell is None else partial(tell, name)
            (said,) = complete(loaded, [ids], max_new_tokens=self.max_new_tokens, tell_text=so_far)
        return said.text.strip(), said.ended

    def _prompt(self, name: str, text: str, talk: tuple[Exchange, ...]) -> tuple[list[int], int]:
        """Token ids of as much of the conversation as fits, and how many exchanges do not fit."""
        if self.run.task == "classify":
            return [], 0
        loaded = self.models[name]
        places = positions(loaded)
        room = None if places is None else places - self.max_new_tokens
        ids: list[int] = []
        for unseen in range(len(talk) + 1):
            messages = self._messages(text, talk[unseen:])
            (ids,) = encode(loaded, [render(loaded.tokenizer, messages, ask=True)])
            if room is None or len(ids) <= room:
                return ids, unseen
        raise ConfigError(
            f"this message is {len(ids)} tokens long with its template; the model's context has "
            f"{places} tokens, of which {self.max_new_tokens} are reserved for the answer.\n"
            "  Shorten it, or set a smaller --max-new-tokens."
        )

    def _messages(self, text: str, talk: tuple[Exchange, ...]) -> Conversation:
        system = self.run.data.system
        return (
            *([{"role": "system", "content": system}] if system else []),
            *(
                {"role": role, "content": content}
                for exchange in talk
                for role, content in zip(("user", "assistant"), exchange, strict=True)
            ),
            {"role": "user", "content": text},
        )


def positions(loaded: LoadedModel) -> int | None:
    """The model's context in tokens; None if its configuration does not say.

    Trained vectors in front of the text take up positions too, but not in the base.
    """
    config = loaded.model.config.get_text_config()
    places = getattr(config, "max_position_embeddings", None)
    if places is None or loaded.kind not in PROMPT_KINDS:
        return places
    return places - sum(own.num_virtual_tokens for own in loaded.model.peft_config.values())


@dataclass
class Chat:
    """One conversation: remembers what was said. The models are in `speakers`, loaded once."""

    speakers: Speakers
    history: History = field(default_factory=dict[str, tuple[Exchange, ...]])
    notes: tuple[str, ...] = ()
    """Notes on the last answers; see `Reply`."""

    def say(self, text: str) -> dict[str, str]:
        """Answers by speaker. See `Speakers.reply`."""
        reply = self.speakers.reply(text, self.history)
        self.history, self.notes = reply.history, reply.notes
        return dict(reply.answers)

    def reset(self) -> None:
        """Forget the conversation."""
        self.history, self.notes = {}, ()
