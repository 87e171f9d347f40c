"""Two honest ways to answer a suite, both in the model's own chat template.

Likelihood: which label is most likely according to the model. It always gives an answer, so it
shows what the model knows about the options, but not whether it would answer in that form.
Generation: what the model generates, read by the strict parser of `parsing.py`. Outputs that are
not an answer are counted separately from wrong answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from silotune.data.chat_templates import render
from silotune.data.conversations import Conversation
from silotune.models.loading import LoadedModel
from silotune.training.generate import answers, encode
from silotune.training.tasks.instruct import only_positions
from silotune.workflows.evaluate.suites.base import Item
from silotune.workflows.evaluate.suites.parsing import parse_answer
from silotune.workflows.evaluate.suites.results import Answered


def conversation_of(item: Item, system: str | None) -> Conversation:
    """The item as a conversation that waits for the assistant."""
    before = () if system is None else ({"role": "system", "content": system},)
    return (*before, {"role": "user", "content": item.prompt})


def score_generation(
    loaded: LoadedModel,
    items: Sequence[Item],
    *,
    system: str | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 16,
) -> list[Answered]:
    """Generate answers greedily, and parse them.

    Args:
        loaded: The model in its current state.
        items: Questions.
        system: The run's system text.
        max_new_tokens: Maximum length of an answer. A truncated text is parsed like any other.
        batch_size: Prompts in one forward pass; the answers do not depend on it beyond rounding.
    """
    talks = [conversation_of(item, system) for item in items]
    said = answers(loaded, talks, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return [
        Answered(item, parse_answer(one.text, item.options), output=one.text)
        for item, one in zip(items, said, strict=True)
    ]


def score_likelihood(
    loaded: LoadedModel,
    items: Sequence[Item],
    *,
    system: str | None = None,
    batch_size: int = 16,
) -> list[Answered]:
    """Choose the label with the highest sum of log-probabilities after the prompt.

    The sum is over the label's own tokens, in nats, from a float32 log-softmax. It does not include
    an end token, and it is not divided by the length. In a tie, the first label wins.

    Args:
        loaded: The model in its current state.
        items: Questions.
        system: The run's system text.
        batch_size: Sequences in one forward pass; scores do not depend on it beyond rounding.
    """
    asked = [_continuations(loaded, item, system) for item in items]
    # Labels of one token share their input, the prompt: one pass scores all of them.
    inputs = sorted({one.input for some in asked for one in some}, key=lambda ids: (-len(ids), ids))
    wanted: dict[tuple[int, ...], list[_Continuation]] = {ids: [] for ids in inputs}
    for one in (one for some in asked for one in some):
        wanted[one.input].append(one)
    sums: dict[_Continuation, float] = {}
    for at in range(0, len(inputs), batch_size):
        sums |= _score(loaded, [wanted[ids] for ids in inputs[at : at + batch_size]])
    return [
        _answered(item, [sums[one] for one in some])
        for item, some in zip(items, asked, strict=True)
    ]


@dataclass(frozen=True)
class _Continuation:
    """A label as tokens that follow other tokens."""

    before: tuple[int, ...]
    label: tuple[int, ...]

    @property
    def input(self) -> tuple[int, ...]:
        """What the model reads: everything except the last token, which is only predicted."""
        return self.before + self.label[:-1]


def _continuations(loaded: LoadedModel, item: Item, system: str | None) -> list[_Continuation]:
    """One continuation per label, all after the same tokens.

    Prompt and label are tokenised together, as in training. If a label merges with the end of the
    prompt into one token, scoring starts before that token, for all labels of the item.
    """
    prompt = render(loaded.tokenizer, conversation_of(item, system), ask=True)
    bare, *full = encode(loaded, [prompt, *(prompt + label for label in item.options)])
    shared = min(_common(bare, ids) for ids in full)
    return [_Continuation(tuple(ids[:shared]), tuple(ids[shared:])) for ids in full]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix, which leaves at least one token of `other`."""
    pairs = zip(one, other[:-1], strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other) - 1))


def _score(
    loaded: LoadedModel, batch: Sequence[Sequence[_Continuation]]
) -> dict[_Continuation, float]:
    """The sums of one batch; the continuations of each entry share their input."""
    length = max(len(some[0].input) for some in batch)
    # Padding is on the right: with causal attention no real token sees it. See tasks/instruct.py.
    ids = torch.zeros(len(batch), length, dtype=torch.int64)
    places: list[int] = []
    targets: list[int] = []
    for i, some in enumerate(batch):
        ids[i, : len(some[0].input)] = torch.tensor(some[0].input)
        for one in some:
            first = i * length + len(one.before) - 1  # the token at t is predicted at t - 1
            places += range(first, first + len(one.label))
            targets += one.label
    picked = _log_probabilities(loaded, ids, places, targets)
    each = [one for some in batch for one in some]
    parts = picked.split([len(one.label) for one in each])
    return {one: float(part.double().sum()) for one, part in zip(each, parts, strict=True)}


def _log_probabilities(
    loaded: LoadedModel, ids: torch.Tensor, places: Sequence[int], targets: Sequence[int]
) -> torch.Tensor:
    """(num_places,), float32, on the CPU; the vocabulary is scored only at these places."""
    model = loaded.model.get_base_model() if loaded.has_adapter else loaded.model
    where = torch.tensor(places, device=loaded.device)
    wanted = torch.tensor(targets, device=loaded.device)
    head, length = model.get_output_embeddings(), ids.shape[1]
    with torch.inference_mode(), only_positions(head, where, length):
        logits = loaded.model(input_ids=ids.to(loaded.device), use_cache=False).logits
        logs = logits.float().log_softmax(-1)  # (num_places, vocabulary)
        return logs.gather(1, wanted[:, None])[:, 0].cpu()


def _answered(item: Item, sums: Sequence[float]) -> Answered:
    scores = dict(zip(item.options, sums, strict=True))
    return Answered(item, max(scores, key=lambda label: scores[label]), scores=scores)
