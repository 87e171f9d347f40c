"""A round's rows in one pass: packed ones have the loss of padded ones, and none sees another."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import silotune
from silotune.core.errors import ConfigError, ModelError
from silotune.core.tree import l2_norm, subtract
from silotune.federation import client
from silotune.models.loading import LoadedModel
from silotune.recipes.parse import parse
from silotune.training.tasks import instruct
from silotune.training.tasks.base import Example
from silotune.training.tasks.instruct import check_packing, collate, loss, pack
from tests.conftest import build_tokenizer, changed, hospital_rows, write_jsonl

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": 1,
}


def build(family: str, **more) -> LoadedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = AutoConfig.for_model(family, **{**SMALL, **more})
        model = AutoModelForCausalLM.from_config(config)
    model.eval()
    named = dict(model.named_parameters())
    return LoadedModel(model, None, torch.device("cpu"), torch.float32, named, kind="full")


def random_examples(lengths: list[int], *, seed: int = 5) -> list[Example]:
    gen = torch.Generator().manual_seed(seed)
    examples = []
    for n in lengths:
        trained = torch.rand(n, generator=gen) < 0.5
        trained[0], trained[-1] = False, True
        examples.append(Example(torch.randint(2, 64, (n,), generator=gen), trained))
    return examples


FAMILIES = {
    "llama": {},
    "qwen2": {},
    "gemma2": {"head_dim": 8},  # caps its logits after the head
    "gemma3_text": {"head_dim": 8},  # two kinds of positions, by layer
    "mistral": {"sliding_window": 32},  # a window longer than these rows, shorter than the pack
    "mixtral": {"num_local_experts": 2},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},  # learned positions
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},  # learned ones with an offset
    "falcon": {"ffn_hidden_size": 32},
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2},  # distances instead of positions
}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_loss_and_gradients_are_those_of_padded_and_of_single_rows(family):
    loaded = build(family, **FAMILIES[family])
    check_packing(loaded)
    examples = random_examples([19, 4, 16])
    params = list(loaded.parameters.values())

    def gradients(value):
        found = torch.autograd.grad(value, params, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]

    alone = torch.stack([loss(loaded, collate([e])).loss_sum for e in examples]).sum()
    expected = gradients(alone)
    assert max(float(g.abs().max()) for g in expected) > 1e-3
    for join in (pack, collate):
        found = loss(loaded, join(examples)).loss_sum
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
        for a, b in zip(gradients(found), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_row_sees_another_not_even_in_the_last_bit(family):
    loaded, examples = build(family, **FAMILIES[family]), random_examples([9, 5, 7])
    owner = torch.cat([torch.full((int(e.trained.sum()),), i) for i, e in enumerate(examples)])
    with torch.inference_mode():
        before = loss(loaded, pack(examples)).logits
        for i, e in enumerate(examples):
            other = [*examples[:i], Example((e.ids + 7) % 64, e.trained), *examples[i + 1 :]]
            after = loss(loaded, pack(other)).logits
            assert torch.equal(after[owner != i], before[owner != i])
            assert not torch.equal(after[owner == i], before[owner == i])


@given(lengths=st.lists(st.integers(2, 12), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_a_pack_has_no_padding_and_learns_every_trained_token_from_the_one_before(lengths, seed):
    examples = random_examples(lengths, seed=seed)
    batch = pack(examples)
    assert batch.ids.shape == (1, sum(lengths))
    assert batch.num_real_tokens == batch.ids.numel() == int(batch.mask.sum())
    assert batch.targets.tolist() == torch.cat([e.ids[e.trained] for e in examples]).tolist()
    assert torch.equal(batch.ids[0, batch.positions + 1], batch.targets)
    assert batch.owners is not None
    # what predicts a token belongs to the row of that token
    assert torch.equal(batch.owners[batch.positions], batch.owners[batch.positions + 1])
    assert batch.owners.bincount().tolist() == lengths


# --- models in which rows would see one another

CARRY = {
    # recurrent: what a row leaves behind does not depend on positions or masks
    "rwkv": {},
    "mamba": {},
    "mamba2": {"num_heads": 4, "head_dim": 8, "n_groups": 1, "state_size": 8},
    "recurrent_gemma": {},
    # hybrids: only a part of their layers is recurrent, and random ones hardly use it
    "qwen3_next": {},
    "minimax": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    # distances counted from a mask of rows: one of positions is no use to them
    "bloom": {"n_head": 2, "n_layer": 2},
    "falcon": {"alibi": True},
}


@pytest.mark.parametrize("family", CARRY)
def test_a_model_in_which_rows_would_see_one_another_is_refused(family):
    loaded = build(family, **CARRY[family])
    with pytest.raises(ModelError, match=r"^train.packing: in this model[\s\S]*packing = false"):
        check_packing(loaded)


@pytest.mark.parametrize(("family", "lost"), [("opt", "attention_mask"), ("gpt2", "position_ids")])
def test_a_model_that_ignores_masks_or_positions_is_refused(family, lost, monkeypatch):
    real = instruct._separate

    def half(loaded, owners):
        return {key: value for key, value in real(loaded, owners).items() if key != lost}

    loaded = build(family, **FAMILIES[family])
    check_packing(loaded)
    monkeypatch.setattr(instruct, "_separate", half)
    with pytest.raises(ModelError, match="see one another"):
        check_packing(loaded)


def test_half_precision_is_no_reason_to_refuse():
    loaded = replace(build("llama"), dtype=torch.bfloat16)
    loaded.model.to(torch.bfloat16)
    check_packing(loaded)


# --- whole runs


def recipe_of(model, folder, **changes):
    data = write_jsonl(folder / "rows.jsonl", hospital_rows())
    table = {
        "seed": 3,
        "rounds": 2,
        "model": {"name": str(model), "dtype": "float32"},
        "adapter": {"rank": 2, "alpha": 4, "dropout": 0.0, "targets": ["q_proj", "v_proj"]},
        "data": {"path": str(data)},
        "partition": {"by": "source"},
        "train": {"batch_size": 3, "local_steps": 2, "lr": 1e-2, "max_length": 128},
        "runtime": {"device": "cpu", "threads": 1},
        "report": {"page": False, "samples": 0},
    }
    return parse(changed(table, changes))


def train_rows(run):
    return [row for row in run.metrics if row["event"] == "train"]


def assert_same_result(packed, padded):
    moved = subtract(packed.adapter(), padded.adapter())
    assert l2_norm(moved) <= 1e-4 * l2_norm(padded.adapter())


def test_a_run_with_packing_gives_the_adapter_of_a_run_without(tmp_path, tiny_model):
    run = recipe_of(tiny_model, tmp_path)
    padded = silotune.run(run, out=tmp_path / "padded")
    packed = silotune.run(
        recipe_of(tiny_model, tmp_path, train__packing=True), out=tmp_path / "packed"
    )
    assert_same_result(packed, padded)
    assert packed.summary["adapter_sha256"] != padded.summary["adapter_sha256"], "it was packed"
    for a, b in zip(train_rows(packed), train_rows(padded), strict=True):
        assert a["num_tokens"] == a["num_padded_tokens"] == b["num_tokens"]
        assert b["num_tokens"] < b["num_padded_tokens"]
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)


def test_a_run_whose_rows_would_see_one_another_does_not_begin(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(instruct, "_separate", lambda loaded, owners: {})
    run = recipe_of(tiny_model, tmp_path, train__packing=True)
    with pytest.raises(ModelError, match="packed rows would see one another"):
        silotune.run(run, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rows_longer_than_a_models_window_are_not_packed_wrongly(tmp_path):
    """Bug: the mask that separates rows silently replaced the window."""
    place = tmp_path / "mistral"
    tokenizer = build_tokenizer()
    # shorter than the rows, longer than the two of check_packing
    model = build("mistral", vocab_size=len(tokenizer), sliding_window=24).model
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    padded = silotune.run(recipe_of(place, tmp_path), out=tmp_path / "padded")
    run = recipe_of(place, tmp_path, train__packing=True)
    try:
        packed = silotune.run(run, out=tmp_path / "packed")
    except ModelError:
        return  # refusing it is right, too
    assert_same_result(packed, padded)


# --- which rows they are


@pytest.mark.parametrize("compat", [(), ("same-samples",)])
def test_a_client_trains_on_fresh_rows_or_if_asked_on_the_same_ones(
    tmp_path, tiny_model, monkeypatch, compat
):
    """Published systems start every round again at the first rows of each client."""
    steps, real = [], client.build_batches

    def spy(planned, *rest, **more):
        steps.append([[list(batch) for batch in step] for step in planned])
        return real(planned, *rest, **more)

    monkeypatch.setattr(client, "build_batches", spy)
    run = recipe_of(tiny_model, tmp_path, rounds=3, train__batch_size=1, train__compat=list(compat))
    done = silotune.run(run, out=tmp_path / "run")
    names = [row["client"] for row in train_rows(done)]
    assert len(names) == len(steps) == 9
    for name in set(names):
        own = [planned for who, planned in zip(names, steps, strict=True) if who == name]
        if compat:
            assert own[0] == own[1] == own[2]
        else:  # six steps of one row, and every client has at least as many
            assert len({row for planned in own for ((row,),) in planned}) == 6


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"task": "classify"}, r'train\.packing: only has an effect with task = "instruct"'),
        *(
            ({"adapter__kind": kind}, rf"train\.packing: .*adapter\.kind = '{kind}'")
            for kind in ("prompt", "prefix")
        ),
    ],
)
def test_what_packing_cannot_be_used_with_is_reported(tmp_path, tiny_model, changes, text):
    other = {"adapter__targets": None} if "adapter__kind" in changes else {}
    with pytest.raises(ConfigError, match=text):
        recipe_of(tiny_model, tmp_path, train__packing=True, **changes, **other)
