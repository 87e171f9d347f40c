"""Bases whose files are damaged, incomplete, of another model, or of an encoder."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from silotune.core.errors import ModelError
from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig, inspect_base, load_base, quiet_libraries
from silotune.models.loading import load_model
from tests.conftest import build_tiny_model, build_tokenizer
from tests.tiny_encoders import build_tiny_encoder

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n"
UP = "model.layers.1.mlp.up_proj.weight"
Q = "model.layers.0.self_attn.q_proj"
LABELS = ("no", "yes")


def load(folder: Path, labels=()):
    """What a run loads; notes."""
    cpu = torch.device("cpu")
    found = load_base(ModelConfig(name=str(folder)), torch.float32, cpu, labels)
    return found.notes


def inspect(folder: Path, labels=()):
    """What `silotune data` examines; notes."""
    return inspect_base(ModelConfig(name=str(folder)), labels)[1]


both = pytest.mark.parametrize("look", [load, inspect])


def refusal(look, folder: Path, labels=()) -> str:
    with pytest.raises(ModelError) as caught:
        look(folder, labels)
    message = str(caught.value)
    assert message.startswith(f"model.name = '{folder}'")
    assert "\n  " in message, "it says how to fix it"
    return message


@pytest.fixture
def base(tmp_path, tiny_model) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "base"))


def rewrite(folder: Path, change) -> None:
    """Change a checkpoint's tensors by name."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors) or tensors, file, metadata={"format": "pt"})


def configure(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def with_more(folder: Path, **tensors: torch.Tensor) -> Path:
    rewrite(folder, lambda t: t | {name.replace("__", "."): x for name, x in tensors.items()})
    return folder


# --- what the files lack


@both
def test_a_missing_tensor_is_named_and_not_drawn_at_random(base, look):
    rewrite(base, lambda t: {n: x for n, x in t.items() if n != UP})
    message = refusal(look, base)
    assert f"the files lack 1 tensor ('{UP}') of the model's 20 tensors" in message
    assert "random" in message


@both
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_misnamed_tensors_are_recognised_by_their_prefix(base, look, prefix):
    rewrite(base, lambda t: {prefix + n: x for n, x in t.items()})
    assert f"names that begin with '{prefix}'" in refusal(look, base)


@both
def test_a_checkpoint_with_fewer_layers_than_its_config_is_refused(base, look):
    configure(base, num_hidden_layers=3)
    message = refusal(look, base)
    assert "the files lack 9 tensors ('model.layers.2.input_layernorm.weight'," in message
    assert ", ...)" in message


@both
def test_weights_of_another_size_are_refused_with_both_shapes(base, look):
    configure(base, intermediate_size=48)
    message = refusal(look, base)
    assert "6 tensors ('model.layers.0.mlp.down_proj.weight'" in message
    assert "(16, 32) and not (16, 48) for the first" in message


@both
@pytest.mark.parametrize("old", [False, True])
def test_an_adapter_that_was_not_merged_into_its_base_is_refused(base, look, old):
    def add(tensors):
        if not old:  # as PEFT wraps it; with `old`, as loralib does
            tensors[f"{Q}.base_layer.weight"] = tensors.pop(f"{Q}.weight")
        tensors[f"{Q}.lora_A.default.weight"] = torch.zeros(2, 16)
        tensors[f"{Q}.lora_B.default.weight"] = torch.zeros(16, 2)

    rewrite(base, add)
    assert "merge it (merge_and_unload in PEFT)" in refusal(look, base)


@both
def test_a_folder_of_a_base_with_an_adapter_on_top_is_refused(base, look):
    """Regression: transformers loads both, and the base was another than its files said."""
    (base / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "a base with an adapter on top" in refusal(look, base)


# --- what the model has no place for


@both
@pytest.mark.parametrize("name", [f"{Q}.bias", f"{Q}.weight_scale_inv", "model.norm.bias"])
def test_a_tensor_that_a_layer_would_leave_out_is_refused(base, look, name):
    rewrite(base, lambda t: t | {name: torch.zeros(16)})
    assert f"1 tensor ('{name}') for layers that have no place for it" in refusal(look, base)


@both
def test_heads_for_other_tasks_and_old_buffers_are_nothing_to_talk_about(base, look):
    extra = ("score.weight", "v_head.summary.bias", "pooler.dense.weight")
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(base, lambda t: t | {name: torch.zeros(2) for name in (*extra, old)})
    assert look(base) == ()


@both
def test_layers_that_the_config_leaves_out_are_noted(base, look):
    configure(base, num_hidden_layers=1)
    (note,) = look(base)
    assert "contain 9 tensors ('model.layers.1.input_layernorm.weight'," in note
    assert "that the model does not use" in note


def test_a_note_about_the_base_is_kept_with_the_model(base):
    configure(base, num_hidden_layers=1)
    adapter = AdapterConfig(rank=2, targets=("q_proj",))
    loaded = load_model(ModelConfig(name=str(base)), adapter, seed=1, device="cpu")
    assert len(loaded.notes) == 1


@both
def test_tied_weights_may_be_in_the_files_once_and_untied_ones_may_not(base, look):
    assert "lm_head.weight" not in load_file(base / "model.safetensors")
    assert look(base) == ()
    configure(base, tie_word_embeddings=False)
    assert "'lm_head.weight'" in refusal(look, base)


# --- damaged files


@both
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer_is_named_with_the_command_that_gets_the_file(base, look, name):
    (base / name).write_text(LFS)
    message = refusal(look, base)
    assert f"'{name}' is a Git LFS pointer" in message
    assert "git lfs pull" in message


@both
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_weights_that_end_too_early_are_named(base, look, share):
    file = base / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    told = f"was not downloaded completely ({int(share * len(whole))} bytes)"
    assert f"'model.safetensors' is damaged or {told}" in refusal(look, base)


@both
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", '{"version": "1.0", "trunc'),
        ("tokenizer.json", "{}"),
        ("config.json", "[]"),
        ("config.json", '{"model_type": "llama", "hidden_size": "wide"}'),
        ("config.json", '{"model_type": "llama", "num_attention_heads": 0}'),
        ("config.json", '{"model_type": "no-such-model"}'),
    ],
)
def test_broken_json_is_an_error_and_no_traceback(base, look, name, text):
    (base / name).write_text(text)
    assert "cannot be loaded: " in refusal(look, base)


def test_a_shard_that_is_missing_is_named(base):
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").rename(base / "model-00001-of-00002.safetensors")
    table = dict.fromkeys(tensors, "model-00002-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": table}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    for look in (load, inspect):
        assert "model-00002-of-00002.safetensors" in refusal(look, base)


# --- classifiers


@pytest.fixture
def encoder(tmp_path) -> Path:
    return build_tiny_encoder(tmp_path / "encoder")


@both
def test_only_a_head_and_a_whole_pooler_may_be_new(encoder, look):
    assert look(encoder, LABELS) == ()
    rewrite(encoder, lambda t: {n: x for n, x in t.items() if "pooler" not in n})
    assert look(encoder, LABELS) == ()
    rewrite(encoder, lambda t: t | {"pooler.dense.weight": torch.zeros(16, 16)})
    assert "'bert.pooler.dense.bias'" in refusal(look, encoder, LABELS)


@both
def test_a_classifier_needs_all_of_its_encoder(encoder, look):
    name = "encoder.layer.1.output.dense.weight"
    rewrite(encoder, lambda t: {n: x for n, x in t.items() if n != name})
    assert f"1 tensor ('bert.{name}')" in refusal(look, encoder, LABELS)


@both
def test_a_head_for_other_classes_is_replaced(tmp_path, look):
    kind = "AutoModelForSequenceClassification"
    folder = build_tiny_encoder(tmp_path / "three", kind=kind, num_labels=3)
    assert look(folder, LABELS) == ()


# --- tokenizers


@both
def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(base, look):
    tensors = load_file(base / "model.safetensors")
    rewrite(base, lambda t: t | {"model.embed_tokens.weight": t["model.embed_tokens.weight"][:200]})
    configure(base, vocab_size=200)
    message = refusal(look, base)
    assert f"the tokenizer has {len(tensors['model.embed_tokens.weight'])} tokens" in message
    assert "embedding has 200 rows" in message


@both
@pytest.mark.parametrize("use", ["template", "end", None])
def test_an_added_token_without_a_row_is_refused_if_texts_use_it(base, look, use):
    """Gemma 3 has a token for images beyond its embedding, which is no reason to refuse it."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    if use == "template":
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|new|>")
    if use == "end":
        tokenizer.eos_token = "<|new|>"
    tokenizer.save_pretrained(base)
    if use is None:
        assert look(base) == ()
    else:
        assert "the first token without a row is '<|new|>'" in refusal(look, base)


# --- encoders for instruct


def load_for_answers(folder: Path) -> None:
    load_model(
        ModelConfig(name=str(folder), dtype="float32"),
        AdapterConfig(rank=2, targets=("query",)),
        seed=1,
        device="cpu",
    )


def inspect_for_answers(folder: Path) -> None:
    inspect_base(ModelConfig(name=str(folder)), ())


@pytest.mark.parametrize("look", [load_for_answers, inspect_for_answers])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_encoder_is_refused_for_answers_with_the_task_that_it_is_for(tmp_path, look, family):
    folder = build_tiny_encoder(tmp_path / family, family, kind="AutoModelForMaskedLM")
    with pytest.raises(ModelError, match=r'reads in both directions[\s\S]*Set task = "classify"'):
        look(folder)


@pytest.mark.parametrize("look", [load_for_answers, inspect_for_answers])
def test_a_bert_that_is_a_decoder_may_answer(tmp_path, look):
    look(build_tiny_encoder(tmp_path / "bert", kind="AutoModelForCausalLM", is_decoder=True))


def test_a_decoder_that_was_made_to_look_ahead_is_found_by_what_it_does(tmp_path):
    """No name and no key says so: Gemma 3's attention is made bidirectional by its config."""
    import transformers

    tokenizer = build_tokenizer()
    config = transformers.Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        use_bidirectional_attention=True,
    )
    model = transformers.Gemma3ForCausalLM(config)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="reads in both directions"):
        load_for_answers(tmp_path)


@pytest.mark.parametrize("family", ["gpt2", "mamba", "mixtral", "bloom"])
def test_other_decoders_pass(tmp_path, family):
    from silotune.models.causality import check_causal

    names = {
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
        "bloom": {"n_layer": 2, "n_head": 2},
    }
    import transformers

    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=32,
        **names.get(family, {"num_hidden_layers": 2, "num_attention_heads": 2}),
        **({} if family == "gpt2" else {"hidden_size": 16}),
        **({"intermediate_size": 32} if family in ("mixtral", "mamba") else {}),
        **({"num_key_value_heads": 1, "head_dim": 8} if family == "mixtral" else {}),
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    before = {n: p.clone() for n, p in model.named_parameters()}
    random = torch.get_rng_state()
    check_causal(model, "m")
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())


# --- what libraries say


def test_a_librarys_warning_is_passed_on_once_and_its_errors_are_shown():
    logger = logging.getLogger("transformers.some.module")
    root, shown = logging.getLogger("transformers"), []
    spy = logging.Handler()
    spy.emit = lambda record: shown.append(record.getMessage())
    root.addHandler(spy)
    try:
        with quiet_libraries() as said:
            logger.warning("the regex of this tokenizer is\nwrong")
            logger.warning("the regex of this tokenizer is\nwrong")
            logger.info("something")
            logger.error("something bad")
        assert said == ["transformers: the regex of this tokenizer is wrong"]
        assert shown == ["something bad"]
        logger.warning("afterwards")
        assert shown[-1] == "afterwards"
    finally:
        root.removeHandler(spy)


def test_a_damaged_teacher_is_named_by_its_own_key(base):
    rewrite(base, lambda t: {n: x for n, x in t.items() if n != UP})
    with pytest.raises(ModelError, match=r"^distill.teacher = '.*lack 1 tensor"):
        load_model(
            ModelConfig(name=str(base)),
            AdapterConfig(kind="full"),
            seed=1,
            device="cpu",
            key="distill.teacher",
        )


def test_a_base_of_this_test_file_is_whole(tmp_path):
    """Otherwise the tests above would refuse for another reason."""
    assert inspect(build_tiny_model(tmp_path / "m")) == ()
