"""A live adapter at other ranks, and frozen factors beside it: by PEFT's own arithmetic."""

import pytest
import torch

from silotune.core.algorithm import LocalContext, LocalRule
from silotune.core.errors import UpdateError
from silotune.core.lora import at_rank, is_beside, is_core, joined, pairs_of
from silotune.core.tree import sha256
from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig
from silotune.models.loading import base_only, read_adapter, save_adapter, write_adapter
from silotune.training.loop import TrainConfig, train
from silotune.training.tasks.instruct import INSTRUCT, collate
from tests.integration.models.test_adapters import (
    KINDS,
    LORA,
    base_loss,  # noqa: F401 - a fixture
    examples_of,
    learn,
    load,
    loss_of,
    moved,
    wide,  # noqa: F401 - a fixture
)


def with_residual(state, ranks=(3, 1, 2)):
    """Factors of several ranks beside the first modules of a state."""
    gen = torch.Generator().manual_seed(4)
    found = dict(state)
    for pair, rank in zip(pairs_of(state), ranks, strict=False):
        left, right = state[pair.left], state[pair.right]
        found[pair.beside.left] = 0.3 * torch.randn(len(left), rank, generator=gen)
        found[pair.beside.right] = torch.randn(rank, right.shape[1], generator=gen)
    return found


def base_of(loaded):
    """The base's own weights."""
    named = loaded.model.named_parameters()
    return sha256({n: p.detach() for n, p in named if "lora_" not in n})


# --- ranks


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_a_lower_rank_is_the_function_of_its_columns_whoever_trains_it(wide, kind):  # noqa: F811
    """In simulation on the server's model, in deployment on a model of the client's own rank."""
    loaded = load(wide, kind)
    whole = moved(loaded)
    low = at_rank(whole, 1)
    zeros = {n: t.clone() for n, t in whole.items()}
    for pair in pairs_of(zeros):
        zeros[pair.left][:, 1:] = 0
    write_adapter(loaded, zeros)
    expected = loss_of(loaded)
    write_adapter(loaded, low)
    assert loss_of(loaded) == pytest.approx(expected, abs=1e-6)
    assert {tuple(p.shape) for n, p in loaded.parameters.items() if "lora_A" in n} == {(1, 16)}
    cfg = AdapterConfig(**KINDS[kind]).at_rank(1)
    own = load(wide, kind, rank=cfg.rank, alpha=cfg.alpha)
    write_adapter(own, low)
    assert loss_of(own) == pytest.approx(expected, abs=1e-6)
    learn(loaded)
    learn(own)
    one, other = read_adapter(loaded), read_adapter(own)
    assert sha256(one) == sha256(other) != sha256(low)
    write_adapter(loaded, whole)  # the next client has the server's rank again
    assert sha256(read_adapter(loaded)) == sha256(whole)
    learn(loaded)
    assert {tuple(p.grad.shape) for p in loaded.parameters.values() if p.grad is not None} <= {
        tuple(t.shape) for t in whole.values()
    }


def test_factors_that_differ_in_more_than_the_rank_are_refused(wide):  # noqa: F811
    loaded = load(wide)
    state = read_adapter(loaded)
    pair = pairs_of(state)[0]
    for spoilt in (
        {pair.right: torch.zeros(2, 5)},
        {pair.right: torch.zeros(3, 16)},  # and the other factor has rank 2
        {pair.right: torch.zeros(0, 16), pair.left: torch.zeros(16, 0)},
    ):
        with pytest.raises(UpdateError, match="has shape"):
            write_adapter(loaded, {**state, **spoilt})
    assert sha256(read_adapter(loaded)) == sha256(state)


# --- what stands beside the adapter


def test_factors_beside_the_adapter_are_added_without_touching_the_base(wide, base_loss):  # noqa: F811
    loaded = load(wide, dropout=0.3)
    before = base_of(loaded)
    state = with_residual(moved(loaded))
    alone = loss_of(loaded)
    write_adapter(loaded, state)
    both = loss_of(loaded)
    assert abs(both - alone) > 1e-3
    assert sha256(read_adapter(loaded)) == sha256(state)
    other = load(wide)
    write_adapter(other, joined(state))  # one adapter of the ranks' sums
    assert loss_of(other) == pytest.approx(both, abs=1e-5)
    with base_only(loaded):
        assert loss_of(loaded) == pytest.approx(base_loss, abs=1e-5)
    assert loss_of(loaded) == pytest.approx(both, abs=1e-6)
    assert base_of(loaded) == before
    write_adapter(loaded, {n: t for n, t in state.items() if not is_beside(n)})
    assert loss_of(loaded) == pytest.approx(alone, abs=1e-6)
    assert not any(is_beside(n) for n in read_adapter(loaded))


def test_training_moves_the_adapter_and_nothing_beside_it(wide):  # noqa: F811
    loaded = load(wide)
    state = with_residual(moved(loaded))
    write_adapter(loaded, state)
    start = loss_of(loaded)
    learn(loaded)
    after = read_adapter(loaded)
    for name, tensor in after.items():
        assert torch.equal(tensor, state[name]) == is_beside(name), name
    assert loss_of(loaded) < start


def test_a_tensor_that_stays_frozen_is_still_frozen_after_a_write(wide):  # noqa: F811
    loaded = load(wide)
    frozen = [n for n in loaded.parameters if "lora_A" in n]
    for name in frozen:
        loaded.parameters[name].requires_grad_(False)
    write_adapter(loaded, with_residual(read_adapter(loaded)))
    assert [n for n, p in loaded.parameters.items() if not p.requires_grad] == frozen
    names = [n for n, p in loaded.model.named_parameters() if p.requires_grad]
    assert len(names) == len(loaded.parameters) - len(frozen)


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_the_saved_folder_is_one_plain_adapter(wide, tmp_path, kind):  # noqa: F811
    """PEFT and transformers alone read the folder."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    loaded = load(wide, kind)
    state = with_residual(moved(loaded))
    write_adapter(loaded, state)
    expected = loss_of(loaded)
    config = loaded.model.peft_config["default"].to_dict()
    save_adapter(loaded, tmp_path / "adapter", base=ModelConfig(name="owner/base"))
    now = loaded.model.peft_config["default"].to_dict()
    same = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
    assert {key: now[key] for key in same} == {key: config[key] for key in same}
    assert sha256(read_adapter(loaded)) == sha256(state)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sha256(saved) == sha256(joined(state))

    base = AutoModelForCausalLM.from_pretrained(wide).eval()
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
    ids = torch.arange(5)[None]
    with torch.inference_mode():
        found, ours = theirs(input_ids=ids).logits, loaded.model(input_ids=ids).logits
    torch.testing.assert_close(found, ours, rtol=0, atol=1e-4)
    assert loss_of(loaded) == pytest.approx(expected, abs=1e-6)


def test_it_is_what_pefts_own_cat_makes_of_both_adapters(wide):  # noqa: F811
    from peft import LoraConfig

    loaded, other = load(wide), load(wide)
    state = with_residual(moved(loaded), (3, 3, 3, 3))
    write_adapter(loaded, state)
    write_adapter(other, {n: t for n, t in state.items() if not is_beside(n)})
    scaling = LORA["alpha"] / LORA["rank"]
    more = LoraConfig(r=3, lora_alpha=3 * scaling, target_modules=["q_proj", "v_proj"])
    other.model.add_adapter("more", more)
    for theirs, ours in zip(lora_modules(other), lora_modules(loaded), strict=True):
        for factor in ("lora_A", "lora_B"):
            weight = getattr(ours, factor)["residual"].weight
            getattr(theirs, factor)["more"].weight.data.copy_(weight)
    other.model.add_weighted_adapter(["default", "more"], [1.0, 1.0], "both", "cat")
    other.model.set_adapter("both")
    ids = torch.arange(5)[None]
    with torch.inference_mode():
        both, found = (m.model(input_ids=ids).logits for m in (other, loaded))
    torch.testing.assert_close(found, both, rtol=0, atol=1e-4)


def lora_modules(loaded):
    """PEFT's layers in the order of the model."""
    plain = loaded.model.get_base_model()
    return [m for m in plain.modules() if "default" in getattr(m, "lora_A", {})]


def test_what_does_not_fit_beside_the_adapter_is_refused_by_name(wide):  # noqa: F811
    loaded = load(wide)
    state = read_adapter(loaded)
    pair = pairs_of(state)[0].beside
    with pytest.raises(UpdateError, match=r"'x\.residual_A' belongs to no module that it adapts"):
        write_adapter(loaded, {**state, "x.residual_A": torch.zeros(1, 16)})
    for left, right in (((16, 2), (3, 16)), ((15, 2), (2, 16)), ((16, 0), (0, 16))):
        spoilt = {**state, pair.left: torch.zeros(left), pair.right: torch.zeros(right)}
        with pytest.raises(UpdateError, match="which do not fit the module"):
            write_adapter(loaded, spoilt)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_embedding_takes_other_ranks_and_factors_beside_it_too(wide):  # noqa: F811
    loaded, other = (load(wide, targets=("embed_tokens", "q_proj")) for _ in range(2))
    state = with_residual(moved(loaded), (2, 3, 1))
    assert any("residual_embedding_A" in name for name in state)
    write_adapter(loaded, state)
    write_adapter(other, joined(state))
    assert loss_of(loaded) == pytest.approx(loss_of(other), abs=1e-5)
    assert sha256(read_adapter(loaded)) == sha256(state)
    low = at_rank(state, 1)
    write_adapter(loaded, low)
    learn(loaded, 1)
    assert {n for n, t in read_adapter(loaded).items() if torch.equal(t, low[n])} == {
        n for n in low if is_beside(n)
    }


# --- a core between the factors


def with_cores(state):
    """A drawn core, of both signs, in every module."""
    gen = torch.Generator().manual_seed(6)
    ranks = {pair.core: len(state[pair.right]) for pair in pairs_of(state)}
    return {**state, **{name: torch.randn(r, r, generator=gen) for name, r in ranks.items()}}


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_a_core_is_multiplied_into_one_factor_in_the_saved_folder(wide, tmp_path, kind):  # noqa: F811
    """PEFT and transformers alone read the folder."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = load(wide, kind)
    plain = moved(loaded)
    state, before, alone = with_cores(plain), base_of(loaded), loss_of(loaded)
    write_adapter(loaded, state)
    assert abs(loss_of(loaded) - alone) > 1e-3
    assert sha256(read_adapter(loaded)) == sha256(state)
    assert base_of(loaded) == before
    save_adapter(loaded, tmp_path / "adapter", base=ModelConfig(name="owner/base"))
    assert sha256(read_adapter(loaded)) == sha256(state)
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(wide).eval(), tmp_path / "adapter"
    )
    ids = torch.arange(5)[None]
    with torch.inference_mode():
        found, ours = theirs(input_ids=ids).logits, loaded.model(input_ids=ids).logits
    torch.testing.assert_close(found, ours, rtol=0, atol=1e-4)
    write_adapter(loaded, plain)
    assert loss_of(loaded) == pytest.approx(alone, abs=1e-6)
    assert sha256(read_adapter(loaded)) == sha256(plain)


def test_the_identity_as_a_core_changes_no_bit_and_the_core_learns(wide, base_loss):  # noqa: F811
    loaded = load(wide, dropout=0.3)
    plain = moved(loaded)
    alone = loss_of(loaded)
    cores = {n: torch.eye(len(t)) for n, t in with_cores(plain).items() if is_core(n)}
    write_adapter(loaded, {**plain, **cores})
    assert loss_of(loaded) == alone
    with base_only(loaded):
        assert loss_of(loaded) == pytest.approx(base_loss, abs=1e-5)
    only = LocalRule(trains=lambda name, _: is_core(name))
    steps = [[collate(examples_of(loaded))]] * 3
    context = LocalContext(read_adapter(loaded), {}, {})
    train(loaded, steps, INSTRUCT, TrainConfig(), only, context, round_=1, lr=3e-2, seed=5)
    after = read_adapter(loaded)
    assert {n for n in after if not torch.equal(after[n], {**plain, **cores}[n])} == cores.keys()
    assert loss_of(loaded) < alone


def test_a_core_that_does_not_fit_is_refused_by_name(wide):  # noqa: F811
    loaded = load(wide)
    state = read_adapter(loaded)
    core = pairs_of(state)[0].core
    with pytest.raises(UpdateError, match=f"'{core}' has shape"):
        write_adapter(loaded, {**state, core: torch.zeros(2, 3)})
    with pytest.raises(UpdateError, match=r"'x\.lora_core' is unknown"):
        write_adapter(loaded, {**state, "x.lora_core": torch.zeros(2, 2)})
    write_adapter(loaded, state)
    assert not any(map(is_core, loaded.parameters))
