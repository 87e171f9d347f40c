"""Every kind of adapter: what it trains, that the base stays the base, and what is refused."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

import silotune
from silotune.core.algorithm import LocalContext, LocalRule
from silotune.core.errors import ConfigError, ModelError, SilotuneError
from silotune.core.tree import sha256
from silotune.federation.metrics import held_out_losses
from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig
from silotune.models.loading import (
    LoadedModel,
    base_only,
    load_model,
    read_adapter,
    renew_adapter,
    save_adapter,
    write_adapter,
)
from silotune.recipes.parse import load_recipe, parse
from silotune.results.card import what_is_trained
from silotune.training.loop import TrainConfig, train
from silotune.training.scoring import evaluate
from silotune.training.tasks.base import Batch, Example
from silotune.training.tasks.instruct import INSTRUCT, collate, prepare
from silotune.workflows.check import check
from tests.conftest import build_tiny_model, build_tokenizer, changed, write_tiny_recipe

LORA = {"rank": 2, "alpha": 4, "targets": ("q_proj", "v_proj")}
KINDS = {
    "lora": LORA,
    "dora": {**LORA, "dora": True},
    "rslora": {**LORA, "rslora": True},
    "all-linear": {**LORA, "targets": ("all-linear",)},
    "ia3": {"kind": "ia3"},
    "prompt": {"kind": "prompt", "virtual_tokens": 3},
    "prefix": {"kind": "prefix", "virtual_tokens": 3},
    "loha": {"kind": "peft", "targets": ("q_proj",), "peft": {"peft_type": "LOHA", "r": 2}},
    "vera": {"kind": "peft", "targets": ("q_proj",), "peft": {"peft_type": "VERA", "r": 4}},
}
VECTORS = ("prompt", "prefix")
"""In front of the text: the only kinds whose first values change what the model says."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """The tiny model with weights so large that every adapter shows in the loss."""
    from transformers import AutoModelForCausalLM

    folder = build_tiny_model(tmp_path_factory.mktemp("models") / "wide")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(12)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, kind: str = "lora", *, seed: int = 1, **more) -> LoadedModel:
    cfg = AdapterConfig(**{**KINDS[kind], **more})
    return load_model(ModelConfig(name=str(folder), dtype="float32"), cfg, seed=seed, device="cpu")


def examples_of(loaded: LoadedModel) -> tuple[Example, ...]:
    rows = [
        ({"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "abc" * (1 + i)})
        for i in range(4)
    ]
    return prepare(rows, loaded.tokenizer, 128).examples


def loss_of(loaded: LoadedModel, *batches: Batch) -> float:
    batches = batches or (collate(examples_of(loaded)),)
    score = evaluate(loaded, batches, INSTRUCT, client="north", num_examples=4)
    return score.loss_sum / score.num_tokens


def learn(loaded: LoadedModel, num_steps: int = 3) -> None:
    context = LocalContext(read_adapter(loaded), {}, {})
    steps, cfg = [[collate(examples_of(loaded))]] * num_steps, TrainConfig()
    train(loaded, steps, INSTRUCT, cfg, LocalRule(), context, round_=1, lr=3e-2, seed=5)


def moved(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """Other values than the first in every tensor, so that each has an effect; written too."""
    gen = torch.Generator().manual_seed(9)
    state = {
        n: t + 0.2 * torch.randn(t.shape, generator=gen) for n, t in read_adapter(loaded).items()
    }
    write_adapter(loaded, state)
    return state


@pytest.fixture(scope="module")
def base_loss(wide) -> float:
    """By transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(wide).eval()
    batch = collate(examples_of(load(wide)))
    with torch.inference_mode():
        logits = model(input_ids=batch.ids).logits.flatten(0, 1)[batch.positions]
    return float(F.cross_entropy(logits, batch.targets))


# --- what is trained

SHAPES = {
    "lora": {
        "self_attn.q_proj.lora_A.weight": (2, 16),
        "self_attn.q_proj.lora_B.weight": (16, 2),
        "self_attn.v_proj.lora_A.weight": (2, 16),
        "self_attn.v_proj.lora_B.weight": (8, 2),
    },
    "ia3": {
        "mlp.down_proj.ia3_l": (1, 32),
        "self_attn.k_proj.ia3_l": (8, 1),
        "self_attn.v_proj.ia3_l": (8, 1),
    },
    "loha": {f"self_attn.q_proj.hada_w{n}_a": (16, 2) for n in (1, 2)}
    | {f"self_attn.q_proj.hada_w{n}_b": (2, 16) for n in (1, 2)},
    "vera": {
        "self_attn.q_proj.vera_lambda_b": (16,),
        "self_attn.q_proj.vera_lambda_d": (4,),
    },
}
SHAPES["rslora"] = SHAPES["lora"]
SHAPES["dora"] = SHAPES["lora"] | {
    "self_attn.q_proj.lora_magnitude_vector": (16,),
    "self_attn.v_proj.lora_magnitude_vector": (8,),
}
SIZES = {  # (out, in) of every linear layer but the output
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (8, 16),
    "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (32, 16),
    "mlp.up_proj": (32, 16),
    "mlp.down_proj": (16, 32),
}
SHAPES["all-linear"] = {f"{n}.lora_A.weight": (2, size[1]) for n, size in SIZES.items()} | {
    f"{n}.lora_B.weight": (size[0], 2) for n, size in SIZES.items()
}
WHOLE = {
    "prompt": {"prompt_embeddings": (3, 16)},
    "prefix": {"prompt_embeddings": (3, 2 * 2 * 8)},  # keys and values of 2 layers with one head
}


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_of_what_is_sent(wide, kind):
    loaded = load(wide, kind)
    expected = WHOLE.get(kind) or {
        f"base_model.model.model.layers.{layer}.{name}": shape
        for layer in (0, 1)
        for name, shape in SHAPES[kind].items()
    }
    assert {n: tuple(p.shape) for n, p in loaded.parameters.items()} == expected
    assert {p.dtype for p in loaded.parameters.values()} == {torch.float32}
    learning = {p.data_ptr() for p in loaded.model.parameters() if p.requires_grad}
    assert learning == {p.data_ptr() for p in loaded.parameters.values()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_values_are_the_seeds(wide, kind):
    before = torch.get_rng_state()
    one, again, other = (read_adapter(load(wide, kind, seed=s)) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert sha256(one) == sha256(again)
    drawn = kind not in ("ia3", "vera")  # these begin at constants
    assert (sha256(one) != sha256(other)) == drawn


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_is_the_base_and_vectors_in_front_are_not(wide, kind, base_loss):
    loaded = load(wide, kind)
    with base_only(loaded):
        assert loss_of(loaded) == pytest.approx(base_loss, rel=1e-6)
    assert (loss_of(loaded) == pytest.approx(base_loss, rel=1e-6)) == (kind not in VECTORS)


# --- the life of an adapter


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_change_a_loss(wide, kind, base_loss):
    loaded = load(wide, kind)
    moved(loaded)
    alone = [collate([example]) for example in examples_of(loaded)]
    assert len({batch.ids.shape for batch in alone}) == 4
    assert loss_of(loaded) == pytest.approx(loss_of(loaded, *alone), rel=1e-5)
    assert loss_of(loaded) != pytest.approx(base_loss, rel=1e-4), "the adapter is at work"


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_and_moves_the_adapter_alone(wide, kind, base_loss):
    loaded = load(wide, kind)
    own = {p.data_ptr() for p in loaded.parameters.values()}
    tensors = [*loaded.model.named_parameters(), *loaded.model.named_buffers()]
    frozen = {name: t.detach().clone() for name, t in tensors if t.data_ptr() not in own}
    first, before = loss_of(loaded), read_adapter(loaded)
    learn(loaded)
    assert loss_of(loaded) < first
    after = read_adapter(loaded)
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert [n for n, t in tensors if n in frozen and not torch.equal(t, frozen[n])] == []
    with base_only(loaded):
        assert loss_of(loaded) == pytest.approx(base_loss, rel=1e-6)
    assert sha256(read_adapter(loaded)) == sha256(after)
    learning = {p.data_ptr() for p in loaded.model.parameters() if p.requires_grad}
    assert learning == own, "and it goes on learning"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_again_and_has_the_same_effect_in_another_process(wide, kind):
    first, second = load(wide, kind), load(wide, kind, seed=2)
    state = moved(first)
    write_adapter(second, state)
    assert sha256(read_adapter(second)) == sha256(state) == sha256(read_adapter(first))
    assert loss_of(second) == loss_of(first)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_the_saved_adapter_and_has_its_loss(wide, kind, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = load(wide, kind)
    moved(loaded)
    save_adapter(loaded, tmp_path / "adapter", base=ModelConfig(name="owner/base"))
    base = AutoModelForCausalLM.from_pretrained(wide)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    batch = collate(examples_of(loaded))
    with torch.inference_mode():
        logits = model(input_ids=batch.ids).logits[:, -batch.ids.shape[1] :].flatten(0, 1)
    found = F.cross_entropy(logits[batch.positions], batch.targets)
    assert float(found) == pytest.approx(loss_of(loaded), rel=1e-5)


@pytest.mark.parametrize("kind", ["dora", "ia3", "prompt", "prefix", "loha", "vera"])
def test_two_rounds_with_any_kind_change_the_held_out_loss_and_load_again(wide, tmp_path, kind):
    done = silotune.run(recipe_of(tmp_path, wide, kind, rounds=2), out=tmp_path / "run")
    by_round = held_out_losses(done.metrics)
    assert by_round[2] < by_round[1]
    loaded = done.load()
    saved = done.adapter()
    assert all(torch.equal(t, saved[name]) for name, t in read_adapter(loaded).items())


def recipe_of(folder: Path, model: Path, kind: str = "lora", **changes):
    table = load_recipe(write_tiny_recipe(folder, model)).model_dump(
        mode="json", exclude_unset=True, serialize_as_any=True
    )
    return parse(changed(table, {"adapter": dict(KINDS[kind]), **changes}))


@pytest.mark.parametrize("kind", VECTORS)
def test_the_base_in_a_summary_is_the_base_and_not_the_first_vectors(wide, tmp_path, kind):
    found = []
    for name in ("ia3", kind):  # ia3 begins as the base
        (tmp_path / name).mkdir()
        recipe = recipe_of(tmp_path / name, wide, name, rounds=1)
        done = silotune.run(recipe, out=tmp_path / name / "run")
        found.append(done.summary["overall"]["base_loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-6)


# --- by their papers


def test_vectors_of_a_prompt_stand_in_front_of_the_text_and_are_not_scored(wide):
    from transformers import AutoModelForCausalLM

    loaded = load(wide, "prompt")
    table = moved(loaded)["prompt_embeddings"]
    model = AutoModelForCausalLM.from_pretrained(wide).eval()
    batch = collate(examples_of(loaded))
    with torch.inference_mode():
        text = model.get_input_embeddings()(batch.ids)
        whole = torch.cat([table.expand(len(text), -1, -1), text], dim=1)
        logits = model(inputs_embeds=whole).logits[:, 3:].flatten(0, 1)
    expected = F.cross_entropy(logits[batch.positions], batch.targets)
    assert loss_of(loaded) == pytest.approx(float(expected), rel=1e-5)


def test_rslora_divides_by_the_root_of_the_rank(wide):
    loaded = load(wide, "rslora")
    state = moved(loaded)
    plain = load(wide, "lora", alpha=4 * math.sqrt(2))  # 4 / sqrt(2) is 4 sqrt(2) / 2
    write_adapter(plain, state)
    assert loss_of(loaded) == pytest.approx(loss_of(plain), rel=1e-6)
    other = load(wide, "lora")
    write_adapter(other, state)
    assert loss_of(loaded) != pytest.approx(loss_of(other), rel=1e-4)


def test_dora_begins_with_the_length_of_every_row_of_the_weights(wide):
    loaded = load(wide, "dora")
    layers = loaded.model.get_base_model().model.layers
    for n, layer in enumerate(layers):
        weight = layer.self_attn.q_proj.base_layer.weight.detach()
        name = f"base_model.model.model.layers.{n}.self_attn.q_proj.lora_magnitude_vector"
        torch.testing.assert_close(loaded.parameters[name].detach(), weight.norm(dim=1))


def test_another_seeds_dora_on_the_base_in_memory_is_that_of_a_fresh_load(wide):
    cfg = AdapterConfig(**KINDS["dora"])
    loaded = load(wide, "dora")
    learn(loaded)
    renewed, fresh = renew_adapter(loaded, cfg, seed=2), load(wide, "dora", seed=2)
    assert sha256(read_adapter(renewed)) == sha256(read_adapter(fresh))
    assert loss_of(renewed) == loss_of(fresh)
    learn(renewed)
    learn(fresh)
    assert sha256(read_adapter(renewed)) == sha256(read_adapter(fresh))


# --- PEFT's own options


@pytest.mark.parametrize(
    ("adapter", "text"),
    [
        ({"peft": {"r": 4}}, "peft.r is set with adapter.rank"),
        ({"peft": {"use_dora": True}}, "peft.use_dora is set with adapter.dora"),
        ({"kind": "ia3", "peft": {"target_modules": "x"}}, "is set with adapter.targets"),
        (
            {"kind": "prompt", "peft": {"num_virtual_tokens": 2}},
            "is set with adapter.virtual_tokens",
        ),
        ({"peft": {"task_type": "CAUSAL_LM"}}, "peft.task_type follows from other keys"),
        ({"peft": {"modules_to_save": ["lm_head"]}}, "modules_to_save follows from other keys"),
        ({"peft": {"peft_type": "LOHA"}}, "peft.peft_type needs kind = 'peft'"),
        ({"kind": "peft"}, "peft.peft_type is missing: name the method"),
        ({"kind": "full", "peft": {"bias": "all"}}, "peft has no effect with kind = 'full'"),
        ({"kind": "ia3", "dora": True}, "dora only has an effect with kind = 'lora'"),
        (
            {"kind": "lora", "virtual_tokens": 3},
            "only has an effect with kind = 'prompt' or 'prefix'",
        ),
    ],
)
def test_an_option_that_cannot_be_is_told_without_peft(adapter, text):
    with pytest.raises(ValidationError, match=text):
        AdapterConfig(**adapter)


@pytest.mark.parametrize(
    ("adapter", "text"),
    [
        (
            {"peft": {"rank_patern": {}}},
            r"adapter.peft.rank_patern: PEFT's LoraConfig has no such.*Did you mean 'rank_pattern'",
        ),
        (
            {"kind": "peft", "peft": {"peft_type": "LOHAA"}},
            r"PEFT has no method 'LOHAA' that adapts weights. Did you mean 'LOHA'",
        ),
        (
            {"kind": "peft", "peft": {"peft_type": "PROMPT_TUNING"}},
            r"PEFT has no method 'PROMPT_TUNING' that adapts weights[\s\S]*Use one of: ADALORA",
        ),
        ({"kind": "peft", "peft": {"peft_type": "ADALORA"}}, "rejects these.*total_step"),
    ],
)
def test_what_peft_does_not_know_is_told_before_a_model_is_loaded(tmp_path, adapter, text):
    folder = tmp_path / "no-weights"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    recipe = recipe_of(tmp_path, folder, adapter=adapter)
    with pytest.raises(ConfigError, match=text):
        check(recipe)


def test_an_option_of_pefts_has_its_effect(wide):
    loaded = load(wide, peft={"rank_pattern": {"q_proj": 5}})
    assert {p.shape[0] for n, p in loaded.parameters.items() if "q_proj.lora_A" in n} == {5}
    assert {p.shape[0] for n, p in loaded.parameters.items() if "v_proj.lora_A" in n} == {2}


def build_biased(folder: Path) -> Path:
    """A tiny Llama whose attention has biases, and not zeros."""
    from transformers import AutoConfig, AutoModelForCausalLM

    build_tiny_model(folder)
    config = AutoConfig.from_pretrained(folder, attention_bias=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "option",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"layer_replication": [[0, 2], [0, 2]]},  # a base of four layers
        {"bias": "all"},  # the base's own biases would learn
        {"bias": "lora_only"},
    ],
    ids=lambda option: "-".join(map(str, next(iter(option.items())))),
)
def test_an_option_that_would_change_the_base_is_refused(tmp_path, option):
    (name,) = option
    with pytest.raises((ConfigError, ValidationError), match=name):
        load(build_biased(tmp_path), peft=option)


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("lora", {"rank_pattern": 3}),
        ("lora", {"init_lora_weights": "nonsense"}),
        ("loha", {"peft_type": "LOHA", "r": "two"}),
        ("prefix", {"prefix_projection": True, "encoder_hidden_size": 8}),
    ],
)
def test_an_option_that_peft_cannot_use_is_an_error_with_a_fix(wide, kind, option):
    with pytest.raises(SilotuneError, match="adapter"):
        load(wide, kind, peft=option)


def test_first_vectors_of_a_text_do_not_read_a_tokenizer_that_the_recipe_names(tmp_path, wide):
    """A recipe comes from the server, and names no path of a client's and no download."""
    option = {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "hello",
        "tokenizer_name_or_path": str(wide),
    }
    with pytest.raises((ConfigError, ValidationError), match="prompt_tuning_init_text"):
        load(wide, "prompt", peft=option)


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        (("nothing",), r"this model has no module 'nothing'.\s+It has: act_fn, down_proj"),
        (("q_prj", "v_proj"), r"this model has no module 'q_prj'.\s+Did you mean q_proj"),
        (("layers.7.self_attn.q_proj",), r"cannot put 'lora'[\s\S]*\[adapter\] targets"),
    ],
)
def test_targets_that_match_nothing_are_told_with_what_there_is(wide, targets, text):
    with pytest.raises(ModelError, match=text):
        load(wide, targets=targets)


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({}, "LoRA of rank 8 (alpha 16) on the default modules of the model family"),
        ({"dora": True, "targets": ("q_proj",)}, "DoRA of rank 8 (alpha 16) on q_proj"),
        ({"rslora": True, "targets": ("q_proj",)}, "LoRA, rank-stabilised, of rank 8"),
        ({"kind": "ia3", "targets": ("q_proj",)}, "IA3 on q_proj"),
        ({"kind": "prompt", "virtual_tokens": 4}, "prompt tuning with 4 trained vectors"),
        ({"kind": "peft", "targets": ("q_proj",), "peft": {"peft_type": "LOHA"}}, "LOHA on q_proj"),
        ({"kind": "full"}, "all weights were trained"),
    ],
)
def test_a_card_names_the_adapter_that_was_trained(adapter, words):
    """Regression: every kind was called LoRA."""
    run = parse({"rounds": 1, "data": {"path": "x"}, "adapter": adapter})
    assert what_is_trained(run).startswith(words)
