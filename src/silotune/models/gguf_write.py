"""A Llama in memory -> a GGUF file, for llama.cpp and programs built on it.

The reverse of `gguf_read`. Knows the names, layouts and tokenizers that llama.cpp expects of a
Llama. Does not know where the model came from or where the file goes.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from silotune.core.errors import ModelError

GgufType = Literal["f32", "f16", "q8_0"]
"""How matrices are stored. Vectors, which are norms, are always f32."""
FILE_TYPES: Mapping[GgufType, str] = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "q8_0": "MOSTLY_Q8_0",
}
"""llama.cpp's name for a file whose matrices are of this type."""
F16_MAX = 65504.0
"""The largest f16 number; q8_0 also stores its scales in f16."""

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_CANNOT = "  Export it with --as merged, and convert that folder with llama.cpp's own converter."


def check_llama(config: Any) -> None:
    """Refuse a model that a GGUF file cannot represent exactly, from its configuration alone.

    Raises:
        ModelError: It is of another family, or has an option that GGUF's Llama does not have.
    """
    if config.model_type != "llama":
        raise ModelError(
            f"only models of the family 'llama' can be written to GGUF; this one is of the family "
            f"'{config.model_type}'.\n{_CANNOT}"
        )
    rope = config.rope_parameters["rope_type"]
    for odd, what in (
        # llama.cpp stores them as a separate tensor, which transformers does not read back
        (rope != "default", f"scaled rotary positions ('{rope}')"),
        (config.attention_bias or config.mlp_bias, "biases in its linear layers"),
        (config.hidden_act != "silu", f"the activation '{config.hidden_act}'"),
    ):
        if odd:
            raise ModelError(f"this Llama has {what}, which are not written to GGUF.\n{_CANNOT}")


def check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Refuse a tokenizer that would split text differently when it is read from a GGUF file.

    Args:
        tokenizer: A fast tokenizer.
        vocab_size: Rows of the model's embedding.

    Raises:
        ModelError: It is not byte-level BPE with merges like GPT-2's or SmolLM's, it has more
            tokens than the model, or special tokens in letters that GGUF readers do not know.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    inner = _inner(tokenizer)
    model = inner["model"]
    alphabet = set(ByteLevel.alphabet())
    foreign = [t["content"] for t in inner["added_tokens"] if not set(t["content"]) <= alphabet]
    why = next(
        (
            text
            for wrong, text in (
                (model["type"] != "BPE", f"has the type {model['type']}, not BPE"),
                (not model.get("merges"), "has no merges"),
                (bool(model.get("byte_fallback")), "falls back to bytes, like SentencePiece"),
                (bool(model.get("ignore_merges")), "looks up entire words before merges"),
                (inner["normalizer"] is not None, "normalises text"),
                (_pre_type(inner) is None, "splits text in an unsupported way"),
                (bool(foreign), f"has the token '{next(iter(foreign), '')}', not in byte letters"),
                (
                    len(tokenizer) > vocab_size,
                    f"has {len(tokenizer)} tokens, but the model has {vocab_size}",
                ),
            )
            if wrong
        ),
        None,
    )
    if why is not None:
        raise ModelError(
            f"the tokenizer {why}; only tokenizers like GPT-2's or SmolLM's (byte-level BPE) can "
            f"be written to GGUF.\n{_CANNOT}"
        )


def write_llama(
    model: Any, tokenizer: Any, file: Path, *, kind: GgufType, about: Mapping[str, str]
) -> None:
    """Write a Llama with its tokenizer and chat template as one GGUF file.

    Largest error of a weight: f32 none; f16 1/2048 of the weight; q8_0 (1/254 + 1/2048) of the
    largest weight in its block of 32.

    Args:
        model: A plain `LlamaForCausalLM`, its weights in any type. Not modified.
        tokenizer: Its tokenizer.
        file: Written; its folder exists.
        kind: How matrices are stored. With q8_0, a matrix whose rows are not a multiple of 32 long
            is stored as f16.
        about: Text for the keys `general.<key>`, for example name and license.

    Raises:
        ModelError: See `check_llama` and `check_tokenizer`; or a weight is too large for f16.
        OSError: The file cannot be written.
    """
    from gguf import GGUFWriter, LlamaFileType
    from gguf.constants import GGML_QUANT_VERSION

    check_llama(model.config)
    check_tokenizer(tokenizer, model.config.vocab_size)
    writer = GGUFWriter(file, "llama")
    try:
        for key, text in about.items():
            writer.add_string(f"general.{key}", text)
        writer.add_file_type(LlamaFileType[FILE_TYPES[kind]])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        _add_config(writer, model.config)
        _add_tokenizer(writer, tokenizer, model.config.vocab_size)
        for name, values, stored in _tensors(model, kind):
            writer.add_tensor(name, values, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_config(writer: Any, config: Any) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    # without these three, llama.cpp uses the width divided by the number of heads
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tokenizer(writer: Any, tokenizer: Any, vocab_size: int) -> None:
    from gguf import TokenType

    inner = _inner(tokenizer)
    # an embedding may have more rows than the tokenizer has tokens
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    for token, i in tokenizer.get_vocab().items():
        tokens[i], types[i] = token, TokenType.NORMAL
    for added in inner["added_tokens"]:
        control = added["special"]
        types[added["id"]] = TokenType.CONTROL if control else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_type(inner))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = inner["model"]["merges"]  # pairs, or in older files both words in one string
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    for add, i in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if i is not None:
            add(i)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(
        tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    )
    writer.add_add_eos_token(
        tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id
    )
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _inner(tokenizer: Any) -> dict[str, Any]:
    """What tokenizer.json would hold."""
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _pre_type(inner: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for how text is split before merging; None if it has no name for it."""
    given = inner["pre_tokenizer"] or {}
    steps = given["pretokenizers"] if given.get("type") == "Sequence" else [given]
    steps = [{key: v for key, v in step.items() if key != "trim_offsets"} for step in steps]
    return "gpt-2" if steps == [_BYTES] else "smollm" if steps == [_DIGITS, _BYTES] else None


def _tensors(model: Any, kind: GgufType) -> Iterator[tuple[str, Any, Any]]:
    """Name, stored values and type of each tensor in the file."""
    import numpy as np
    from gguf import MODEL_ARCH, GGMLQuantizationType, get_tensor_name_map
    from gguf.quants import QuantError, quantize

    config = model.config
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():  # a tied output layer is not among them
        values = parameter.detach().float().cpu().numpy()
        projection = name.split(".")[-2]
        if projection in heads:
            # the rotary embedding pairs the two halves of a head; llama.cpp pairs neighbours
            halves = values.reshape(heads[projection], 2, -1, values.shape[-1])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        stored = GGMLQuantizationType[kind.upper() if values.ndim > 1 else "F32"]
        if stored != GGMLQuantizationType.F32 and np.abs(values).max() > F16_MAX:
            raise ModelError(
                f"tensor '{name}' contains numbers that are too large for {kind}.\n"
                "  Export with --type f32."
            )
        try:
            packed = quantize(np.ascontiguousarray(values), stored)
        except QuantError:  # the row length is not a multiple of the block size
            stored = GGMLQuantizationType.F16
            packed = quantize(values, stored)
        yield f"{names.get_name(name.removesuffix('.weight'))}.weight", packed, stored
