"""A Llama in a GGUF file -> a Hugging Face folder.

Knows the names and layouts that llama.cpp gives to a Llama's tensors. Does not know where the file
came from or what the folder is for.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.core.errors import ModelError
from silotune.core.wording import counted

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaConfig

_GGUF_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def convert_llama(gguf_file: Path, folder: Path) -> None:
    """Write a GGUF file of the Llama architecture as bfloat16 safetensors, config and tokenizer.

    Transformers' own GGUF loader returns the same weights bit for bit (a test compares them), but
    it parses the file three times, and its model refuses `save_pretrained`. The tokenizer comes
    from that loader.

    Args:
        gguf_file: In any format that `gguf` can dequantise, with the output layer tied to the
            embedding.
        folder: Exists and is empty.

    Raises:
        ModelError: The converted tensors do not match the architecture.
    """
    from safetensors.torch import save_file
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    reader = _open_gguf(gguf_file)
    config, weights = _llama_config(reader), _llama_weights(reader)
    _check_llama(weights, config)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes it readable for its owner only, but several people may share a cache.
    (folder / "model.safetensors").chmod(0o644)
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    # Not AutoTokenizer, which parses the entire file again for a config that it does not need.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    tokenizer.save_pretrained(folder)


def _open_gguf(file: Path) -> Any:
    import numpy as np
    from gguf import GGUFReader

    class PlainReader(GGUFReader):
        # The reader slices about 250,000 times to parse a vocabulary: 3.5 s on an np.memmap, 0.9 s
        # on a plain view of the same memory.
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value.view(np.ndarray) if name == "data" else value)

    return PlainReader(file)


def _llama_config(reader: Any) -> "LlamaConfig":
    from transformers import LlamaConfig

    def value(key: str) -> Any:
        return reader.fields[key].contents()

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=value("llama.vocab_size"),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=value("llama.attention.head_count"),
        num_key_value_heads=value("llama.attention.head_count_kv"),
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=value("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("llama.rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=value("tokenizer.ggml.bos_token_id"),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
        pad_token_id=value("tokenizer.ggml.padding_token_id"),
    )


def _llama_weights(reader: Any) -> "dict[str, Tensor]":
    """All tensors under transformers' names, in bfloat16."""
    import numpy as np
    import torch
    from gguf.quants import dequantize

    heads = {
        "attn_q": reader.fields["llama.attention.head_count"].contents(),
        "attn_k": reader.fields["llama.attention.head_count_kv"].contents(),
    }
    weights: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        *block, kind, _ = tensor.name.split(".")  # blk.3.attn_q.weight, or token_embd.weight
        layer = f"layers.{block[1]}." if block else ""
        values = dequantize(tensor.data, tensor.tensor_type)  # float32, (d_out, d_in)
        if kind in heads:
            # llama.cpp interleaves the two halves of each head, which the rotary embedding pairs.
            split = values.reshape(heads[kind], -1, 2, values.shape[-1])
            values = split.swapaxes(1, 2).reshape(values.shape)
        # An unquantised tensor is a read-only view of the file, and torch needs a copy.
        values = np.require(values, requirements="W")
        ours = f"model.{layer}{_GGUF_NAMES.get(kind, kind)}.weight"
        weights[ours] = torch.from_numpy(values).bfloat16()
    return weights


def _check_llama(weights: "dict[str, Tensor]", config: "LlamaConfig") -> None:
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):  # names and shapes only
        model = LlamaForCausalLM(config)
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    wrong = expected.items() ^ {name: tensor.shape for name, tensor in weights.items()}.items()
    if wrong:
        raise ModelError(
            "the GGUF file is not a Llama with tied embeddings: "
            f"{counted(len(wrong), 'tensor does', 'tensors do')} not fit, the first is "
            f"'{min(wrong)[0]}'.\n"
            "  Convert it with transformers, and set model.name to a folder or a hub id."
        )
