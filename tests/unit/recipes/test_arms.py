"""Federated arms of a comparison: names, order, and what an arm may change."""

import contextlib
import tomllib

import pytest

from silotune.core.errors import ConfigError
from silotune.recipes.arms import FREE, OWN, SHARED, federated_arms, repeated_arms
from silotune.recipes.mistakes import sections
from silotune.recipes.parse import load_recipe, parse, to_toml
from silotune.recipes.schema import RunConfig

RECIPE = {
    "seed": 3,
    "rounds": 4,
    "data": {"path": "rows.jsonl"},
    "train": {"lr": 1e-3, "local_steps": 5, "max_length": 64},
    "server": {"data_fraction": 0.2, "work": "fine-tune", "epochs": 2},
    "algorithm": {"name": "fedprox", "mu": 0.5, "weights": "uniform"},
}


def recipe(algorithms=(), arms=None, **changes) -> RunConfig:
    compare = {"algorithms": list(algorithms), "arms": arms or {}}
    return parse({**RECIPE, **changes, "compare": compare})


def error_of(**arms):
    with pytest.raises(ConfigError) as caught:
        federated_arms(recipe(arms=arms))
    text = str(caught.value)
    assert "\n  " in text, "the fix is missing"
    return text


def differences(one: RunConfig, other: RunConfig) -> dict[str, tuple]:
    """Dotted keys that differ, with both values."""
    found = {}
    for section, of_one in one.model_dump(mode="json", serialize_as_any=True).items():
        of_other = other.model_dump(mode="json", serialize_as_any=True)[section]
        if not isinstance(of_one, dict) or not isinstance(of_other, dict):
            of_one, of_other = {"": of_one}, {"": of_other}
        for key in {**of_one, **of_other}:
            if of_one.get(key) != of_other.get(key):
                found[f"{section}.{key}".rstrip(".")] = (of_one.get(key), of_other.get(key))
    return found


# --- names and order ---


def test_a_recipe_without_more_arms_is_one_arm_and_compares_nothing_itself():
    run = recipe(arms={"slow": {"train": {"lr": 1e-4}}})
    own = federated_arms(run)[OWN]
    assert list(federated_arms(recipe())) == ["federated"]
    assert own.compare.arms == {}
    assert own == federated_arms(recipe())[OWN]


def test_the_recipes_own_arm_comes_first_then_algorithms_then_arms_as_they_were_given():
    run = recipe(
        algorithms=["fedyogi", "fedavg"],
        arms={"slow": {"train": {"lr": 1e-4}}, "all weights": {"adapter": {"kind": "full"}}},
    )
    assert list(federated_arms(run)) == [
        "federated",
        "federated: fedyogi",
        "federated: fedavg",
        "federated: slow",
        "federated: all weights",
    ]


def test_one_algorithm_with_several_settings_gets_counted_names():
    strengths = [{"name": "fedprox", "mu": mu} for mu in (0.1, 0.2, 0.3)]
    arms = federated_arms(recipe(algorithms=strengths))
    assert {name: arm.algorithm.mu for name, arm in arms.items()} == {
        "federated": 0.5,
        "federated: fedprox": 0.1,
        "federated: fedprox 2": 0.2,
        "federated: fedprox 3": 0.3,
    }


def test_an_arm_called_like_an_algorithm_is_refused_or_takes_no_arm_away():
    run = recipe(algorithms=["fedavg"], arms={"fedavg": {"train": {"lr": 1e-4}}})
    arms: dict[str, RunConfig] = {}
    with contextlib.suppress(ConfigError):
        arms = federated_arms(run)
    assert len(arms) in (0, 3), "the arm of compare.algorithms is gone"


def test_an_arm_that_an_override_makes_equal_to_the_recipe_is_a_mistake_only_of_a_comparison():
    """`silotune run glue-cola server.work=fine-tune` was refused because of [compare]."""
    run = load_recipe("glue-cola", ["server.work=fine-tune"])
    name = "compare.arms.FedLoRA and the server's labels"
    assert repeated_arms(run) == [
        f"{name} is the same as 'federated': silotune compare refuses this recipe"
    ]
    with pytest.raises(ConfigError, match=f"{name}: is the same as 'federated'"):
        federated_arms(run)
    assert repeated_arms(load_recipe("glue-cola")) == []


def test_an_algorithm_of_a_comparison_may_become_the_recipes_own_in_a_run():
    run = recipe(algorithms=["fedavg", RECIPE["algorithm"]])
    assert [text[:42] for text in repeated_arms(run)] == [
        "compare.algorithms.1 is the same as 'feder"
    ]
    with pytest.raises(ConfigError, match="Rename, change or remove"):
        federated_arms(run)


# --- what changes ---


def test_a_change_applies_to_that_arm_alone_and_all_else_is_the_recipes():
    run = recipe(
        algorithms=["fedavg"],
        arms={
            "slow": {"train": {"lr": 1e-4}, "adapter": {"rank": 2}},
            "no server": {"server": {"work": "none"}},
        },
    )
    before = to_toml(run)
    own, avg, slow, alone = federated_arms(run).values()
    assert differences(own, slow) == {"train.lr": (1e-3, 1e-4), "adapter.rank": (8, 2)}
    assert differences(own, alone) == {"server.work": ("fine-tune", "none")}
    assert differences(own, avg).keys() <= {
        "algorithm.name",
        "algorithm.mu",
        "algorithm.weights",
    }
    assert to_toml(run) == before, "the recipe itself is untouched"


@pytest.mark.parametrize("section", FREE)
def test_every_free_section_can_be_changed(section):
    change = {
        "adapter": {"head": "train", "dropout": 0.1},
        "train": {"batch_size": 3},
        "algorithm": {"mu": 0.125},
        "server": {"weight": 0.5},
        "distill": {"temperature": 3.0},
        "wire": {"up": "int8"},
    }[section]
    own, arm = federated_arms(recipe(arms={"other": {section: change}})).values()
    changed = {f"{section}.{key}": value for key, value in change.items()}
    assert {key: new for key, (_, new) in differences(own, arm).items()} == {
        key: value for key, value in changed.items() if key != "adapter.head"
    }


def test_an_arm_is_a_complete_recipe_that_can_be_saved_and_read_again():
    run = recipe(arms={"slow": {"train": {"lr": 1e-4}}})
    for arm in federated_arms(run).values():
        assert parse(tomllib.loads(to_toml(arm))) == arm


def test_another_algorithm_starts_from_its_own_defaults():
    arm = {"algorithm": {"name": "fedavg"}}
    found = federated_arms(recipe(arms={"plain": arm}))["federated: plain"].algorithm
    assert (found.name, found.weights) == ("fedavg", "examples"), "not the recipe's uniform"
    given = {"algorithm": {"name": "fedavg", "weights": "uniform"}}
    found = federated_arms(recipe(arms={"plain": given}))["federated: plain"].algorithm
    assert (found.name, found.weights) == ("fedavg", "uniform")


@pytest.mark.parametrize("change", [{"mu": 0.1}, {"name": "fedprox", "mu": 0.1}])
def test_the_same_algorithm_keeps_the_recipes_other_settings(change):
    own, weak = federated_arms(recipe(arms={"weak": {"algorithm": change}})).values()
    assert differences(own, weak) == {"algorithm.mu": (0.5, 0.1)}
    assert weak.algorithm.weights == "uniform"


def test_an_algorithm_that_the_recipe_does_not_name_can_be_changed_too():
    table = {key: value for key, value in RECIPE.items() if key != "algorithm"}
    arms = {"prox": {"algorithm": {"name": "fedprox", "mu": 2.0}}}
    found = federated_arms(parse({**table, "compare": {"arms": arms}}))
    assert found["federated"].algorithm.name == "fedavg"
    assert found["federated: prox"].algorithm.mu == 2.0


# --- refusals ---


@pytest.mark.parametrize(
    "section", sorted({*sections(), "seed", "rounds", "task", "trian"} - set(FREE))
)
def test_a_section_that_all_arms_share_is_refused_with_those_that_may_change(section):
    value = {"x": 1} if section in sections() else 7
    assert error_of(other={section: value}) == (
        f"compare.arms.other: '{section}' is not a section that an arm may change.\n"
        "  An arm may change adapter, train, algorithm, server, distill, wire."
    )


@pytest.mark.parametrize("section", FREE)
def test_a_value_where_a_section_should_be_is_refused(section):
    assert error_of(other={section: 3}).startswith(f"compare.arms.other: '{section}'")


@pytest.mark.parametrize(
    ("section", "key"), [(section, key) for section, keys in SHARED.items() for key in keys]
)
def test_a_key_that_decides_on_rows_is_refused_even_with_the_recipes_own_value(section, key):
    value = RECIPE[section].get(key, "own.jsonl")
    assert error_of(other={"train": {"lr": 1e-4}, section: {key: value}}) == (
        f"compare.arms.other: {section}.{key} determines the rows, which all arms share.\n"
        "  Set it in the recipe itself, or compare two recipes."
    )


def test_every_shared_key_is_one_that_a_recipe_knows():
    for section, keys in SHARED.items():
        assert section in FREE
        assert set(keys) <= set(sections()[section].model_fields)


@pytest.mark.parametrize(
    ("change", "mistakes"),
    [
        ({"train": {"lrr": 1}}, ["train.lrr: unknown key. Did you mean train.lr?"]),
        ({"train": {"lr": -1}}, ["train.lr: should be greater than 0"]),
        ({"adapter": {"rank": 0}, "train": {"lr": 0}}, ["adapter.rank: ", "train.lr: "]),
        ({"algorithm": {"name": "fedporx"}}, ["no algorithm 'fedporx'. Did you mean 'fedprox'?"]),
        ({"algorithm": {"name": "fedavg", "mu": 1.0}}, ["algorithm.mu: is a key of fedprox"]),
        ({"server": {"work": "distill"}}, ["distill.teacher: is missing"]),
        ({"train": {"local_epochs": 1}}, ["give local_steps or local_epochs, not both"]),
    ],
)
def test_mistakes_of_an_arm_name_the_arm(change, mistakes):
    text = error_of(good={"train": {"lr": 1e-4}}, **{"the other": change})
    first = text.split("\n")[0]
    count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    assert first == f"{count} in recipe 'compare.arms.the other':"
    assert "good" not in text
    for mistake in mistakes:
        assert mistake in text
