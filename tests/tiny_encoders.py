"""Tiny random encoders in Hugging Face format: 2 layers, width 16, bytes as tokens."""

from pathlib import Path
from typing import Any

import torch

# <s> is 0 and <pad> is 1, as RoBERTa has them; the other families ask only their config
SPECIAL = ["[CLS]", "[PAD]", "[SEP]"]


def build_encoder_tokenizer(family: str = "bert"):
    """Bytes, as [CLS] text [SEP] and [CLS] text [SEP] pair [SEP]; BERT is told which is which."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: n for n, token in enumerate([*SPECIAL, *alphabet])}
    inner = Tokenizer(BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 0), ("[SEP]", 2)],
    )
    told = ["token_type_ids"] if family == "bert" else []
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        model_input_names=["input_ids", *told, "attention_mask"],
    )


def build_tiny_encoder(
    folder: Path,
    family: str = "bert",
    num_layers: int = 2,
    seed: int = 0,
    kind: str = "AutoModel",
    **more: Any,
) -> Path:
    """A random BERT, DistilBERT or RoBERTa; `kind` and `more` for other than the plain encoder."""
    import transformers

    tokenizer = build_encoder_tokenizer(family)
    names = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
    }
    if family == "distilbert":
        names = {"dim": 16, "hidden_dim": 32, "n_layers": num_layers, "n_heads": 2}
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        **names,
        # a wide range, so that a text makes a difference
        **{"initializer_range": 0.2, "max_position_embeddings": 160} | more,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, kind).from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
