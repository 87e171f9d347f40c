"""`algorithm.name = "auto"`: a rule about facts, resolved before anything is trained."""

import tomllib

import pytest

from silotune.algorithms import ALGORITHMS
from silotune.core.errors import ConfigError
from silotune.recipes.algorithm import AutoConfig, build_algorithm
from silotune.recipes.arms import federated_arms
from silotune.recipes.auto import choose, is_exact_sum, resolve_auto, why_chosen
from silotune.recipes.contradictions import contradictions
from silotune.recipes.parse import parse, to_toml, with_overrides

CLIENT = {"unit": "client", "noise_multiplier": 1.0, "delta": 0.1}
RECORD = {"unit": "record", "noise_multiplier": 1.0, "delta": 0.1}
UNIFORM = {"name": "auto", "weights": "uniform"}


def recipe(**sections):
    return parse({"rounds": 2, "data": {"path": "x"}, "algorithm": {"name": "auto"}, **sections})


@pytest.mark.parametrize(
    ("sections", "name", "why"),
    [
        ({}, "fedavg", "aggregation_error says after every round"),
        ({"adapter": {"dora": True}}, "fedavg", "DoRA has no two factors"),
        ({"adapter": {"kind": "ia3"}}, "fedavg", "adapter.kind = 'ia3' has no two factors"),
        ({"privacy": CLIENT, "algorithm": UNIFORM}, "ffa_lora", "[privacy] adds noise"),
        ({"privacy": {**CLIENT, "noise_at": "client"}}, "ffa_lora", "a sum suffices"),
        ({"privacy": RECORD}, "ffa_lora", "the mean is exact"),
        (
            {"privacy": CLIENT, "algorithm": UNIFORM, "adapter": {"kind": "ia3"}},
            "fedavg",
            "no two factors",
        ),
    ],
    ids=str,
)
def test_what_is_chosen_and_why(sections, name, why):
    run = recipe(**sections)
    chosen, said = choose(run)
    assert chosen == name
    assert why in said
    assert why_chosen(run) == f"algorithm.name = 'auto' is {name}: {said}"
    done = resolve_auto(run)
    assert done.algorithm.name == name
    assert done.algorithm.weights == run.algorithm.weights
    assert not list(contradictions(done)), "what is chosen fits the recipe"
    assert parse(tomllib.loads(to_toml(done))) == done
    assert build_algorithm(done.algorithm).name == name


def test_a_recipe_that_names_its_algorithm_is_left_alone():
    run = recipe(algorithm={"name": "fedprox"})
    assert resolve_auto(run) is run
    assert why_chosen(run) == ""


def test_the_choice_under_noise_is_linear_exact_and_without_memory():
    fit = [name for name, (cfg, _) in ALGORITHMS.items() if is_exact_sum(cfg.facts)]
    assert fit[0] == "ffa_lora"
    for name in fit:
        facts = ALGORITHMS[name][0].facts
        assert facts.linear
        assert facts.exact == "yes"
        assert not any((facts.remembers, facts.sends_more, facts.keeps))
    assert {"fedavg", "flexlora", "median", "scaffold", "fedsa_lora"}.isdisjoint(fit)


def test_an_arm_may_be_auto_and_is_resolved_in_its_own_recipe():
    run = recipe(
        algorithm={"name": "fedprox"},
        compare={
            "algorithms": ["auto"],
            "arms": {"ia3": {"adapter": {"kind": "ia3"}, "algorithm": {"name": "auto"}}},
        },
    )
    arms = federated_arms(run)
    assert {name: arm.algorithm.name for name, arm in arms.items()} == {
        "federated": "fedprox",
        "federated: auto": "fedavg",
        "federated: ia3": "fedavg",
    }


def test_nothing_trains_with_auto_itself():
    with pytest.raises(ConfigError, match="Name the algorithm that `silotune check` chooses"):
        build_algorithm(AutoConfig())


def test_an_override_may_ask_for_it():
    run = with_overrides(recipe(algorithm={"name": "fedprox", "mu": 0.5}), ["algorithm.name=auto"])
    assert isinstance(run.algorithm, AutoConfig)
    with pytest.raises(ConfigError, match="server_lr"):
        recipe(algorithm={"name": "auto", "server_lr": 0.5})
