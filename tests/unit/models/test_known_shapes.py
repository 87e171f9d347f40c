"""Shapes without a config.json: those of the tests, and one for every model that is shipped."""

import pytest

import silotune
from silotune.models.known_shapes import KNOWN_SHAPES
from silotune.models.sources import SOURCES
from silotune.recipes.parse import load_recipe
from tests.published import SIZES, published_config

PUBLISHED = {
    "openlm-research/open_llama_3b_v2": "open_llama_3b",
    "openlm-research/open_llama_7b_v2": "open_llama_7b",
    "mistralai/Mistral-7B-v0.3": "mistral_7b",
    "ContactDoctor/Bio-Medical-Llama-3-8B": "llama_3_8b",
    "smollm2-135m-instruct": "smollm2_135m",
}
FIELDS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def test_every_model_of_a_shipped_recipe_and_every_named_source_is_known():
    used = {load_recipe(name).model.name for name in silotune.shipped_recipes()}
    assert used | set(SOURCES) <= set(KNOWN_SHAPES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_known_shape_has_the_published_sizes(name):
    found, expected = KNOWN_SHAPES[name].config(), published_config(PUBLISHED[name])
    assert found.model_type == SIZES[PUBLISHED[name]][0]
    assert [getattr(found, key) for key in FIELDS] == [getattr(expected, key) for key in FIELDS]


@pytest.mark.parametrize("name", KNOWN_SHAPES)
def test_every_size_is_a_field_of_the_family(name):
    """A misspelt field would be kept by transformers without any effect."""
    known = KNOWN_SHAPES[name]
    plain = type(known.config())()
    assert known.source
    assert [key for key in known.sizes if not hasattr(plain, key)] == []


def test_an_error_about_sentencepiece_names_the_extra(monkeypatch):
    """transformers 5.23 asks for tiktoken, whatever was missing."""
    from silotune.models.base import ModelConfig, needs_sentencepiece

    cfg = ModelConfig(name="openlm-research/open_llama_3b_v2")
    asked = ValueError("`tiktoken` is required to read a `tiktoken` file.")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = needs_sentencepiece(cfg, asked)
    assert error is not None
    assert "`make env EXTRAS=sentencepiece`" in str(error)
    assert needs_sentencepiece(cfg, OSError("no such file")) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert needs_sentencepiece(cfg, asked) is None
