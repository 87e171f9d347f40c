"""The guarantee of opened sums: the numbers of the design, and every reason for having none."""

import math

import numpy as np
import pytest

from silotune.federation.client_privacy import plan_of_client
from silotune.federation.privacy_of_sums import COARSE, guarantee_of_sums
from silotune.privacy.accountant import spent, spent_in_all
from silotune.recipes.parse import parse

RECIPE = {
    "rounds": 64,
    "data": {"path": "rows.jsonl"},
    "model": {"name": "tiny"},
    "sampling": {"quorum": 1.0},
    "train": {"batch_size": 8, "local_steps": 1, "optimizer": "sgd", "lr": 5.0},
    "algorithm": {"weights": "uniform"},
    "privacy": {"unit": "record", "target_epsilon": 8, "delta": 1e-3, "clip_norm": 0.3},
    "secure_sum": {"kind": "masks", "range": 64.0},
}


def found(num_clients=5, rows=117, **changes):
    recipe = {
        key: dict(value) if isinstance(value, dict) else value for key, value in RECIPE.items()
    }
    recipe["secure_sum"]["min_cohort"] = num_clients
    for section, own in changes.items():
        recipe[section] = {**recipe[section], **own} if isinstance(own, dict) else own
    run = parse(recipe)
    names = [f"client-{n}" for n in range(num_clients)]
    plans = {name: plan_of_client(run, rows, client=name) for name in names}
    return guarantee_of_sums(run, plans)


@pytest.mark.parametrize(("num", "epsilon"), [(5, 1.74), (9, 0.98), (20, 0.53)])
def test_the_noise_of_the_others_adds_up(num, epsilon):
    """117 rows a client, lots of 8, 64 rounds, delta 1e-3: the numbers of secure_sum.md.

    Made there with dp-accounting from the same formula by another program.
    """
    own = found(num)
    assert own["num_noisy"] == num - 1
    assert own["epsilon"].pld == pytest.approx(epsilon, abs=0.006)
    alone = plan_of_client(parse(RECIPE), 117, client="x")
    z = own["clients"]["client-0"]["noise_multiplier"]
    assert z == pytest.approx(alone.noise_multiplier * math.sqrt(num - 1))
    by_hand = spent(noise_multiplier=z, num_releases=64, delta=1e-3, sampling_rate=8 / 117)
    assert own["epsilon"].pld == by_hand.pld


def test_with_fewer_clients_needed_or_more_of_them_colluding_less_noise_counts():
    whole = found(9)["epsilon"].pld
    quorum = found(9, secure_sum={"min_cohort": 7})
    assert quorum["num_noisy"] == 6, "a server may say that there are seven, and one reads the sum"
    assert found(9, sampling={"quorum": 0.5})["num_noisy"] == 8, "the quorum is the server's word"
    colluding = found(9, secure_sum={"colluding": 4})
    assert colluding["num_noisy"] == 5
    assert whole < quorum["epsilon"].pld < colluding["epsilon"].pld


def test_clients_that_are_protected_as_a_whole_share_their_noise_too():
    client = {"unit": "client", "noise_at": "client", "clip_norm": 0.3}
    own = found(9, privacy=client, train={"optimizer": "adamw", "local_steps": 3})
    plan = plan_of_client(
        parse({**RECIPE, "privacy": {**RECIPE["privacy"], **client}}), 117, client="x"
    )
    z = own["clients"]["client-3"]["noise_multiplier"]
    assert z == pytest.approx(plan.noise_multiplier * math.sqrt(8))
    assert own["epsilon"].pld == own["epsilon"].rdp, "no tighter bound is known for discrete noise"


def test_discrete_noise_needs_a_few_steps_of_the_ring_and_rounded_noise_many():
    """With 20 steps to a standard deviation, one of two recipes has a guarantee of its sums."""
    rows, whole = {}, {"unit": "client", "noise_at": "client"}
    for unit, told in ((rows, "too coarse"), (whole, None)):
        z = plan_of_client(
            parse({**RECIPE, "privacy": {**RECIPE["privacy"], **unit}}), 117, client="x"
        ).noise_multiplier
        std = z * 0.3 * (5 / 8 if not unit else 1)
        range_ = std / 20 * 2**27  # five clients leave 27 bits
        own = found(privacy=unit, secure_sum={"range": range_})
        assert (told or "") in own.get("why_not", "")
        assert ("why_not" in own) == (told is not None)


def test_a_target_is_met_by_the_bound_that_holds_for_discrete_noise():
    """It takes a little more noise than the tight bound for a continuous Gaussian."""
    whole = {**RECIPE["privacy"], "unit": "client", "noise_at": "client"}
    discrete = plan_of_client(parse({**RECIPE, "privacy": whole}), 117, client="x")
    rounded = plan_of_client(
        parse({**{k: v for k, v in RECIPE.items() if k != "secure_sum"}, "privacy": whole}),
        *(117,),
        client="x",
    )
    assert (discrete.discrete, rounded.discrete) == (True, False)
    assert 1 < discrete.noise_multiplier / rounded.noise_multiplier < 1.1
    assert spent_in_all([discrete.steps()], delta=1e-3).pld == pytest.approx(8, abs=1e-3)
    assert spent_in_all([rounded.steps(), discrete.steps()], delta=1e-3).pld > 8


@pytest.mark.parametrize("num", [1, 2, 5])
@pytest.mark.parametrize("order", [2, 5, 8])
@pytest.mark.parametrize("moved", [1, 7, 20])
def test_the_divergence_of_a_sum_of_discrete_noises_is_that_of_one_gaussian(num, order, moved):
    """Proposition 14 of Kairouz et al., by brute force at the coarsest noise that is allowed."""
    numbers = np.arange(-COARSE * 38, COARSE * 38 + 1)
    one = np.exp(-(numbers.astype(float) ** 2) / (2 * COARSE**2))
    chance = np.ones(1)
    for _ in range(num):
        chance = np.convolve(chance, one / one.sum())
    p, q = chance[moved:], chance[:-moved]  # the same integers, seen from both
    both = (p > 0) & (q > 0)
    p, q = p[both], q[both]
    found_ = np.log(np.sum(np.exp(order * np.log(p) + (1 - order) * np.log(q)))) / (order - 1)
    gaussian = order * moved**2 / (2 * num * COARSE**2)
    assert found_ == pytest.approx(gaussian, rel=1e-3)
    assert found_ <= gaussian * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"algorithm": {"weights": "examples"}}, "not 'uniform'"),
        ({"train": {"local_steps": 2}}, "several steps"),
        ({"train": {"optimizer": "adamw"}}, "not 'sgd'"),
        ({"secure_sum": {"colluding": 4}}, "1 client would be left"),
        ({"privacy": {"noise": "seeded"}}, "the noise is seeded"),
        ({"secure_sum": {"range": 0.5}}, "would cut some of the noise"),
        ({"secure_sum": {"range": 1e9}}, "too coarse"),
    ],
)
def test_where_it_is_not_one_gaussian_the_reason_is_given(changes, said):
    assert said in found(**changes)["why_not"]


def test_the_width_that_is_named_is_wide_enough():
    reason = found(secure_sum={"range": 0.5})["why_not"]
    width = float(reason.split("; ")[1].split(" ")[0])
    assert "epsilon" in found(secure_sum={"range": width * 1.01})


def test_the_width_covers_a_step_that_draws_every_row():
    """Lots are drawn by chance: all 117 rows may come, each with a clipped gradient of 0.3."""
    reason = found(secure_sum={"range": 0.5})["why_not"]
    width = float(reason.split("; ")[1].split(" ")[0])
    assert width > 5.0 * 0.3 * 117 / 8


def test_a_client_with_few_rows_has_less_protection_by_the_others():
    """Its lot is smaller, so one row moves its mean further than others' noise was made for."""
    run = parse(RECIPE)
    plans = {
        name: plan_of_client(run, rows, client=name)
        for name, rows in (("few", 4), ("a", 117), ("b", 117), ("c", 117), ("d", 117))
    }
    own = guarantee_of_sums(run, plans)["clients"]
    assert own["few"]["noise_multiplier"] < own["a"]["noise_multiplier"] / 1.9


def test_without_secure_sums_there_is_nothing_to_add():
    run = parse({key: value for key, value in RECIPE.items() if key != "secure_sum"})
    assert guarantee_of_sums(run, {}) is None
