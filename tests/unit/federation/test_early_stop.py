"""`stop.patience`: when a run ends early, that a resume decides the same, and what it needs."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silotune.core.errors import ConfigError
from silotune.core.types import Score
from silotune.federation.budget import end_note, is_out_of_patience, read_spent
from silotune.federation.progress import Progress
from silotune.federation.run_folder import RunFolder
from silotune.recipes.sections import StopConfig
from silotune.results.budget_texts import budget_lines
from tests.unit.federation.test_rounds import StandInClients, go, recipe

STOPS = {"data__validation_fraction": 0.2, "checkpoint__keep": "best", "stop__patience": 2}


def oracle(losses, patience, delta):
    """Slow and obvious: go through the scores, and remember the lowest loss that counted."""
    counted, since = None, 0
    for round_ in range(1, 20):
        if round_ not in losses:
            continue
        lower = not math.isnan(losses[round_]) and (
            counted is None or losses[round_] + delta < counted
        )
        counted, since = (losses[round_], 0) if lower else (counted, since + 1)
    return since >= patience


@given(
    st.dictionaries(
        st.integers(0, 19), st.sampled_from([0.0, 1.0, 1.5, 2.0, 2.25, math.nan]), max_size=12
    ),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_patience_counts_the_scores_since_the_last_lower_one(losses, patience, delta):
    cfg = StopConfig(patience=patience, min_delta=delta)
    assert is_out_of_patience(cfg, losses) == oracle(losses, patience, delta)


def test_the_base_is_no_result_and_without_patience_nothing_ends():
    assert not is_out_of_patience(StopConfig(patience=1), {0: 1.0, 1: 3.0, 2: 2.0})
    assert is_out_of_patience(StopConfig(patience=1), {0: 1.0, 1: 3.0, 2: 3.0})
    assert not is_out_of_patience(StopConfig(), dict.fromkeys(range(9), 1.0))


class Improving(StandInClients):
    """Scores best after round 2; after round 4, it would be even better."""

    def train(self, messages):
        for update in super().train(messages):
            if update.round == getattr(self, "dies_in", None):
                raise KeyboardInterrupt
            losses = {0: 4.0, 1: 3.0, 2: 1.0, 3: 2.0, 4: 1.0, 5: 0.5}
            score = Score(update.client, losses[update.round - 1], 1, 0, 1)
            yield replace(update, score=score if update.score else None)


class Notes(Progress):
    def __init__(self):
        self.told = []

    def note(self, text):
        self.told.append(text)


def test_a_run_ends_once_its_validation_loss_no_longer_falls(tmp_path):
    said = Notes()
    state, folder = go(tmp_path, recipe(rounds=9, **STOPS), Improving(), progress=said)
    assert state.round == 5, "the scores of round 4 come with the answers of round 5"
    assert folder.best_round() == 2
    spent = read_spent(folder)
    assert spent is not None
    assert spent["ended_by"] == "stop.patience"
    assert said.told == [
        "stop.patience ends the run after round 5: 2 scored rounds in a row without a lower "
        "validation loss"
    ]


def test_the_reason_names_the_smallest_difference_that_counts():
    text = end_note("stop.patience", "3 of 9", StopConfig(patience=1, min_delta=0.01), ends="ended")
    assert text == (
        "stop.patience ended the run after round 3 of 9: 1 scored round in a row without a lower "
        "validation loss (by more than 0.01)"
    )
    ended = {"ended_by": "budget.bytes", "rounds": 2, "planned_rounds": 4}  # of an older version
    assert budget_lines({"budget": ended}) == ["budget.bytes ended the run after round 2 of 4"]


def test_only_scored_rounds_count_and_the_last_round_ends_nothing(tmp_path):
    run = recipe(rounds=5, evaluate__every=3, **STOPS)
    assert go(tmp_path / "few", run, Improving())[0].round == 5
    run, said = recipe(rounds=5, **STOPS), Notes()
    assert go(tmp_path / "all", run, Improving(), progress=said)[0].round == 5
    assert said.told == [], "it had no round left"


@pytest.mark.parametrize("dies_in", [2, 4, 5])
@pytest.mark.parametrize("every", [1, 4])
def test_a_resumed_run_decides_the_same(tmp_path, dies_in, every):
    run = recipe(rounds=9, checkpoint__every=every, **STOPS)
    whole, _ = go(tmp_path / "whole", run, Improving())
    clients = Improving()
    clients.dies_in = dies_in  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "killed", run, clients)
    folder = RunFolder.open(tmp_path / "killed" / "run")
    state = folder.load_state()
    folder.rewind(state.round if state else 0)
    resumed, _ = go(tmp_path / "killed", run, Improving(), folder=folder)
    assert resumed.round == whole.round == 5
    again, _ = go(tmp_path / "killed", run, Improving(), folder=folder)
    assert again.round == 5, "an ended run stays ended"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data__validation_fraction": 0.0}, "held-out rows must not decide when a run ends"),
        ({"evaluate__every": 0}, "needs validation losses, but evaluate.every is 0"),
        ({"checkpoint__keep": "last"}, "needs checkpoint.keep = 'best'"),
        ({"stop__patience": "none", "stop__min_delta": 0.1}, "only has an effect with stop.patie"),
        (
            {"privacy__unit": "client", "privacy__noise_multiplier": 1.0, "privacy__delta": 1e-5},
            "ends a run by validation losses, which have no noise",
        ),
    ],
)
def test_what_patience_needs_is_told(changes, says):
    given = {key: value for key, value in {**STOPS, **changes}.items() if value != "none"}
    with pytest.raises(ConfigError, match="stop") as error:
        recipe(**given)
    assert says in " ".join(str(error.value).split())
