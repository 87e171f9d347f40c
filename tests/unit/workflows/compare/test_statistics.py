"""The statistics of scored rows: means, pairs, verdicts, words."""

import pytest

from silotune.core.stats import Interval
from silotune.workflows.compare.statistics import (
    LOSS,
    against_table,
    compare_arms,
    cost_table,
    difference_table,
    score_table,
    verdict,
)
from silotune.workflows.compare.verdicts import worse_off_warnings


def rows(losses, tokens=4):
    return [{"loss_sum": loss * tokens, "num_tokens": tokens} for loss in losses]


def scores(federated_shift: float, num_rows: int = 24, seeds=(1, 2)):
    """Two clients with losses around 2 and 3; federated is local plus a shift."""
    spread = [i / num_rows for i in range(num_rows)]

    def arm(shift):
        return {
            s: {
                "north": rows([2 + shift + x + 0.01 * s for x in spread]),
                "south": rows([3 + shift + x + 0.01 * s for x in spread]),
            }
            for s in seeds
        }

    base = {seeds[0]: arm(1.0)[seeds[0]]}
    return {"base": base, "local": arm(0.0), "federated": arm(federated_shift)}


NUM_TRAIN = {"north": 10, "south": 30}


def result(**changes):
    found = compare_arms(scores(**changes), num_train=NUM_TRAIN, seed=3)
    cost = {"tokens": 1000, "examples": 10, "steps": 5, "seconds": 61.0}
    found["arms"] = {
        arm: {**cost, "bytes_up": 10**6, "bytes_down": 2 * 10**6} for arm in ("base", "federated")
    }
    return found


def test_a_constant_gain_is_found_exactly_although_the_rows_differ_widely():
    found = result(federated_shift=-0.1)
    for part in (*found["clients"].values(), found["overall"]):
        difference = part["differences"]["loss"]["federated"]
        assert difference["mean"] == pytest.approx(-0.1)
        assert difference["low"] == pytest.approx(-0.1)
        assert difference["high"] == pytest.approx(-0.1)
        assert part["verdicts"]["loss"]["federated"] == "gained"
    assert found["worse_off"] == {}


def test_the_mean_over_clients_counts_each_client_once():
    found = result(federated_shift=0.0)
    each = [c["scores"]["loss"]["local"]["mean"] for c in found["clients"].values()]
    assert found["overall"]["scores"]["loss"]["local"]["mean"] == pytest.approx(sum(each) / 2)


def test_the_base_has_one_seed_and_is_compared_with_every_seed():
    found = result(federated_shift=-0.1)
    difference = found["clients"]["north"]["differences"]["loss"]["base"]
    assert difference["mean"] == pytest.approx(1.0 - 0.005)  # seed 1 against seeds 1 and 2


def test_a_client_that_is_worse_off_is_named_even_when_the_loss_is_small():
    found = result(federated_shift=0.001)
    assert found["worse_off"] == {"federated": ["north", "south"]}
    assert found["clients"]["north"]["verdicts"]["loss"]["federated"] == "lost"
    found["result"] = "federated"
    assert worse_off_warnings(found) == ["With “federated”, worse off than alone: north, south."]


def test_few_rows_and_few_seeds_are_noted():
    found = result(federated_shift=-0.1, num_rows=19)
    assert found["clients"]["north"]["verdicts"]["loss"]["federated"] == "too few rows"
    assert found["overall"]["verdicts"]["loss"]["federated"] == "gained"  # 38 rows together
    few_seeds, few_rows = found["notes"]
    assert few_seeds.startswith("2 seeds: fewer than 5")
    assert few_rows.endswith("north, south")
    assert result(federated_shift=-0.1, seeds=(1, 2, 3, 4, 5))["notes"] == []


@pytest.mark.parametrize(
    ("interval", "num_rows", "says"),
    [
        (Interval(-0.2, -0.3, -0.1), 20, "gained"),
        (Interval(-0.2, -0.3, -0.1), 19, "too few rows"),
        (Interval(-0.2, -0.5, 0.1), 500, "no clear difference"),
        (Interval(0.2, 0.1, 0.3), 20, "lost"),
    ],
)
def test_a_verdict_needs_twenty_rows_and_an_interval_without_zero(interval, num_rows, says):
    assert verdict(interval, LOSS, num_rows=num_rows) == says


def test_higher_is_better_for_generated_answers():
    arms = scores(federated_shift=0.0)
    for arm, by_seed in arms.items():
        for by_client in by_seed.values():
            for own in by_client.values():
                for row in own:
                    good = {"federated": 0.5}.get(arm, 0.3)
                    row |= dict.fromkeys(("rougeL", "rouge1", "rouge2", "exact"), good)
    found = compare_arms(arms, num_train=NUM_TRAIN, seed=3)
    assert list(found["metrics"]) == ["loss", "rougeL", "rouge1", "rouge2", "exact"]
    assert found["overall"]["verdicts"]["rougeL"]["federated"] == "gained"
    assert found["overall"]["differences"]["rougeL"]["federated"]["mean"] == pytest.approx(0.2)


def test_an_arm_that_lacks_clients_is_left_out_where_they_are_needed():
    arms = scores(federated_shift=0.0)
    arms["only north"] = {s: {"north": r["north"]} for s, r in arms["local"].items()}
    found = compare_arms(arms, num_train=NUM_TRAIN, seed=3)
    assert "only north" in found["clients"]["north"]["scores"]["loss"]
    assert "only north" not in found["clients"]["south"]["scores"]["loss"]
    assert "only north" not in found["overall"]["scores"]["loss"]


def test_tables_have_one_line_per_client_and_one_overall():
    found = result(federated_shift=-0.1)
    table = score_table(found, "loss")
    assert [line[0] for line in table] == ["client", "north", "south", "mean over clients"]
    assert table[0][1:] == ("train rows", "held-out rows", "base", "federated")
    apart = difference_table(found, "loss")
    assert apart[0] == ("client", "federated - local", "verdict")
    assert apart[1] == ("north", "-0.100 [-0.100, -0.100]", "gained")
    assert cost_table(found)[2] == (
        "federated", "1,000", "10", "5", "1 min 01 s", "1.0 MB", "2.0 MB",
    )  # fmt: skip


def test_the_recipes_own_arm_is_compared_with_every_other_federated_one():
    arms = scores(federated_shift=-0.1)
    arms["federated: other"] = scores(federated_shift=-0.3)["federated"]
    found = compare_arms(arms, num_train=NUM_TRAIN, seed=3)
    assert found["overall"]["against"]["loss"]["federated: other"]["mean"] == pytest.approx(0.2)
    found["arms"] = {arm: {} for arm in arms}
    header, north, *_ = against_table(found, "loss")
    assert header == ("client", "minus other")
    assert north == ("north", "+0.200 [+0.200, +0.200]")
    assert against_table(result(federated_shift=-0.1), "loss") == []
