"""Shapes of published models, for tests that need no weights."""

from typing import Any

SIZES = {
    # family, layers, width, of the feed-forward, heads, heads of keys and values, vocabulary
    "open_llama_3b": ("llama", 26, 3200, 8640, 32, 32, 32_000),
    "open_llama_7b": ("llama", 32, 4096, 11_008, 32, 32, 32_000),
    "mistral_7b": ("mistral", 32, 4096, 14_336, 32, 8, 32_768),
    "llama_3_8b": ("llama", 32, 4096, 14_336, 32, 8, 128_256),
    "smollm2_135m": ("llama", 30, 576, 1536, 9, 3, 49_152),
}
"""From the published configurations."""


def published_config(size: str) -> Any:
    """The configuration of a published model, by its name in `SIZES`."""
    from transformers import AutoConfig

    family, layers, width, inner, heads, kv_heads, vocabulary = SIZES[size]
    return AutoConfig.for_model(
        family,
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
    )
