"""Whatever a client says that decodes: its run ends in a report, a card and a page."""

import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from silotune.core.errors import UpdateError
from silotune.core.types import Failure, Score, Update
from silotune.federation.progress_lines import LiveProgress, PlainProgress
from silotune.federation.round_rows import round_rows, score_rows
from silotune.results.card import model_card
from silotune.results.page import run_page
from silotune.results.summary import summarise
from silotune.runtime import wire
from silotune.runtime.payload import Parcel
from tests.unit.core.test_safe_text import HOSTILE, acts
from tests.unit.results.page_values import provenance, recipe, split_of

EDGES = [0, 1, 2, 9, 2**31, 2**53 - 1, 2**53, -1, 2**54, 10**400]
counts = st.sampled_from(EDGES) | st.integers(0, 2**53)
numbers = st.sampled_from(
    [0.0, -0.0, 5e-324, 1e-9, 1.0, 709.0, 1e6, 3e8, 1e12, 1e308, -1e308, -1.0]
) | st.floats(0, 1e6)
scores = st.fixed_dictionaries(
    {
        "loss_sum": numbers | st.floats(0, 1e22),
        "num_tokens": counts,
        "num_correct": st.sampled_from([0, 1]) | counts,
        "num_examples": counts,
    }
)
metrics = st.fixed_dictionaries(
    {"seconds": numbers, "seconds_training": numbers},
    optional={
        **dict.fromkeys(("penalty", "lr", "noise_multiplier", "sampling_rate"), numbers),
        **dict.fromkeys(("num_steps", "num_padded_tokens", "num_targets", "num_lots"), counts),
    },
)
losses = st.just({}) | st.fixed_dictionaries({"train_loss": numbers, "num_tokens": counts})
updates = st.builds(
    lambda num, said, loss, score: Parcel(
        {
            "update": {
                "round": 1,
                "num_examples": num,
                "metrics": {**said, **loss},
                "settings": {},
                "score": score,
                "tensors": [],
            }
        },
        np.zeros(0, dtype=np.float32),
    ),
    counts,
    metrics,
    losses,
    st.none() | scores,
)
alone = st.builds(lambda score: Parcel({"score": score, "round": 2}), scores)


class Spool:
    def __init__(self, updates):
        self._updates = updates

    def reports(self):
        return self._updates


def decoded(parcel, client):
    try:
        return wire.decode_answer(parcel, client, bytes_down=9)
    except UpdateError as error:
        return Failure(client, 1, "unreadable", str(error))


def finished(answers, last):
    """All that a run of one round says and writes, from what its clients answered."""
    names = [answer.client for answer in answers]
    good = [
        replace(a, metrics={**a.metrics, "delta_norm": 1.0})
        for a in answers
        if isinstance(a, Update)
    ]
    bad = [answer for answer in answers if isinstance(answer, Failure)]
    rows = round_rows(1, names, Spool(good), bad, [], {}, 1.0)
    rows += score_rows(1, last)
    shown = io.StringIO()
    for kind in (PlainProgress, LiveProgress):
        progress = kind(Console(file=shown, width=10_000, highlight=False))
        progress.begin(1, 1)
        progress.begin_round(1, names)
        for answer in answers:
            if isinstance(answer, Update):
                progress.client_done(answer)
            else:
                progress.client_failed(answer)
        progress.end_round(1, rows)
        progress.end()
    # `Updates.num_rows`: what the clients have reported, within the same range
    clients = {name: {"num_train": 2**53, "num_eval": 2**53} for name in names}
    measured = {
        "runtime": "flower",
        "seconds_total": 1.0,
        "base_model_loads": 2**53,
        "peak_memory_bytes": 2**53,
        "adapter_sha256": "59" * 32,
    }
    summary = summarise(recipe(), rows, clients, result_round=1, measured=measured)
    split = split_of(names)
    card = model_card(recipe(), summary, rows, provenance(), split=split)
    page = run_page(recipe(), summary, rows, provenance(), split=split, samples=[])
    return shown.getvalue(), card, page


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sent=st.lists(updates, min_size=3, max_size=3), last=st.lists(alone, min_size=3, max_size=3))
def test_any_message_that_decodes_leads_to_a_report_a_card_and_a_page(sent, last):
    """Bug: seconds of 1e308 ended a finished run in an OverflowError, and so every resume."""
    names = ("east", "north", "south")
    answers = [decoded(parcel, name) for name, parcel in zip(names, sent, strict=True)]
    scored = [decoded(parcel, name) for name, parcel in zip(names, last, strict=True)]
    finished(answers, [score for score in scored if isinstance(score, (Score, Failure))])


def update_of(client):
    facts = {"train_loss": 1.0, "num_tokens": 5, "seconds": 1.0, "seconds_training": 1.0}
    return Update(client, 1, {}, 4, facts, score=Score(client, 2.0, 2, 1, 1))


@pytest.mark.parametrize("failed", [False, True])
def test_what_clients_call_themselves_and_their_failures_acts_on_nothing(failed):
    """Bug: escapes, forged lines and markup reached job.log, terminals and the model card raw."""
    client = HOSTILE + "|x|"
    bad = Failure(client, 1, HOSTILE, HOSTILE)
    answers = [update_of("north"), bad if failed else update_of(client)]
    shown, card, page = finished(answers, [Score(c, 2.0, 2, 1, 1) for c in ("north", client)])
    said = shown.replace("\x1b[?25l", "").replace("\x1b[?25h", "")
    for text in (said, card, page):
        assert not [c for c in acts(text) if c not in "\n\t"]
    for line in said.splitlines():
        assert not line.startswith("2026-01-01")
    assert "\n2026-01-01" not in card
    assert "<img" not in card.replace("\\<", "")
    assert "<img src=x onerror" not in page
    assert "FAKE LINE" in card  # shown as words
