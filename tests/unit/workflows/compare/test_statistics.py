"""The statistics of scored rows: means, pairs, verdicts, words."""

import numpy as np
import pytest

from silotune.workflows.compare.statistics import (
    LOSS,
    against_table,
    compare_arms,
    cost_table,
    difference_table,
    score_table,
    verdict,
)
from silotune.workflows.compare.verdicts import comparison_verdict, worse_off_warnings


def rows(losses, tokens=4):
    return [{"loss_sum": loss * tokens, "num_tokens": tokens} for loss in losses]


def scores(federated_shift: float, num_rows: int = 24, seeds=(1, 2, 3)):
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
    found = compare_arms(scores(**changes), num_train=NUM_TRAIN)
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
    assert difference["mean"] == pytest.approx(1.0 - 0.01)  # seed 1 against seeds 1, 2 and 3


def test_a_client_that_is_worse_off_is_named_even_when_the_loss_is_small():
    found = result(federated_shift=0.001)
    assert found["worse_off"] == {"federated": ["north", "south"]}
    assert found["clients"]["north"]["verdicts"]["loss"]["federated"] == "lost"
    found["result"] = "federated"
    assert worse_off_warnings(found) == [
        "With “federated”, a higher mean loss than alone: north, south (clearly: north, south)."
    ]
    for client in found["clients"].values():
        client["verdicts"]["loss"]["federated"] = "one seed: no verdict"
    assert worse_off_warnings(found) == [
        "With “federated”, a higher mean loss than alone: north, south (none of them clearly)."
    ]


def test_few_rows_are_noted():
    found = result(federated_shift=-0.1, num_rows=19)
    assert found["clients"]["north"]["verdicts"]["loss"]["federated"] == "too few rows"
    assert found["overall"]["verdicts"]["loss"]["federated"] == "gained"  # 38 rows together
    assert found["notes"] == ["fewer than 20 held-out rows, so no verdict: north, south"]


@pytest.mark.parametrize(("seeds", "says"), [((1,), "one seed"), ((1, 2), "two seeds")])
def test_below_three_seeds_there_is_no_verdict_however_clear_it_looks(seeds, says):
    found = result(federated_shift=-0.1, seeds=seeds)
    for part in (*found["clients"].values(), found["overall"]):
        assert part["verdicts"]["loss"]["federated"] == f"{says}: no verdict"
    assert found["notes"][0].startswith(f"{says}: no verdict, because fewer than 3")
    assert difference_table(found, "loss")[1][2] == f"{says}: no verdict"
    found["result"] = "federated"
    sentence = comparison_verdict(found)[0]
    assert "gained" not in sentence
    assert f"has no verdict from {says}" in sentence


@pytest.mark.parametrize(
    ("mean", "p_value", "says"),
    [
        (-0.2, 0.01, "gained"),
        (-0.2, None, "too few rows"),
        (-0.2, 0.05, "no clear difference"),
        (0.2, 0.01, "lost"),
    ],
)
def test_a_verdict_needs_rows_and_a_corrected_p_value_below_a_twentieth(mean, p_value, says):
    assert verdict({"mean": mean, "corrected_p_value": p_value}, LOSS, num_seeds=3) == says


def test_verdicts_are_corrected_for_the_number_of_clients():
    """Five clients whose own intervals exclude 0, but together they are too weak."""
    rng = np.random.default_rng(0)
    spread = rng.normal(size=24)
    spread -= spread.mean()
    shift = 2.2 * spread.std() / 24**0.5  # alone, p is about 0.04

    def arm(shift):
        own = {f"client {i}": rows(2 + shift + x for x in spread * (shift != 0)) for i in range(5)}
        return dict.fromkeys((1, 2, 3), own)

    found = compare_arms(
        {"local": arm(0.0), "federated": arm(shift)}, num_train=dict.fromkeys(arm(0.0)[1], 9)
    )
    for client in found["clients"].values():
        difference = client["differences"]["loss"]["federated"]
        assert difference["low"] > 0
        assert difference["corrected_p_value"] == pytest.approx(5 * difference["p_value"])
        assert client["verdicts"]["loss"]["federated"] == "no clear difference"
    assert found["overall"]["verdicts"]["loss"]["federated"] == "lost"


def test_rows_of_a_group_count_as_one_and_widen_the_interval():
    arms = scores(federated_shift=0.0)
    for by_client in arms["federated"].values():  # every third row gains, in groups of eight
        for own in by_client.values():
            for i, row in enumerate(own):
                row["loss_sum"] -= 0.8 * (i // 8)
    alone = compare_arms(arms, num_train=NUM_TRAIN)
    for by_seed in arms.values():
        for by_client in by_seed.values():
            for own in by_client.values():
                for i, row in enumerate(own):
                    row["group"] = f"disease {i // 8}"
    found = compare_arms(arms, num_train=NUM_TRAIN)
    assert found["clients"]["north"]["num_groups"] == 3
    widths = [r["clients"]["north"]["differences"]["loss"]["federated"] for r in (alone, found)]
    apart, together = (w["high"] - w["low"] for w in widths)
    assert together > 3 * apart


def test_higher_is_better_for_generated_answers():
    arms = scores(federated_shift=0.0)
    for arm, by_seed in arms.items():
        for by_client in by_seed.values():
            for own in by_client.values():
                for row in own:
                    good = {"federated": 0.5}.get(arm, 0.3)
                    row |= dict.fromkeys(("rougeL", "rouge1", "rouge2", "exact"), good)
    found = compare_arms(arms, num_train=NUM_TRAIN)
    assert list(found["metrics"]) == ["loss", "rougeL", "rouge1", "rouge2", "exact"]
    assert found["overall"]["verdicts"]["rougeL"]["federated"] == "gained"
    assert found["overall"]["differences"]["rougeL"]["federated"]["mean"] == pytest.approx(0.2)


def test_an_arm_that_lacks_clients_is_left_out_where_they_are_needed():
    arms = scores(federated_shift=0.0)
    arms["only north"] = {s: {"north": r["north"]} for s, r in arms["local"].items()}
    found = compare_arms(arms, num_train=NUM_TRAIN)
    assert "only north" in found["clients"]["north"]["scores"]["loss"]
    assert "only north" not in found["clients"]["south"]["scores"]["loss"]
    assert "only north" not in found["overall"]["scores"]["loss"]


def test_tables_have_one_line_per_client_and_one_overall():
    found = result(federated_shift=-0.1)
    table = score_table(found, "loss")
    assert [line[0] for line in table] == ["client", "north", "south", "mean over clients"]
    assert table[0][1:] == ("train rows", "held-out rows", "base", "federated")
    apart = difference_table(found, "loss")
    assert apart[0] == ("client", "federated - local", "verdict", "local with")
    assert apart[1] == ("north", "-0.100 [-0.100, -0.100]", "gained", "not tuned")
    assert cost_table(found)[2] == (
        "federated", "1,000", "10", "5", "1 min 01 s", "1.0 MB", "2.0 MB",
    )  # fmt: skip


def test_the_recipes_own_arm_is_compared_with_every_other_federated_one():
    arms = scores(federated_shift=-0.1)
    arms["federated: other"] = scores(federated_shift=-0.3)["federated"]
    found = compare_arms(arms, num_train=NUM_TRAIN)
    assert found["overall"]["against"]["loss"]["federated: other"]["mean"] == pytest.approx(0.2)
    found["arms"] = {arm: {} for arm in arms}
    header, north, *_ = against_table(found, "loss")
    assert header == ("client", "minus other")
    assert north == ("north", "+0.200 [+0.200, +0.200]")
    assert against_table(result(federated_shift=-0.1), "loss") == []
