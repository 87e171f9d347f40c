"""The guarantee of opened sums: the numbers of the design, and every reason for having none."""

import math

import pytest

from silotune.federation.client_privacy import plan_of_client
from silotune.federation.privacy_of_sums import guarantee_of_sums
from silotune.privacy.accountant import spent
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
