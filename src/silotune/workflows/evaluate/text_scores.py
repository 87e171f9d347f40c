"""Score generated answers against references: ROUGE, exact match, length, and whether they ended.

Similar words score high here, and facts do not count: an answer can be fluent, wrong and well
scored. Read some of the answers; they are always saved.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from silotune.data.conversations import Conversation
from silotune.training.generate import Answer


@dataclass(frozen=True)
class Quality:
    """One answer's scores, each from 0 to 1 except the length."""

    rouge1: float
    """F-measure of shared words, after stemming (Lin 2004, "ROUGE", sections 2 and 3)."""
    rouge2: float
    """F-measure of shared pairs of words."""
    rougeL: float
    """F-measure of the longest common subsequence of words."""
    exact: float
    """1 if the answer equals the reference, apart from blanks at the ends."""
    length: float
    """Length of the answer, in tokens."""
    ended: float
    """1 if the model ended the answer, 0 if it reached the maximum length."""


def question_of(talk: Conversation) -> tuple[Conversation, str]:
    """The turns before the last answer, and that answer: what a model is asked, and the reference.

    An answer that is only context ("train": False) is no reference. Neither is a call of a tool,
    unless there is no other answer: it is then the reference as JSON.

    Example:
        >>> talk = ({"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"})
        >>> question_of(talk)[1]
        '4'
    """
    learned = [
        i for i, turn in enumerate(talk) if turn["role"] == "assistant" and turn.get("train", True)
    ]
    said = [i for i in learned if talk[i]["content"].strip()]
    last = max(said or learned)
    called = [call["function"] for call in talk[last].get("tool_calls", ())]
    return talk[:last], talk[last]["content"] or json.dumps(called, ensure_ascii=False)


def rouge(
    references: Sequence[str], texts: Sequence[str], *, stem: bool = True
) -> list[dict[str, float]]:
    """F-measures rouge1, rouge2 and rougeL of each text, by Google's rouge_score.

    Args:
        references: The expected texts.
        texts: The generated texts.
        stem: Whether "gene" and "genes" count as the same word (Porter's stemmer, English).
    """
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, use_stemmer=stem)
    pairs = zip(references, texts, strict=True)
    return [
        {kind: scores[kind].fmeasure for kind in kinds}
        for scores in (scorer.score(reference, text) for reference, text in pairs)
    ]


def judge(answers: Sequence[Answer], references: Sequence[str]) -> list[Quality]:
    """Score each answer against its reference."""
    texts = [a.text.strip() for a in answers]
    return [
        Quality(
            **shared,
            exact=float(text == reference.strip()),
            length=a.num_tokens,
            ended=float(a.ended),
        )
        for a, text, reference, shared in zip(
            answers, texts, references, rouge(references, texts), strict=True
        )
    ]


def mean(qualities: Sequence[Quality]) -> dict[str, float]:
    """The mean of every score over answers, each counting once."""
    rows = [asdict(q) for q in qualities]
    return {f.name: sum(row[f.name] for row in rows) / len(rows) for f in fields(Quality)}
