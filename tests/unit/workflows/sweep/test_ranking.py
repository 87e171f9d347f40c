"""A sweep's runs as a ranking: seeds are repetitions of a setting, not settings to choose from."""

import random

import pytest
from scipy.stats import t as student

from silotune.core.stats import mean_interval
from silotune.workflows.sweep.ranking import ranked, settings_of, sweep_table, verdict


def row(number: int, loss: float | None, **keys: str) -> dict:
    made = {"number": number, "path": f"runs/{number:03d}", "keys": keys, "failed": None}
    if loss is None:
        return made | {"failed": "training diverged"}
    scored = {"task": "instruct", "base_loss": 3.0, "loss": loss, "scores": None, "num_scored": 9}
    return made | scored | {"bytes": 1000, "seconds": 2.0}


SEEDS = [
    row(1, 2.0, lr="high", seed="1"),
    row(2, 2.2, lr="low", seed="1"),
    row(3, 2.6, lr="high", seed="2"),
    row(4, 2.3, lr="low", seed="2"),
]


def test_a_lucky_seed_does_not_win_a_sweep():
    """The best of all runs was first, whatever the other seeds of its setting did."""
    result = ranked(SEEDS)
    assert [own["keys"] for own in result["settings"]] == [{"lr": "low"}, {"lr": "high"}]
    assert [own["loss"] for own in result["settings"]] == pytest.approx([2.25, 2.3])
    assert [own["number"] for own in result["runs"]] == [2, 4, 1, 3], "its best run first"
    header, *lines = sweep_table(result)
    assert header[:4] == ("setting", "lr", "seeds", "base")
    assert [line[:5] for line in lines] == [
        ("1", "low", "2", "3.000", "2.250"),
        ("2", "high", "2", "3.000", "2.300"),
    ]
    assert verdict(result).startswith(
        "Lowest mean held-out loss: 2.250 nats per token (2 seeds, 95"
    )
    assert verdict(result).endswith("with lr=low; the other setting ended at 2.300.")
    assert "seed=" not in verdict(result)


def test_the_order_of_runs_changes_nothing():
    shuffled = random.Random(3).sample(SEEDS, len(SEEDS))
    assert ranked(shuffled)["settings"] == [
        {**own, "runs": [n for n in (r["number"] for r in shuffled) if n in own["runs"]]}
        for own in ranked(SEEDS)["settings"]
    ]
    assert [own["number"] for own in ranked(shuffled)["runs"]] == [2, 4, 1, 3]


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.5, -3.0, 4.0], [2.0] * 4, [1e-9, 1e9, 5.0]])
def test_the_interval_is_students_t(values):
    mean, low, high = mean_interval(values)
    error = (sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values)) ** 0.5
    half = student.ppf(0.975, len(values) - 1) * error
    assert mean == pytest.approx(sum(values) / len(values))
    assert (low, high) == pytest.approx((mean - half, mean + half))


def test_one_seed_has_no_interval_and_a_sweep_without_seeds_ranks_its_runs():
    assert mean_interval([2.5]) == (2.5, None, None)
    result = ranked([row(1, 2.5, lr="high"), row(2, 2.0, lr="low")])
    assert [line[0] for line in sweep_table(result)] == ["run", "002", "001"]
    assert verdict(result).startswith("Lowest held-out loss: 2.000")


def test_failed_seeds_are_counted_and_do_not_enter_a_mean():
    result = ranked([*SEEDS, row(5, None, lr="high", seed="3")])
    assert settings_of(result["runs"]) == ranked(SEEDS)["settings"]
    assert sweep_table(result)[-1][0] == "1 failed"
    assert result["runs"][-1]["number"] == 5
    fewer = ranked([*SEEDS[:3], row(4, None, lr="low", seed="2")])
    assert "some settings have fewer seeds than others" in fewer["notes"]
    assert sweep_table(fewer)[1][:6] == ("1", "low", "1", "3.000", "2.200", "-")


def test_only_seeds_may_vary():
    result = ranked([row(1, 2.0, seed="1"), row(2, 2.2, seed="2")])
    assert "with the recipe's keys." in verdict(result)
