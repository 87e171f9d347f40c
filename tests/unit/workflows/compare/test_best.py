"""Each client takes its best by validation rows: the choice is its own, and costs no honesty."""

import math

import numpy as np
import pytest

from silotune.workflows.compare.best import (
    BEST,
    best_table,
    choice_tables,
    choose_best,
    extension_table,
)
from silotune.workflows.compare.names import builds_on, counterpart, extension
from silotune.workflows.compare.statistics import compare_arms, federated_arms
from silotune.workflows.compare.verdicts import best_verdict, worse_off_warnings

OWN = "federated + own steps"
LONE = "local + own steps"
NUM_TRAIN = {"north": 10, "south": 30}
SEEDS = (1, 2, 3)


def rows(mean, num_rows=24):
    spread = [i / num_rows for i in range(num_rows)]
    return [{"loss_sum": 4 * (mean + x), "num_tokens": 4} for x in spread]


def arms(**north):
    """Scores of arms; north's means are given by arm, with _ for other signs, south's are 3."""
    means = {"local": 2.0, "federated": 2.0, OWN: 2.0, LONE: 2.0}
    means |= {name.replace("_own", " + own steps"): mean for name, mean in north.items()}
    return {
        arm: {s: {"north": rows(mean + 0.01 * s), "south": rows(3.0)} for s in SEEDS}
        for arm, mean in means.items()
    }


def losses(north, south=None):
    """Validation losses by arm, the same for all seeds; 5 where none is given."""
    return {
        arm: {
            s: {"north": north.get(arm, 5.0), "south": (south or {}).get(arm, 5.0)} for s in SEEDS
        }
        for arm in ("local", "federated", LONE, OWN)
    }


def comparison(scores, validation):
    found = compare_arms(scores, num_train=NUM_TRAIN)
    found["best"] = choose_best(scores, validation, num_train=NUM_TRAIN)
    return {**found, "arms": dict.fromkeys(scores), "result": "federated"}


def test_a_client_takes_what_its_validation_rows_prefer_and_in_doubt_stays_alone():
    found = choose_best(arms(), losses({OWN: 1.0}), num_train=NUM_TRAIN)
    assert found["takes"] == {"north": [OWN] * 3, "south": ["local"] * 3}
    assert found["alone"] == {"north": ["local"] * 3, "south": ["local"] * 3}
    south = found["clients"]["south"]["differences"]["loss"][BEST]
    assert (south["mean"], south["low"], south["high"], south["p_value"]) == (0, 0, 0, 1)


def test_the_figure_is_that_of_held_out_rows_also_where_the_choice_was_wrong():
    wrong = comparison(arms(federated=2.5), losses({"federated": 1.0}))
    gap = wrong["best"]["clients"]["north"]["differences"]["loss"][BEST]
    assert gap["mean"] == pytest.approx(0.5)
    assert wrong["best"]["clients"]["north"]["verdicts"]["loss"][BEST] == "lost"
    assert "the mean over clients lost: held-out loss +0.250" in best_verdict(wrong)[0]


def test_the_best_alone_chooses_too():
    """Lone clients may go on as well: what joining gives is compared with that."""
    scores = arms(local_own=1.0, federated_own=0.9)
    found = choose_best(scores, losses({LONE: 2.0, OWN: 1.0}), num_train=NUM_TRAIN)
    assert found["alone"]["north"] == [LONE] * 3
    gain = found["clients"]["north"]["differences"]["loss"][BEST]["mean"]
    assert gain == pytest.approx(-0.1)


def test_every_seed_chooses_for_itself():
    validation = losses({"federated": 1.0})
    validation["federated"][2]["north"] = math.inf
    scores = arms(federated=1.4)
    found = comparison(scores, validation)
    assert found["best"]["takes"]["north"] == ["federated", "local", "federated"]
    gain = found["best"]["clients"]["north"]["differences"]["loss"][BEST]["mean"]
    assert gain == pytest.approx(2 / 3 * -0.6)
    table = best_table(found, "loss")
    assert table[1][1] == "federated (2 of 3 seeds), local (1)"
    assert table[-1][0] == "mean over clients"


def test_choosing_among_equals_looks_like_no_gain_although_the_winners_loss_does():
    """300 comparisons in which no arm is better than another: the winner's luck stays in its
    validation rows, and intervals hold the truth about as often as they say."""
    rng, gains, lucky, covered = np.random.default_rng(0), [], [], 0
    names = ("local", LONE, "federated", OWN)
    for _ in range(300):
        scores, validation = {}, {}
        common = rng.normal(0, 0.3, 24)
        for arm in names:
            scores[arm], validation[arm] = {}, {}
            for seed in SEEDS:
                luck = rng.normal(0, 0.05)  # of this training, on all rows
                held = 2 + common + luck + rng.normal(0, 0.1, 24)
                rows_ = [{"loss_sum": float(x), "num_tokens": 1} for x in held]
                scores[arm][seed] = {"north": rows_}
                validation[arm][seed] = {"north": 2 + rng.normal(0, 0.1)}
        found = choose_best(scores, validation, num_train={"north": 9})
        gap = found["overall"]["differences"]["loss"][BEST]
        gains.append(gap["mean"])
        covered += gap["low"] <= 0 <= gap["high"]
        by_seed = [min(validation[a][s]["north"] for a in names) for s in SEEDS]
        lucky.append(float(np.mean(by_seed)) - 2)
    error = float(np.std(gains)) / 300**0.5
    assert abs(float(np.mean(gains))) < 3 * error
    assert float(np.mean(lucky)) < -0.05
    assert covered / 300 > 0.92


def test_extended_arms_are_compared_with_lone_clients_that_went_on_alike():
    scores = arms(federated=1.8, federated_own=1.6, local_own=1.5)
    found = comparison(scores, losses({}))
    gaps = found["clients"]["north"]["differences"]["loss"]
    assert gaps["federated"]["mean"] == pytest.approx(-0.2)
    assert gaps[LONE]["mean"] == pytest.approx(-0.5)
    assert gaps[OWN]["mean"] == pytest.approx(+0.1), "not -0.4"
    assert worse_off_warnings(found) == [
        "With “federated + own steps”, a higher mean loss than with “local + own steps”: north "
        "(clearly: north)."
    ]
    assert extension_table(found, "loss")[0] == ("client", "+ own steps", "verdict")
    assert extension_table(found, "loss")[1][1:] == ("+0.100 [+0.100, +0.100]", "lost")
    assert federated_arms(found) == ["federated"]
    assert len(choice_tables(found, "loss")) == 2


def test_without_validation_rows_or_own_steps_there_are_no_such_tables():
    scores = {arm: by_seed for arm, by_seed in arms().items() if " + " not in arm}
    found = compare_arms(scores, num_train=NUM_TRAIN)
    found = {**found, "arms": dict.fromkeys(scores), "result": "federated"}
    assert choice_tables(found, "loss") == []
    assert best_verdict(found) == []


def test_an_arm_that_only_looks_like_an_extension_is_none():
    for name in ("federated: x + own steps", "federated: own steps", "only a + own steps"):
        assert builds_on(name) is None
        assert counterpart(name) == "local"
    assert counterpart(extension("federated", "interpolation")) == "local + interpolation"
    assert counterpart(LONE) == "local"
