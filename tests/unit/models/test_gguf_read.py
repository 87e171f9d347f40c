"""A tiny GGUF file, and transformers' own loader as the oracle."""

from pathlib import Path

import numpy as np
import pytest
import torch

from silotune.core.errors import ModelError
from silotune.models.gguf_read import convert_llama


def write_tiny_gguf(file: Path, *, extra_tensor: str | None = None) -> None:
    """A random Llama of 2 layers, width 32, 4 heads over 2, with quantised and plain tensors."""
    from gguf import GGMLQuantizationType as Kind
    from gguf import GGUFWriter
    from gguf.quants import quantize
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = list(bytes_to_unicode().values())
    tokens = ["<unk>", "<start>", "<end>", *characters, "he", "Ġhe"]
    writer = GGUFWriter(file, "llama")
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["h e", "Ġ he"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}<end>")
    rng = np.random.default_rng(0)

    def add(name: str, *shape: int, kind: Kind = Kind.F32) -> None:
        values = rng.standard_normal(shape, dtype=np.float32)
        writer.add_tensor(f"{name}.weight", quantize(values, kind), raw_dtype=kind)

    add("token_embd", len(tokens), 32, kind=Kind.Q8_0)
    for block in range(2):
        add(f"blk.{block}.attn_norm", 32)
        add(f"blk.{block}.attn_q", 32, 32, kind=Kind.Q4_1)
        add(f"blk.{block}.attn_k", 16, 32, kind=Kind.Q4_1)
        add(f"blk.{block}.attn_v", 16, 32, kind=Kind.F32)
        add(f"blk.{block}.attn_output", 32, 32, kind=Kind.Q4_1)
        add(f"blk.{block}.ffn_norm", 32)
        add(f"blk.{block}.ffn_gate", 64, 32, kind=Kind.Q4_1)
        add(f"blk.{block}.ffn_up", 64, 32, kind=Kind.Q4_1)
        add(f"blk.{block}.ffn_down", 32, 64, kind=Kind.Q4_1)
    add("output_norm", 32)
    if extra_tensor:
        add(extra_tensor, 32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_tiny_gguf(file)
    return file


def test_converted_weights_are_those_of_transformers_own_loader(tiny_gguf: Path, tmp_path: Path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    convert_llama(tiny_gguf, tmp_path)
    oracle = AutoModelForCausalLM.from_pretrained(
        tiny_gguf.parent, gguf_file=tiny_gguf.name, dtype=torch.float32
    )
    expected = oracle.state_dict()
    del expected["lm_head.weight"]  # tied
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name].bfloat16()), name
    written = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    oracle.load_state_dict({name: t.bfloat16() for name, t in oracle.state_dict().items()})
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(written(ids).logits, oracle(ids).logits)
    for key in ("rope_parameters", "rms_norm_eps", "max_position_embeddings", "pad_token_id"):
        assert getattr(written.config, key) == getattr(oracle.config, key)
    assert written.generation_config.eos_token_id == 2


def test_converted_tokenizer_has_the_chat_template_and_the_special_tokens(
    tiny_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    from transformers import AutoTokenizer

    convert_llama(tiny_gguf, tmp_path)
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")  # no progress bars, no advice
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "he he"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == ["he", "Ġhe", "<end>"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<start>",
        "<end>",
        "<end>",
    )


def test_gguf_file_with_an_unknown_tensor_is_refused(tmp_path: Path):
    write_tiny_gguf(tmp_path / "odd.gguf", extra_tensor="blk.0.attn_q_norm")
    with pytest.raises(ModelError) as caught:
        convert_llama(tmp_path / "odd.gguf", tmp_path)
    assert str(caught.value) == (
        "the GGUF file is not a Llama with tied embeddings: 1 tensor does not fit, the first is "
        "'model.layers.0.attn_q_norm.weight'.\n"
        "  Convert it with transformers, and set model.name to a folder or a hub id."
    )
