"""The shapes of published models: what a plan needs of their config.json, without the hub.

Only sizes, from the published configurations; everything else is the family's default. This file
does not know weights, tokenizers or adapters. To add a model, add a line.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KnownShape:
    """The fields of a config.json that decide which tensors a model has."""

    family: str
    """transformers' `model_type`."""
    sizes: dict[str, int | bool]
    source: str
    """Where the numbers are from."""

    def config(self, **more: Any) -> Any:
        """A transformers configuration with these sizes; `more` are other fields of it."""
        from transformers import AutoConfig

        return AutoConfig.for_model(self.family, **self.sizes, **more)


def _decoder(
    family: str,
    *,
    layers: int,
    width: int,
    inner: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    tied: bool = False,
    source: str = "the model's published config.json",
) -> KnownShape:
    sizes: dict[str, int | bool] = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }
    return KnownShape(family, sizes, source)


_SMOLLM2 = _decoder(
    "llama",
    layers=30,
    width=576,
    inner=1536,
    heads=9,
    kv_heads=3,
    vocabulary=49_152,
    tied=True,
)

KNOWN_SHAPES: dict[str, KnownShape] = {
    "smollm2-135m-instruct": _SMOLLM2,
    "HuggingFaceTB/SmolLM2-135M": _SMOLLM2,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2,
    "openlm-research/open_llama_3b_v2": _decoder(
        "llama", layers=26, width=3200, inner=8640, heads=32, kv_heads=32, vocabulary=32_000
    ),
    "openlm-research/open_llama_7b_v2": _decoder(
        "llama", layers=32, width=4096, inner=11_008, heads=32, kv_heads=32, vocabulary=32_000
    ),
    "mistralai/Mistral-7B-v0.3": _decoder(
        "mistral", layers=32, width=4096, inner=14_336, heads=32, kv_heads=8, vocabulary=32_768
    ),
    "ContactDoctor/Bio-Medical-Llama-3-8B": _decoder(
        "llama",
        layers=32,
        width=4096,
        inner=14_336,
        heads=32,
        kv_heads=8,
        vocabulary=128_256,
        source="the published config.json of Llama 3 8B, of which it is a fine-tuned version",
    ),
    "distilbert/distilbert-base-uncased": KnownShape(
        "distilbert",
        {"n_layers": 6, "dim": 768, "hidden_dim": 3072, "n_heads": 12, "vocab_size": 30_522},
        "the model's published config.json",
    ),
    "minilm-l6": KnownShape(
        "bert",
        {
            "num_hidden_layers": 6,
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_attention_heads": 12,
            "vocab_size": 30_522,
        },
        "the model's published config.json",
    ),
}
"""By `model.name`: the models of the shipped recipes, and the named sources."""
