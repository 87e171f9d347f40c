"""Likelihood and generation on a tiny model; the strict parser; counts and intervals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from silotune.data.chat_templates import render
from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig
from silotune.models.loading import load_model
from silotune.workflows.evaluate.suites import scoring
from silotune.workflows.evaluate.suites.base import Item
from silotune.workflows.evaluate.suites.metrics import classification
from silotune.workflows.evaluate.suites.parsing import parse_answer
from silotune.workflows.evaluate.suites.results import Answered, summarise
from silotune.workflows.evaluate.suites.scoring import (
    conversation_of,
    score_generation,
    score_likelihood,
)
from tests.conftest import build_tiny_model

CHOICES = {"A": "Aspirin", "B": "Ibuprofen", "C": "A patient", "D": "Insulin"}
WORDS = {"yes": "yes", "no": "no", "maybe": "maybe"}
SENTIMENTS = {label: label for label in ("negative", "neutral", "positive")}


@pytest.fixture(scope="module", params=["lora", "full"])
def loaded(request, tiny_model):
    found = load_model(
        ModelConfig(name=str(tiny_model), dtype="float32"),
        AdapterConfig(kind=request.param, rank=2),
        seed=0,
        device="cpu",
    )
    with torch.no_grad():
        for parameter in found.parameters.values():
            parameter.add_(torch.linspace(-0.3, 0.4, parameter.numel()).view_as(parameter))
    return found


def items(*, words: bool = True) -> list[Item]:
    kinds = (CHOICES, WORDS, SENTIMENTS) if words else (CHOICES,)
    return [
        Item(
            f"q{n}",
            "Why? " * (n % 5) + f"What is {n}?",
            kinds[n % len(kinds)],
            [*kinds[n % len(kinds)]][n % 3],
        )
        for n in range(10)
    ]


def oracle(loaded, item: Item, system: str | None) -> dict[str, float]:
    """One label after another: no batch, no shared prompt, the full vocabulary everywhere."""
    prompt = render(loaded.tokenizer, conversation_of(item, system), ask=True)
    start = len(loaded.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    scores = {}
    for label in item.options:
        ids = loaded.tokenizer(prompt + label, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logs = loaded.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        scores[label] = sum(float(logs[t - 1, ids[t]]) for t in range(start, len(ids)))
    return scores


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_likelihood_equals_a_plain_loop_for_every_batch_size(loaded, batch_size, system):
    asked = items()
    for one in score_likelihood(loaded, asked, system=system, batch_size=batch_size):
        assert one.scores is not None
        expected = oracle(loaded, one.item, system)
        assert dict(one.scores) == pytest.approx(expected, abs=1e-4)
        assert one.predicted == max(expected, key=lambda label: expected[label])
    assert [one.item for one in score_likelihood(loaded, asked)] == asked


def test_labels_of_one_token_share_one_forward_pass(loaded, monkeypatch):
    shapes = []
    real = scoring._log_probabilities
    monkeypatch.setattr(
        scoring, "_log_probabilities", lambda *a: shapes.append(tuple(a[1].shape)) or real(*a)
    )
    score_likelihood(loaded, items(words=False), batch_size=16)
    assert [rows for rows, _ in shapes] == [10]


def test_a_label_that_merges_with_the_prompt_is_scored_from_before_it(tmp_path):
    """A tokenizer that joins the prompt's last character with one label, not with the others."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    from silotune.data.chat_templates import PLAIN

    folder = build_tiny_model(tmp_path / "tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|im_end|>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}, "ĊA": 257}
    inner = Tokenizer(BPE(vocab=vocab, merges=[("Ċ", "A")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(folder)
    melting = load_model(
        ModelConfig(name=str(folder), dtype="float32"), AdapterConfig(rank=2), seed=0, device="cpu"
    )
    (one,) = score_likelihood(melting, [Item("q", "Q?", CHOICES, "A")])
    prompt = render(melting.tokenizer, conversation_of(one.item, None), ask=True)
    before = melting.tokenizer(prompt, add_special_tokens=False)["input_ids"][:-1]
    with torch.inference_mode():
        logs = melting.model(input_ids=torch.tensor([before])).logits[0, -1].log_softmax(-1)
    assert one.scores is not None
    assert one.scores["A"] == pytest.approx(float(logs[257]), abs=1e-5)
    assert one.scores["B"] < float(logs[vocab["Ċ"]])  # "\n", and then "B"


def test_equal_scores_go_to_the_first_label():
    item = Item("q", "Q?", CHOICES, "A")
    assert scoring._answered(item, [-2.0, -1.0, -1.0, -3.0]).predicted == "B"


def test_what_is_generated_is_kept_and_parsed(loaded):
    answered = score_generation(loaded, items(), max_new_tokens=4, batch_size=3)
    assert [one.item for one in answered] == items()
    assert all(one.output is not None for one in answered)
    assert all(
        one.predicted == parse_answer(one.output or "", one.item.options) for one in answered
    )


# --- the strict parser ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "label"),
    [
        *[(text, "B") for text in ("B", " B\n", "(B)", "B.", "B)", "[B]", "**B**", '"B"', "B:")],
        *[(text, "B") for text in ("B) Ibuprofen", "B. Ibuprofen", "B Ibuprofen", "B, because")],
        *[
            (text, "B")
            for text in ("Answer: B", "answer: (B)", "The answer is B", "b", "b.", "(b)")
        ],
        *[(text, "B") for text in ("The correct answer is **B**.", "The answer is: B\nBecause")],
        *[(text, "B") for text in ("Ibuprofen", "ibuprofen.", "The answer is ibuprofen.")],
        ("B. The answer is B", "B"),
        ("C. A patient", "C"),
        ("A patient", "C"),  # exactly the text of an option
        ("", None),
        ("The", None),
        ("An infection", None),
        ("Answer", None),
        ("Answer:", None),
        ("A patient should rest", None),
        ("a patient should rest", None),
        ("a) patient", None),
        ("Because of B", None),
        ("I think B", None),
        ("E", None),
        ("BC", None),
        ("A or B", None),
        ("A, B", None),
        ("A/B", None),
        ("(A) and (B)", None),
        ("A and B", None),
        ("A. Not so. The answer is B", None),
        ("Aspirin or Ibuprofen", None),
        ("Ibuprofen is a drug", None),
    ],
)
def test_the_strict_parser_takes_labels_and_whole_texts(output, label):
    assert parse_answer(output, CHOICES) == label


@pytest.mark.parametrize(
    ("output", "label"),
    [
        *[(text, "maybe") for text in ("maybe", "Maybe.", "Answer: maybe", "The answer is MAYBE")],
        *[(text, "yes") for text in ("Yes, because it does", "yes\nIt does", "(yes)", "Yes.")],
        ("No, no doubt", "no"),
        ("No evidence was found", None),
        ("Yes it does", None),
        ("yes/no", None),
        ("yes, no", None),
        ("yes or no", None),
        ("nothing", None),
        ("Not sure", None),
    ],
)
def test_words_are_answers_when_punctuation_or_the_end_follows(output, label):
    assert parse_answer(output, WORDS) == label


@pytest.mark.parametrize(
    ("output", "label"),
    [
        ("Positive", "positive"),
        ("The sentiment is neutral.", "neutral"),
        ("Sentiment: negative", "negative"),
        ("positive/negative", None),
        ("positive and negative", None),
        ("The sentiment of this text is mixed", None),
    ],
)
def test_sentiments_are_read_the_same_way(output, label):
    assert parse_answer(output, SENTIMENTS) == label


def test_two_options_with_the_same_text_cannot_be_distinguished_by_it():
    assert parse_answer("Aspirin", {"A": "Aspirin", "B": "aspirin"}) is None
    assert parse_answer("B) aspirin", {"A": "Aspirin", "B": "aspirin"}) == "B"


@given(st.text(max_size=40))
def test_the_parser_answers_with_an_option_or_not_at_all(output):
    assert parse_answer(output, CHOICES) in (*CHOICES, None)
    assert parse_answer(output, WORDS) in (*WORDS, None)


# --- results --------------------------------------------------------------------------------------


def answered(pairs: list[tuple[str, str | None]], options=WORDS, groups=()) -> list[Answered]:
    names = [*groups, *[""] * len(pairs)]
    return [
        Answered(Item(f"q{n}", "Q?", options, gold, group=names[n]), given, output=str(given))
        for n, (gold, given) in enumerate(pairs)
    ]


@given(st.lists(st.tuples(st.sampled_from([*WORDS]), st.sampled_from([*WORDS, None])), min_size=1))
def test_correct_and_wrong_and_unparsable_are_all(pairs):
    found = summarise("pubmedqa", "boolean", "generation", answered(pairs))
    assert (
        found.num_correct + found.num_wrong + found.num_unparsable == found.num_items == len(pairs)
    )
    for share in (found.accuracy, found.unparsable, found.wrong):
        assert 0 <= share.low <= share.mean + 1e-12 <= share.high + 2e-12 <= 1 + 3e-12
    assert sum(one.num_items for one in found.per_class.values()) == len(pairs)
    assert sum(one.num_correct for one in found.per_class.values()) == found.num_correct
    assert len(found.rows) == len(pairs)


def test_a_result_by_hand():
    pairs = [("yes", "yes"), ("yes", "no"), ("yes", None), ("no", "no"), ("maybe", None)]
    found = summarise("pubmedqa", "boolean", "generation", answered(pairs, groups=("g", "g")))
    assert (found.num_correct, found.num_wrong, found.num_unparsable) == (2, 1, 2)
    assert found.accuracy.mean == 0.4
    assert found.accuracy_parsable == pytest.approx(2 / 3)
    assert found.chance == pytest.approx(1 / 3)
    assert found.majority == 0.6
    assert {k: v.accuracy.mean for k, v in found.per_class.items()} == pytest.approx(
        {"maybe": 0, "no": 1, "yes": 1 / 3}
    )
    assert [(k, v.num_items, v.num_correct) for k, v in found.per_group.items()] == [("g", 2, 1)]
    # Wilson by hand: p = 0.4, n = 5, z = 1.959964
    z, p, n = 1.959963984540054, 0.4, 5
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert found.accuracy.low == pytest.approx((middle - half) / (1 + z * z / n))
    assert found.accuracy.high == pytest.approx((middle + half) / (1 + z * z / n))
    assert "rows" not in found.summary()
    assert found.rows[0] == {
        "suite": "pubmedqa",
        "way": "generation",
        "id": "q0",
        "group": "g",
        "gold": "yes",
        "predicted": "yes",
        "correct": True,
        "output": "yes",
    }


def test_chance_is_the_mean_over_items_with_different_numbers_of_options():
    four, two = answered([("A", "A")], CHOICES), answered([("A", "A")], {"A": "x", "B": "y"})
    found = summarise("medqa", "choice", "likelihood", [*four, *two])
    assert found.chance == (1 / 4 + 1 / 2) / 2
    assert found.metrics == {}


def test_nothing_parsable_has_no_accuracy_among_the_parsable():
    assert (
        summarise("x", "choice", "generation", answered([("yes", None)])).accuracy_parsable is None
    )


# --- metrics --------------------------------------------------------------------------------------


def test_an_output_that_is_not_an_answer_lowers_recall_but_no_precision():
    golds, labels = ["yes", "yes", "no", "no"], ["yes", "no"]
    found = classification(golds, ["yes", None, "no", "no"], labels)
    # yes: precision 1, recall 1/2, F1 2/3; no: 1
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["accuracy"] == 0.75
    wrong = classification(golds, ["yes", "no", "no", "no"], labels)
    assert wrong["macro_f1"] < found["macro_f1"]
    assert wrong["mcc"] < found["mcc"] < 1


def test_matthews_with_an_unparsable_class_by_hand():
    # covariances of Gorodkin 2004: golds yes, yes, no; given yes, -, no
    golds, given = [[1, 0, 0], [1, 0, 0], [0, 1, 0]], [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    x, y = (torch.tensor(rows, dtype=torch.float64) for rows in (golds, given))
    x, y = x - x.mean(0), y - y.mean(0)
    expected = float((x * y).sum() / ((x * x).sum() * (y * y).sum()).sqrt())
    found = classification(["yes", "yes", "no"], ["yes", None, "no"], ["yes", "no"])
    assert found["mcc"] == pytest.approx(expected)


def test_a_single_label_has_no_correlation():
    assert classification(["yes", "yes"], ["yes", "yes"], ["yes", "no"])["mcc"] == 0.0


def test_a_label_that_nobody_has_counts_zero_in_macro_f1():
    assert classification(["yes"], ["yes"], [*WORDS])["macro_f1"] == pytest.approx(1 / 3)
