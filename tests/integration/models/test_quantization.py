"""Bases in 4 and 8 bits, and optimizers with 8-bit moments, by bitsandbytes itself."""

import contextlib
import importlib.util
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

import silotune
from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.core.algorithm import LocalContext, LocalRule
from silotune.core.errors import ConfigError, ModelError, SilotuneError
from silotune.core.tree import sha256
from silotune.core.types import Broadcast, Score, ServerState, Update
from silotune.data.clients import load_clients
from silotune.federation.client_config import ClientConfig
from silotune.federation.client_recipe import own_recipe
from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig
from silotune.models.loading import (
    LoadedModel,
    load_model,
    num_base_loads,
    read_adapter,
    write_adapter,
)
from silotune.models.quantization import check_quantization
from silotune.recipes.parse import load_recipe, parse
from silotune.runtime import wire
from silotune.runtime.client_host import Place, Station
from silotune.runtime.payload import Parcel
from silotune.training.generate import complete, encode, end_tokens
from silotune.training.loop import TrainConfig, build_optimizer, pick_optimizer, train
from silotune.training.scoring import evaluate
from silotune.training.tasks.base import Batch
from silotune.training.tasks.classify import classify
from silotune.training.tasks.instruct import INSTRUCT, collate, prepare
from silotune.workflows.check import check
from tests.conftest import build_tiny_model, changed, write_tiny_recipe
from tests.tiny_encoders import build_encoder_tokenizer

KINDS = ("nf4", "fp4", "int8")
CPU = torch.device("cpu")
LORA = AdapterConfig(rank=2, alpha=4, targets=("q_proj", "v_proj"))


def build_wide(folder: Path, width: int = 64) -> Path:
    """A random Llama whose weights are so large that rounding them shows in every loss."""
    return build_tiny_model(folder, width=width, initializer_range=0.15)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    return build_wide(tmp_path_factory.mktemp("models") / "wide")


def load(folder: Path, quantization="none", adapter=LORA, **model) -> LoadedModel:
    cfg = ModelConfig(
        **{"name": str(folder), "dtype": "float32", "quantization": quantization, **model}
    )
    return load_model(cfg, adapter, seed=1, device="cpu")


def batch_of(loaded: LoadedModel) -> Batch:
    rows = [
        ({"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "abc" * (1 + i)})
        for i in range(4)
    ]
    return collate(prepare(rows, loaded.tokenizer, 128).examples)


def score_of(loaded: LoadedModel) -> Score:
    return evaluate(loaded, [batch_of(loaded)], INSTRUCT, client="north", num_examples=4)


def loss_of(loaded: LoadedModel) -> float:
    score = score_of(loaded)
    return score.loss_sum / score.num_tokens


def learn(loaded: LoadedModel, num_steps: int = 2) -> None:
    context = LocalContext(read_adapter(loaded), {}, {})
    steps = [[batch_of(loaded)]] * num_steps
    cfg = TrainConfig()
    train(loaded, steps, INSTRUCT, cfg, LocalRule(), context, round_=1, lr=1e-2, seed=5)


def linear_layers(loaded: LoadedModel) -> dict[str, torch.nn.Linear]:
    """The base's own, without an adapter's factors."""
    return {
        name: module
        for name, module in loaded.model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in name
    }


def layer(loaded: LoadedModel) -> torch.nn.Linear:
    """One that no adapter is on, of 64 times 128 weights."""
    return loaded.model.get_base_model().model.layers[1].mlp.down_proj


def held(loaded: LoadedModel) -> torch.Tensor:
    """The weights by which that layer multiplies: what it makes of the unit vectors."""
    module = layer(loaded)
    with torch.inference_mode():
        return module(torch.eye(module.in_features)).T


def base_bytes(loaded: LoadedModel) -> str:
    """A fingerprint of all that is not trained, scales of quantised weights included."""
    trained = {p.data_ptr() for p in loaded.parameters.values()}
    found = dict(loaded.model.named_buffers())
    for name, p in loaded.model.named_parameters():
        if p.data_ptr() in trained:
            continue
        found[name] = p.detach()
        state = getattr(p, "quant_state", None)
        # not as_dict: it is for saving, and may undo a repacking that this is to find
        nested = [state, state.state2] if getattr(state, "nested", False) else [state]
        for depth, level in enumerate(level for level in nested if level is not None):
            found |= {f"{name}.{depth}.absmax": level.absmax, f"{name}.{depth}.code": level.code}
        if getattr(state, "nested", False):
            found[f"{name}.offset"] = state.offset
    for name, module in loaded.model.named_modules():
        if getattr(module, "state", None) is not None:  # int8: one scale for each row, which moves
            scales = (getattr(module.weight, "SCB", None), module.state.SCB)  # at the first use
            found[f"{name}.SCB"] = next(s for s in scales if s is not None)
    return sha256({name: t.detach().contiguous() for name, t in found.items()})


# --- what is held


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4), ("fp4", 4), ("int8", 8)])
def test_every_linear_layer_but_the_output_is_held_in_few_bits(wide, kind, bits):
    plain, quantised = load(wide), load(wide, kind)
    whole = {n: m.weight.numel() for n, m in linear_layers(plain).items() if "lm_head" not in n}
    assert len(whole) == 2 * 7
    modules = linear_layers(quantised)
    for name, numel in whole.items():
        weight = modules[name].weight
        assert weight.dtype == (torch.int8 if kind == "int8" else torch.uint8)
        assert 8 * weight.numel() * weight.element_size() == bits * numel
        assert not weight.requires_grad
    rest = {n: p for n, p in quantised.model.named_parameters() if p.dtype.is_floating_point}
    assert {p.dtype for p in rest.values()} == {torch.float32}
    sizes = [m.model.get_base_model().get_memory_footprint() for m in (quantised, plain)]
    assert sizes[0] <= sizes[1] - (32 - bits) / 8 * sum(whole.values()) * 0.9
    assert (quantised.quantization, plain.quantization) == (kind, "none")


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_predicts_nearly_as_the_whole_one_and_always_the_same(wide, kind):
    whole = loss_of(load(wide))
    first, again = loss_of(load(wide, kind)), loss_of(load(wide, kind))
    assert first == again
    assert first != whole
    assert first == pytest.approx(whole, rel=0.05)


# Dettmers et al. 2023, "QLoRA", appendix E. arXiv:2305.14314
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
# a sign, two bits of exponent and one of mantissa, in twelfths
FP4 = [sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 2, 3, 4, 6, 8, 12)]


@pytest.mark.parametrize(("kind", "values"), [("nf4", NF4), ("fp4", FP4)])
def test_four_bits_are_the_nearest_of_sixteen_values_times_the_largest_of_64(wide, kind, values):
    expected = in_blocks(layer(load(wide)).weight.detach(), values)
    found = held(load(wide, kind, double_quantization=False))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def in_blocks(weight: torch.Tensor, values: list[float]) -> torch.Tensor:
    """Each weight as the nearest of some values times the largest of its block."""
    blocks, code = weight.reshape(-1, 64), torch.tensor(values)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks[..., None] / largest[..., None] - code).abs().argmin(-1)
    return (code[nearest] * largest).reshape(weight.shape)


@pytest.mark.parametrize("width", [16, 48])
def test_rows_that_end_inside_a_block_are_refused_or_right(tmp_path, width):
    """bitsandbytes 0.50.2 reads other blocks' scales there, on processors with AVX-512."""
    folder = build_wide(tmp_path, width)
    expected = in_blocks(layer(load(folder)).weight.detach(), NF4)
    with contextlib.suppress(SilotuneError):
        found = held(load(folder, "nf4", double_quantization=False))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_eight_bits_are_127ths_of_the_largest_of_a_row(wide):
    weight = layer(load(wide)).weight.detach()
    # bitsandbytes takes weights in half precision
    largest = weight.half().float().abs().amax(1, keepdim=True)
    quantised = load(wide, "int8")
    found = layer(quantised).weight.detach().float()
    exact = weight / largest * 127
    assert float((found - exact).abs().max()) < 0.5 + 127 * 2**-11  # half a step, and that of half
    torch.testing.assert_close(held(quantised), found * largest / 127, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_double_quantisation_changes_the_scales_a_little_and_the_codes_not_at_all(wide, kind):
    twice, once = (load(wide, kind, double_quantization=double) for double in (True, False))
    assert torch.equal(layer(twice).weight, layer(once).weight)
    change = float((held(twice) - held(once)).norm() / held(once).norm())
    assert 0 < change < 0.02


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_an_adapter_is_float32_whatever_the_base(wide, kind, dtype):
    loaded = load(wide, kind, dtype=dtype)
    assert {p.dtype for p in loaded.parameters.values()} == {torch.float32}
    state = read_adapter(loaded)
    assert {t.dtype for t in state.values()} == {torch.float32}
    if dtype == "float32":  # PEFT draws in the numbers of the layer that it adapts
        assert sha256(state) == sha256(read_adapter(load(wide)))


# --- training


@pytest.mark.parametrize("kind", KINDS)
def test_neither_training_nor_scoring_moves_a_bit_of_the_base(wide, kind, monkeypatch):
    """Remembers bitsandbytes 0.50, which repacks the base, and rounds its scales, when it scores.

    It does so on processors that multiply bfloat16; here every processor says that it does.
    """
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    loaded = load(wide, kind)
    first, adapter, score = base_bytes(loaded), read_adapter(loaded), score_of(loaded)
    assert base_bytes(loaded) == first, "scoring"
    learn(loaded)
    score_of(loaded)
    learn(loaded)
    assert base_bytes(loaded) == first, "training"
    assert {p.dtype for p in loaded.parameters.values()} == {torch.float32}
    moved = read_adapter(loaded)
    assert all(not torch.equal(moved[name], tensor) for name, tensor in adapter.items())
    write_adapter(loaded, adapter)
    assert score_of(loaded) == score


@pytest.mark.parametrize("kind", KINDS)
def test_scoring_between_steps_does_not_change_what_is_learned(wide, kind, monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    plain, scored = load(wide, kind), load(wide, kind)
    score_of(scored)
    for loaded in (plain, scored):
        learn(loaded)
    score_of(scored)
    for loaded in (plain, scored):
        learn(loaded)
    assert sha256(read_adapter(plain)) == sha256(read_adapter(scored))


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_give_the_same_gradients(wide, kind):
    found = []
    for recompute in (False, True):
        loaded = load(wide, kind, gradient_checkpointing=recompute)
        with torch.no_grad():
            for parameter in loaded.parameters.values():  # the second factors begin at zero
                parameter.add_(0.1)
        passes: list[int] = []
        first = loaded.model.get_base_model().model.layers[0].mlp.gate_proj
        first.register_forward_pre_hook(lambda *_, seen=passes: seen.append(1))
        loaded.model.train()
        INSTRUCT.loss(loaded, batch_of(loaded)).loss_sum.backward()
        assert len(passes) == (2 if recompute else 1)
        found.append({n: p.grad for n, p in loaded.parameters.items()})
    assert all(g.abs().max() > 1e-3 for g in found[0].values())
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_answers_as_a_plain_greedy_loop_does(wide, kind):
    loaded = load(wide, kind)
    (ids,) = encode(loaded, ["What is flu?"])
    (got,) = complete(loaded, [ids], max_new_tokens=6)
    row = list(ids)
    with torch.inference_mode():
        while len(row) < len(ids) + 6:
            token = int(loaded.model(input_ids=torch.tensor([row])).logits[0, -1].argmax())
            if token in end_tokens(loaded):
                break
            row.append(token)
    assert got.num_tokens == len(row) - len(ids) > 0
    assert got.text == loaded.tokenizer.decode(row[len(ids) :], skip_special_tokens=True)


SIZES = {
    "bert": {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2},
    "distilbert": {"dim": 64, "hidden_dim": 64, "n_heads": 2},
}


@pytest.mark.parametrize(
    ("family", "kind"), [("bert", "nf4"), ("bert", "int8"), ("distilbert", "fp4")]
)
def test_head_and_new_pooler_of_a_quantised_encoder_are_float32_and_learn(tmp_path, family, kind):
    folder = build_encoder(tmp_path, family)
    labels = ("no", "yes")
    adapter = AdapterConfig(rank=2, targets=("q_lin",) if family == "distilbert" else ("query",))
    model = ModelConfig(name=str(folder), dtype="float32", quantization=kind)
    loaded = load_model(model, adapter, seed=1, device="cpu", labels=labels)
    other = {"bert": "pooler", "distilbert": "pre_classifier"}[family]
    for part in ("classifier", other):
        assert any(f".{part}." in f".{name}" for name in loaded.head)
    assert {p.dtype for p in loaded.parameters.values()} == {torch.float32}
    packed = [p for p in loaded.model.parameters() if not p.dtype.is_floating_point]
    assert len(packed) == 6
    assert all(not p.requires_grad for p in packed)
    task, before, first = classify(labels), read_adapter(loaded), base_bytes(loaded)
    rows = [{"text": "a" * n, "label": labels[n % 2]} for n in range(1, 9)]
    batch = task.collate(task.prepare(rows, loaded.tokenizer, 32).examples)
    context = LocalContext(before, {}, {})
    steps, cfg = [[batch]] * 3, TrainConfig()
    train(loaded, steps, task, cfg, LocalRule(), context, round_=1, lr=1e-2, seed=5)
    after = read_adapter(loaded)
    assert all(not torch.equal(after[name], before[name]) for name in loaded.head)
    assert base_bytes(loaded) == first


def build_encoder(folder: Path, family: str) -> Path:
    """One layer, as saved after pretraining on masked words: with neither head nor pooler."""
    import transformers

    tokenizer = build_encoder_tokenizer(family)
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        **{"n_layers" if family == "distilbert" else "num_hidden_layers": 1},
        **SIZES[family],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- runs


def test_a_run_on_a_quantised_base_loads_it_once_and_leaves_float32(tmp_path, wide):
    recipe = write_tiny_recipe(tmp_path, wide)
    loads = num_base_loads()
    changes = ["model.quantization=nf4", "rounds=2"]
    done = silotune.run(recipe, changes, out=tmp_path / "run")
    assert num_base_loads() == loads + 1
    assert done.summary["base_model_loads"] == 1
    assert len(done.summary["clients"]) == 3
    assert done.config.model.quantization == "nf4"
    assert {t.dtype for t in done.adapter().values()} == {torch.float32}
    losses = done.summary["overall"]
    assert losses["federated_loss"] < losses["base_loss"]
    loaded = done.load()
    assert loaded.quantization == "nf4"
    assert sha256(read_adapter(loaded)) == sha256(done.adapter())


def test_clients_of_one_round_may_hold_the_base_in_different_numbers(tmp_path, wide):
    run = load_recipe(write_tiny_recipe(tmp_path, wide))
    rows = load_clients(run.data, run.partition, seed=run.seed)
    algorithm = fedavg(FedAvgConfig())
    adapter = read_adapter(load_model(run.model, run.adapter, seed=run.seed, device="cpu"))
    state = ServerState(0, adapter)
    machines = {
        "hospital-0": {"quantization": "nf4"},
        "hospital-1": {"quantization": "none", "dtype": "float32"},
        "hospital-2": {"quantization": "int8", "dtype": "bfloat16"},
    }
    stations = {}
    for name, machine in machines.items():
        own = ClientConfig.model_validate(
            {
                "name": name,
                "model": str(wide),
                "data": {"path": run.data.path},
                "runtime": {"device": "cpu", "threads": 1, **machine},
            }
        )
        place = Place(own_recipe(run, own), rows.__getitem__, lambda name: tmp_path / name)
        stations[name] = Station(place)
    reports = [stations[n].answer("query", n, Parcel({})).about["report"] for n in stations]
    assert len({report["base_sha256"] for report in reports}) == 1
    assert [r["dtype"] for r in reports] == ["torch.float32", "torch.float32", "torch.bfloat16"]
    assert [s.worker.loaded.quantization for s in stations.values()] == ["nf4", "none", "int8"]

    def ask(kind: str, name: str, broadcast: Broadcast) -> Update | Score:
        about = stations[name].answer(kind, name, wire.encode_broadcast(broadcast))
        told = {k: v for k, v in about.about.items() if k != "process"}
        return wire.decode_answer(Parcel(told, about.values), name, bytes_down=0)

    first = [ask("evaluate", name, Broadcast(1, state.adapter)) for name in stations]
    assert len({score.loss_sum / score.num_tokens for score in first}) == 3
    updates = [ask("train", name, Broadcast(1, state.adapter)) for name in stations]
    assert {t.dtype for update in updates for t in update.delta.values()} == {torch.float32}
    state = algorithm.step(state, algorithm.combine(state, updates))
    counts = [update.num_examples for update in updates]
    for name, tensor in state.adapter.items():
        mean = sum(u.delta[name] * n for u, n in zip(updates, counts, strict=True)) / sum(counts)
        torch.testing.assert_close(tensor, adapter[name] + mean)
    for before, name in zip(first, stations, strict=True):
        after = ask("evaluate", name, Broadcast(2, state.adapter))
        assert after.loss_sum < before.loss_sum, name


# --- what is refused, before a model is loaded


@pytest.mark.parametrize(("short", "kind"), [(4, "nf4"), (8, "int8")])
def test_4_and_8_are_short_for_nf4_and_int8(short, kind):
    assert ModelConfig(quantization=short).quantization == kind
    run = load_recipe("hospitals", [f"model.quantization={short}"])
    assert run.model.quantization == kind


@pytest.mark.parametrize("wrong", [True, False, 16, 0, "4", 4.0, "NF4", "q4_k_m", None, [4]])
def test_other_short_forms_are_not_guessed_at(wrong):
    with pytest.raises(ValidationError, match="'none', 'nf4', 'fp4' or 'int8'"):
        ModelConfig(quantization=wrong)


@pytest.fixture
def recipe(tmp_path):
    """The tiny recipe with changes, on a model without weights: loading it would fail."""
    folder = tmp_path / "no-weights"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    path = write_tiny_recipe(tmp_path, folder)

    def build(**changes):
        table = load_recipe(path).model_dump(
            mode="json", exclude_none=True, exclude_unset=True, serialize_as_any=True
        )
        return parse(changed(table, changes))

    return build


def test_weights_that_are_quantised_cannot_all_learn(recipe):
    with pytest.raises(ConfigError) as caught:
        recipe(model__quantization="nf4", adapter={"kind": "full"})
    assert "model.quantization: cannot be used with adapter.kind = 'full'" in str(caught.value)


def test_the_apple_gpu_is_refused_by_name():
    check_quantization("none", torch.device("mps"), "model.quantization")
    with pytest.raises(
        ConfigError, match=r"^runtime.quantization = 'nf4': .*Apple's GPU"
    ) as caught:
        check_quantization("nf4", torch.device("mps"), "runtime.quantization")
    assert "runtime.device = 'cpu'" in str(caught.value)


@pytest.fixture
def without_bitsandbytes(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name)
    )


@pytest.mark.usefixtures("without_bitsandbytes")
def test_a_missing_bitsandbytes_is_told_with_the_command_that_installs_it(recipe, wide):
    check(recipe())
    text = r"'int8' needs bitsandbytes[\s\S]*make env EXTRAS=quantization"
    with pytest.raises(ConfigError, match=text):
        check(recipe(model__quantization="int8"))
    loads = num_base_loads()
    with pytest.raises(ConfigError, match=text):
        load(wide, "int8")
    assert num_base_loads() == loads


def test_dora_on_eight_bits_is_refused_on_a_processor(recipe):
    check(recipe(model__quantization="nf4", adapter__dora=True))
    with pytest.raises(ConfigError, match=r"adapter.dora cannot .*'int8'[\s\S]*'nf4', or adapter"):
        check(recipe(model__quantization=8, adapter__dora=True))


@pytest.mark.parametrize("method", ["LOHA", "TINYLORA", "DELORA"])
def test_a_method_of_pefts_that_cannot_run_on_packed_weights_is_refused_by_name(wide, method):
    adapter = AdapterConfig(kind="peft", targets=("q_proj",), peft={"peft_type": method})
    with pytest.raises(ModelError, match=rf"adapter[\s\S]*'{method}'"):
        load(wide, "nf4", adapter)


# --- optimizers


@pytest.mark.parametrize(
    ("device", "wanted", "found", "notice"),
    [
        ("cpu", "adamw", "adamw", ""),
        ("mps", "sgd", "sgd", ""),
        ("cpu", "adamw_8bit", "adamw_8bit", ""),
        ("cpu", "paged_adamw_8bit", "adamw_8bit", "only pages GPU memory; using adamw_8bit"),
        ("cpu", "paged_adamw_32bit", "adamw", "only pages GPU memory; using adamw"),
        ("cuda", "adamw_8bit", "adamw_8bit", ""),
        ("cuda", "paged_adamw_8bit", "paged_adamw_8bit", ""),
        ("cuda", "paged_adamw_32bit", "paged_adamw_32bit", ""),
        ("mps", "adamw_8bit", "adamw", "is not available on Apple GPUs; using adamw"),
        ("mps", "paged_adamw_32bit", "adamw", "is not available on Apple GPUs; using adamw"),
    ],
)
def test_where_a_device_lacks_an_optimizer_the_nearest_is_taken(device, wanted, found, notice):
    expected = f"train.optimizer = '{wanted}' {notice}" if notice else ""
    assert pick_optimizer(wanted, torch.device(device)) == (found, expected)


@pytest.mark.usefixtures("without_bitsandbytes")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_without_bitsandbytes_adamw_is_taken(device):
    for wanted in ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"):
        found, notice = pick_optimizer(wanted, torch.device(device))
        assert found == "adamw"
        assert notice == f"train.optimizer = '{wanted}' needs bitsandbytes; using adamw"
    assert pick_optimizer("sgd", torch.device(device)) == ("sgd", "")


def ten_steps(kind: str):
    """A tensor of 4096 values and one of 16, after ten steps of noise, and the optimizer."""
    gen = torch.Generator().manual_seed(5)
    large, small = (torch.nn.Parameter(torch.randn(*s, generator=gen)) for s in ((64, 64), (16,)))
    cfg = TrainConfig(optimizer=kind, weight_decay=0.1)
    optimizer = build_optimizer([large, small], cfg, 1e-2, fused=False, device=CPU)
    first = large.detach().clone()
    for _ in range(10):
        for parameter in (large, small):
            parameter.grad = torch.randn(parameter.shape, generator=gen)
        optimizer.step()
    return (large.detach() - first, large.detach(), small.detach()), optimizer.state[large]


def test_eight_bit_moments_stay_near_those_of_adamw():
    (exact, _, exact_small), _ = ten_steps("adamw")
    (near, _, near_small), state = ten_steps("adamw_8bit")
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    assert state["state1"].numel() == 4096
    assert 0 < float((near - exact).norm() / exact.norm()) < 0.05
    # fewer than 4096 values keep moments of 32 bits: nothing to save there
    torch.testing.assert_close(near_small, exact_small, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("paged", "plain"), [("paged_adamw_8bit", "adamw_8bit"), ("paged_adamw_32bit", "adamw")]
)
def test_on_a_processor_paged_optimizers_are_the_plain_ones_and_check_says_so(recipe, paged, plain):
    for ours, theirs in zip(ten_steps(paged)[0], ten_steps(plain)[0], strict=True):
        assert torch.equal(ours, theirs)
    (warning,) = check(recipe(train__optimizer=paged)).warnings
    assert warning == f"train.optimizer = '{paged}' only pages GPU memory; using {plain}"
    assert check(recipe(train__optimizer=plain)).warnings == []
