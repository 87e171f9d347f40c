"""A recipe's PEFT options name no path and no model, in every method that PEFT has."""

import dataclasses
import math
from typing import get_type_hints

import pytest

from silotune.core.errors import ConfigError
from silotune.models.adapters import AdapterConfig, check_adapter
from silotune.models.devices import pick_device
from silotune.models.peft_options import OF_MODULES, check_option


def methods() -> dict[str, type]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


METHODS = methods()
PLACES = ["/etc", "owner/model", "./folder", "..", "~", "C:\\models", "https://host/m", "hub:x/y"]


def is_refused(kind, option, value) -> bool:
    try:
        check_option(kind, option, value)
    except ConfigError:
        return True
    return False


@pytest.mark.parametrize("method", sorted(METHODS))
def test_no_option_of_any_method_takes_a_path_or_a_model(method):
    """Regression: `shadow_model` read a local folder or a model of the hub at the client.

    Every field, whatever its type, and every form in which it could hold a text.
    """
    kind = METHODS[method]
    for field in dataclasses.fields(kind):
        for place in PLACES:
            for value in (place, [place], (place,), {place: 1}, {"q": place}, {"q": [place]}):
                assert is_refused(kind, field.name, value), (field.name, value)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_text_is_a_choice_or_the_name_of_a_module(method):
    """Even a text that looks harmless, such as gpt2, is a model of the hub or a folder."""
    kind = METHODS[method]
    for field in dataclasses.fields(kind):
        for value in ("gpt2", ["gpt2"], {"gpt2": 1}, {"q": "gpt2"}):
            if not is_refused(kind, field.name, value):
                assert field.name in OF_MODULES, field.name


def test_what_reads_files_in_peft_cannot_be_set():
    """The fields that are known to be paths, models or nested configurations with paths."""
    for method, option, value in (
        ("SHADOW", "shadow_model", "gpt2"),
        ("LORA", "corda_config", {"cache_file": "/x"}),
        ("LORA", "loftq_config", {}),
        ("LORA", "megatron_core", "os"),
        ("XLORA", "adapters", {"0": "gpt2"}),
        ("CPT", "tokenizer_name_or_path", "gpt2"),
        ("MULTITASK_PROMPT_TUNING", "prompt_tuning_init_state_dict_path", "x"),
        ("LORA", "base_model_name_or_path", "gpt2"),
        ("LORA", "revision", "main"),
    ):
        assert option in get_type_hints(METHODS[method])
        assert is_refused(METHODS[method], option, value), option


GOOD = [
    ("LORA", "rank_pattern", {"q_proj": 4, "layers.0.self_attn.v_proj": 8}),
    ("LORA", "alpha_pattern", {"q_proj": 4}),
    ("LORA", "init_lora_weights", "orthogonal"),
    ("LORA", "init_lora_weights", False),
    ("LORA", "layers_to_transform", [0, 1]),
    ("LORA", "layers_pattern", ["layers"]),
    ("LORA", "exclude_modules", ["lm_head"]),
    ("LORA", "bias", "none"),
    ("IA3", "feedforward_modules", ["down_proj"]),
    ("LOHA", "r", 4),
    ("LOHA", "rank_dropout", 0.1),
    ("HRA", "apply_GS", True),
    ("ROAD", "variant", "road_2"),
]


@pytest.mark.parametrize(("method", "option", "value"), GOOD)
def test_numbers_switches_choices_and_modules_are_accepted(method, option, value):
    check_option(METHODS[method], option, value)


@pytest.mark.parametrize(
    ("method", "option", "value", "text"),
    [
        ("LORA", "rank_pattern", {"q.*": 4}, "a table of numbers by the names of modules"),
        ("LORA", "rank_pattern", {"(a+)+$": 4}, "a table of numbers"),
        ("LORA", "init_lora_weights", "nonsense", "'orthogonal'"),
        ("LOHA", "r", True, "it takes an integer"),
        ("LOHA", "rank_dropout", math.inf, "it takes a number"),
        ("LORA", "exclude_modules", ["a/b"], "the name of a module"),
        ("LORA", "layers_to_transform", [0] * 10_001, "a list"),
        ("SHADOW", "shadow_model", "gpt2", "a recipe cannot set it"),
        ("ROAD", "variant", "road_9", "'road_1' or 'road_2' or 'road_4'"),
    ],
)
def test_another_value_is_refused_with_what_the_option_takes(method, option, value, text):
    with pytest.raises(ConfigError, match=rf"adapter\.peft\.{option}: ") as caught:
        check_option(METHODS[method], option, value)
    assert text in str(caught.value)
    assert "path or a model" in str(caught.value)


def test_a_recipe_is_refused_before_a_model_is_loaded():
    cfg = AdapterConfig(kind="peft", peft={"peft_type": "SHADOW", "shadow_model": "/srv/secret"})
    with pytest.raises(ConfigError, match=r"adapter\.peft\.shadow_model: a recipe cannot set it"):
        check_adapter(cfg, "none", pick_device("cpu"))
