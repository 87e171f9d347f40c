"""Scores of generated answers, and the published ROUGE of the workshop's predictions."""

import json
from pathlib import Path

import pytest

from silotune.training.generate import Answer
from silotune.workflows.evaluate.text_scores import judge, mean, question_of, rouge

DATA = Path(__file__).parents[5] / "shared" / "data" / "cardbiomed"


@pytest.mark.skipif(not DATA.is_dir(), reason="the workshop's predictions are not shipped")
@pytest.mark.parametrize("stem", [True, False])
@pytest.mark.parametrize("model", ["base_model", "centralized", "federated"])
def test_the_workshops_predictions_have_their_published_scores_to_every_digit(stem, model):
    golden = json.loads((DATA / "rouge_golden.json").read_text("utf-8"))
    lines = (DATA / "workshop_predictions.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == golden["rows"]
    found = rouge([r["reference"] for r in rows], [r[model] for r in rows], stem=stem)
    expected = golden["scores"][f"use_stemmer_{str(stem).lower()}"][model]
    for kind, value in expected.items():
        assert f"{sum(f[kind] for f in found) / len(found):.6f}" == f"{value:.6f}"


def test_scores_of_hand_made_answers():
    said = [
        Answer(" The gene is BRCA1.\n", 6, True),
        Answer("Nothing alike", 2, False),
        Answer("", 0, True),
    ]
    found = judge(said, ["The gene is BRCA1.", "A fever", "A fever"])
    assert (found[0].rouge1, found[0].rouge2, found[0].rougeL, found[0].exact) == (1, 1, 1, 1)
    assert (found[1].rouge1, found[1].exact, found[1].ended) == (0, 0, 0)
    assert (found[2].rougeL, found[2].length, found[2].ended) == (0, 0, 1)
    assert mean(found)["exact"] == pytest.approx(1 / 3)
    assert mean(found)["length"] == pytest.approx(8 / 3)


def test_rouge_by_hand():
    # 3 of 4 and 3 of 5 words are shared: F = 2 * 0.75 * 0.6 / 1.35
    (one,) = rouge(["red blue green black white"], ["red blue green pink"])
    assert one["rouge1"] == pytest.approx(2 * 0.75 * 0.6 / 1.35)
    # pairs: 2 of 3 and 2 of 4
    assert one["rouge2"] == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))


def test_the_question_is_all_before_the_last_answer():
    talk = tuple(
        {"role": role, "content": text}
        for role, text in [
            ("system", "s"), ("user", "1"), ("assistant", "one"), ("user", "2"),
            ("assistant", "two"),
        ]
    )  # fmt: skip
    asked, reference = question_of(talk)
    assert [turn["content"] for turn in asked] == ["s", "1", "one", "2"]
    assert reference == "two"
