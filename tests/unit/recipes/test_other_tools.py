"""Keys as other tools call them are guessed, and what differs in meaning is said."""

import pytest

from silotune.core.errors import ConfigError
from silotune.recipes.algorithm import ALGORITHM_CONFIGS
from silotune.recipes.mistakes import known_keys
from silotune.recipes.other_tools import OTHER_TOOLS, SECTIONS
from silotune.recipes.parse import parse

KEYS = {key for name in ALGORITHM_CONFIGS for key in known_keys(name)}


def mistake(**table) -> str:
    with pytest.raises(ConfigError) as caught:
        parse({"rounds": 1, "data": {"path": "medquad_mini"}, **table})
    (said,) = str(caught.value).split("\n  ")[1:]
    return said


@pytest.mark.parametrize("name", OTHER_TOOLS)
def test_another_tools_name_leads_to_a_key_that_exists_wherever_it_is_typed(name):
    known = OTHER_TOOLS[name]
    assert known.key in KEYS
    for section in ({"train": {name: 1}}, {name: 1}):
        said = mistake(**section)
        assert f"Did you mean {known.key}" in said
        assert known.remark in said


def test_a_name_that_a_recipe_knows_too_is_not_taken_for_another_tools():
    """`epochs` and `data_path` are keys of [server]; elsewhere they are what other tools mean."""
    lasts = {key.rpartition(".")[2] for key in KEYS}
    assert lasts & OTHER_TOOLS.keys() == {"data_path", "epochs"}
    assert not KEYS & OTHER_TOOLS.keys()
    assert parse({"rounds": 1, "data": {"path": "x"}, "server": {"epochs": 2}}).server.epochs == 2


@pytest.mark.parametrize(
    ("section", "key", "says"),
    [
        ("train", "learning_rate", "train.learning_rate: unknown key. Did you mean train.lr?"),
        ("train", "batch-size", "train.batch-size: unknown key. Did you mean train.batch_size?"),
        ("train", "Learning-Rate", "Did you mean train.lr?"),
        ("train", "num_epochs", "Did you mean train.local_epochs (passes over a client's rows in "),
        ("train", "epochs", "Did you mean train.local_epochs (passes"),
        ("train", "max_steps", "Did you mean train.local_steps (optimizer steps of a client in "),
        ("adapter", "r", "adapter.r: unknown key. Did you mean adapter.rank?"),
        ("model", "model_name_or_path", "Did you mean model.name?"),
        ("algorithm", "proximal_mu", 'algorithm.mu (a key of algorithm.name = "fedprox")?'),
    ],
)
def test_what_was_meant_is_said(section, key, says):
    assert says in mistake(**{section: {key: 1}})


def test_another_tools_table_leads_to_its_section_and_explains_its_keys():
    assert set(SECTIONS.values()) <= KEYS
    assert mistake(lora={"r": 8, "lora_alpha": 16, "bias": "none"}) == (
        "lora: unknown key. Did you mean adapter? In it, r is adapter.rank, lora_alpha is "
        "adapter.alpha."
    )
    assert mistake(tran={"lr": 1}) == "tran: unknown key. Did you mean train?"
