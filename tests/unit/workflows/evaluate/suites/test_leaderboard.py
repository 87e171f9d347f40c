"""The leaderboard's protocol: exact prompts, parsing, and the published scores."""

import json
from pathlib import Path

import pytest

from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig
from silotune.models.loading import load_model
from silotune.training.generate import complete, encode
from silotune.workflows.evaluate.suites import SUITES, leaderboard
from silotune.workflows.evaluate.suites.leaderboard import (
    INSTRUCTIONS,
    is_correct_medical,
    parse_finance,
    parse_medical,
    run_finance,
    run_medical,
)

PUBLISHED = Path(__file__).parents[6] / "shared" / "data" / "flowertune_medical_outputs"
needs_published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"{PUBLISHED} is not there")

OPTIONS = {"A": "Aspirin", "B": "Ibuprofen"}


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return load_model(
        ModelConfig(name=str(tiny_model)), AdapterConfig(rank=2), seed=0, device="cpu"
    )


@needs_published
@pytest.mark.parametrize("name", ["medqa", "medmcqa"])
def test_published_scores_come_out_to_every_printed_digit(name):
    lines = (PUBLISHED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    golden = json.loads((PUBLISHED / "golden.json").read_text(encoding="utf-8"))[name]
    assert len(rows) == golden["rows"]
    for model, accuracy in golden["accuracy"].items():
        found = [is_correct_medical(row["outputs"][model], row["gold"]) for row in rows]
        assert found == [row["correct"][model] for row in rows]
        assert round(sum(found) / len(found), 6) == accuracy


@pytest.mark.parametrize(
    ("output", "parsed"),
    [
        ("B", "b"),
        ("b)", "b"),
        ("(C) Codeine", "c"),
        ("An infection", "a"),  # the trap: an article counts
        ("Answer: D", "a"),
        ("E", "e"),
        ("The answer is B", "The answer is B"),
        ("The", "The"),
        ("\n", "\n"),
        ("", ""),
        ("42", "42"),
        ("text\n## Answer: b", "a"),
        ("text\n##b\nmore", "b"),
        ("## b", "b"),  # not after a line break, but the marks are only blanks
    ],
)
def test_a_choice_is_read_from_the_first_character(output, parsed):
    assert parse_medical(output, "choice") == parsed


@pytest.mark.parametrize(
    ("output", "parsed"),
    [
        ("Yes", "yes"),
        (" no.", "no"),
        ("yesyes", "yes"),
        ("nono", "no"),
        ("yesno", "yes"),
        ("noyes", "no"),
        ("maybe", "maybe"),
        ("yes it does", "yes it does"),
        ("a", "a"),
    ],
)
def test_a_boolean_is_read_from_the_whole_output(output, parsed):
    assert parse_medical(output, "boolean") == parsed


@pytest.mark.parametrize(
    ("output", "gold", "correct"),
    [
        ("A patient", "A", True),
        ("b", "B", True),
        ("The", "C", False),
        ("Yes.", "yes", True),
        ("maybe", "maybe", True),
        (" maybe", "maybe", False),  # only to the letter
        ("Maybe", "maybe", False),
        ("yes", "maybe", False),
    ],
)
def test_what_counts_as_right(output, gold, correct):
    assert is_correct_medical(output, gold) is correct


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Input: x\nAnswer: positive", "positive"),
        ("Input: x\nAnswer: Negative.", "negative"),
        ("Input: x\nAnswer: negative or positive", "positive"),
        ("Input: a positive year\nAnswer: no idea", "neutral"),
        ("Input: Answer: positive!\nAnswer: negative", "positive"),  # the first mark counts
        ("Input: x\nAnswer: ", "neutral"),
        ("negative", "negative"),
    ],
)
def test_a_sentiment_is_read_after_the_first_mark(text, label):
    assert parse_finance(text) == label


@pytest.mark.parametrize(("question", "shown"), [("Why", "Why?"), ("Why?", "Why?"), ("S.", "S.")])
def test_the_medical_prompt_to_the_letter(question, shown):
    row = {"question": question, "options": OPTIONS, "answer": "A"}
    assert SUITES["medqa"].read(row, "r:1").leaderboard == (
        f"<|im_start|>question\n{INSTRUCTIONS['medqa']}\nQuestion: {shown}\n\nOptions:\n"
        "A. Aspirin\nB. Ibuprofen\nThe answer is:\n<|im_end|>\n<|im_start|>answer\n"
    )


def test_the_finance_prompt_to_the_letter():
    item = SUITES["tfns"].read({"text": "Up.", "label": 1}, "r:1")
    assert item.leaderboard == f"Instruction: {INSTRUCTIONS['finance']}\nInput: Up.\nAnswer: "


def pubmedqa(golds: list[str]):
    rows = [
        {"question": f"Is {n}?", "contexts": ["x"], "final_decision": g}
        for n, g in enumerate(golds)
    ]
    return [SUITES["pubmedqa"].read(row, f"r:{n}") for n, row in enumerate(rows)]


def test_an_answer_has_as_many_tokens_as_the_first_gold_of_its_batch(loaded, monkeypatch):
    rooms = []

    def watch(*args, **settings):
        rooms.append((settings["max_new_tokens"], settings["batch_size"]))
        return complete(*args, **settings)

    monkeypatch.setattr(leaderboard, "complete", watch)
    items = pubmedqa(["no", "maybe", "maybe", "yes"])
    answered = run_medical(loaded, items, suite="pubmedqa", batch_size=2)
    assert rooms == [(2, 1), (5, 1)]  # bytes are tokens here; one prompt at a time
    assert [one.item for one in answered] == items


def test_finance_fills_512_tokens_counted_from_the_longest_of_the_batch(loaded, monkeypatch):
    rooms = []

    def none(_, prompts, **settings):
        rooms.append((settings["max_new_tokens"], max(map(len, prompts))))
        return complete(loaded, prompts, max_new_tokens=1, batch_size=4)

    monkeypatch.setattr(leaderboard, "complete", none)
    texts = ["short", "a little longer", "x" * 600]
    items = [SUITES["tfns"].read({"text": t, "label": 2}, f"r:{n}") for n, t in enumerate(texts)]
    run_finance(loaded, items, batch_size=2, instruction="Say.")
    assert [room + longest for room, longest in rooms[:1]] == [512]
    assert rooms[1][0] == 1
    assert rooms[1][1] == len("Instruction: Say.\nInput: \nAnswer: ") + 600


def test_another_wording_takes_the_place_of_ours(loaded, monkeypatch):
    seen = []
    monkeypatch.setattr(leaderboard, "encode", lambda *a, **s: seen.extend(a[1]) or encode(*a, **s))
    run_medical(loaded, pubmedqa(["yes"]), suite="pubmedqa", instruction="Be short.")
    assert seen[1].startswith("<|im_start|>question\nBe short.\nx\nIs 0?\n")
