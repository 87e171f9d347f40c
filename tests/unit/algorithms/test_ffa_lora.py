"""FFA-LoRA: what keeps its first value, what is sent, and that its mean is exact.

The arithmetic is on whole numbers whose weights add up to a power of two, so that float64 holds
every product and every mean without rounding, and "exact" means equal to the last bit.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.algorithms.ffa_lora import FFALoRAConfig, ffa_lora
from silotune.core.algorithm import expected_layout, keep_local
from silotune.core.errors import ConfigError, UpdateError
from silotune.core.tree import add, layout_of, size_bytes
from silotune.core.types import Broadcast, ServerState, Update
from silotune.data.client_rows import ClientRows
from silotune.federation.acceptance import Known, check_update, what_is_expected
from silotune.federation.client import Worker, train_round
from silotune.federation.client_memory import ClientMemory
from silotune.federation.client_privacy import Protection
from silotune.federation.prepared_rows import prepare_client
from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig
from silotune.models.loading import load_model, read_adapter, write_adapter
from silotune.recipes.arms import federated_arms
from silotune.recipes.parse import parse
from silotune.training.tasks import build_task
from silotune.training.tasks.instruct import INSTRUCT, collate
from tests.conftest import changed
from tests.tiny_encoders import build_tiny_encoder

A, B, HEAD = "layers.0.lora_A.weight", "layers.0.lora_B.weight", "score.weight"
FEDAVG, FFA = fedavg(FedAvgConfig()), ffa_lora(FFALoRAConfig())


# --- the server's arithmetic


def product(adapter):
    return adapter[B] @ adapter[A]  # (d_out, d_in)


def play(algorithm, state, updates):
    return algorithm.step(state, algorithm.combine(state, updates))


def without_a(updates):
    return [replace(u, delta={B: u.delta[B]}) for u in updates]


def shares(updates):
    total = sum(u.num_examples for u in updates)
    return [u.num_examples / total for u in updates]


def whole(*shape):
    """A float64 matrix of whole numbers."""
    size = shape[0] * shape[1]
    values = st.lists(st.integers(-999, 999), min_size=size, max_size=size)
    return values.map(lambda v: torch.tensor(v, dtype=torch.float64).reshape(shape))


@st.composite
def rounds(draw):
    """A state of rank 2 and what one to four clients answer; examples add up to a power of two."""
    state = ServerState(3, {A: draw(whole(2, 3)), B: draw(whole(4, 2))})
    cuts = sorted(draw(st.sets(st.integers(1, 63), max_size=3)))
    sizes = [end - begin for begin, end in zip([0, *cuts], [*cuts, 64], strict=True)]
    updates = [
        Update(f"c{i}", 4, {A: draw(whole(2, 3)), B: draw(whole(4, 2))}, n, {})
        for i, n in enumerate(sizes)
    ]
    return state, updates


@given(rounds())
def test_the_product_of_the_mean_is_the_mean_of_the_products_to_the_last_bit(played):
    state, updates = played
    after = play(FFA, state, without_a(updates)).adapter
    products = [(state.adapter[B] + u.delta[B]) @ state.adapter[A] for u in updates]
    pairs = zip(shares(updates), products, strict=True)
    mean = torch.stack([p * t for p, t in pairs]).sum(0)
    assert torch.equal(product(after), mean)
    assert torch.equal(after[A], state.adapter[A])


@given(rounds())
def test_fedavg_misses_the_mean_product_by_the_covariance_of_the_factors(played):
    state, updates = played
    after = play(FEDAVG, state, updates).adapter
    held = [add(state.adapter, u.delta) for u in updates]
    pairs = list(zip(shares(updates), held, strict=True))
    missing = torch.stack([p * product(f) for p, f in pairs]).sum(0) - product(after)
    spread = [p * (f[B] - after[B]) @ (f[A] - after[A]) for p, f in pairs]
    assert torch.equal(missing, torch.stack(spread).sum(0))


def test_two_opposite_clients_by_hand():
    # FedAvg, from A = 1 and B = 0: north ends at 2 * 1 and south at 0 * -1, on average at 1, but
    # the mean factors are A = 1 and B = 0. With A frozen they end at 1 and at -1.
    one = torch.ones(1, 1, dtype=torch.float64)
    state = ServerState(0, {A: one, B: 0 * one})
    updates = [Update("north", 1, {A: one, B: one}, 1, {})]
    updates += [Update("south", 1, {A: -one, B: -one}, 1, {})]
    assert product(play(FEDAVG, state, updates).adapter).item() == 0.0
    updates[0] = replace(updates[0], num_examples=3)  # 3/4 of 1 and 1/4 of -1
    assert product(play(FFA, state, without_a(updates)).adapter).item() == 0.5


@given(rounds(), st.sampled_from([0.25, 0.5, 2.0]))
def test_server_lr_scales_the_mean_step_of_the_product(played, server_lr):
    state, updates = played[0], without_a(played[1])
    after = play(ffa_lora(FFALoRAConfig(server_lr=server_lr)), state, updates).adapter
    step = product(play(FFA, state, updates).adapter) - product(state.adapter)
    assert torch.equal(product(after) - product(state.adapter), server_lr * step)


def test_uniform_weights_give_every_client_the_same_say():
    one = torch.ones(1, 1, dtype=torch.float64)
    updates = [Update("c0", 1, {B: 2 * one}, 1, {}), Update("c1", 1, {B: -4 * one}, 99, {})]
    algorithm = ffa_lora(FFALoRAConfig(weights="uniform"))
    after = play(algorithm, ServerState(0, {A: one, B: one}), updates).adapter
    assert after[B].item() == 0.0


# --- which tensors learn


@pytest.mark.parametrize(
    ("name", "learns"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", False),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight", True),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", True),
        ("base_model.model.model.embed_tokens.lora_embedding_A", True),
        ("base_model.model.model.embed_tokens.lora_embedding_B", False),
        ("base_model.model.score.weight", True),
        ("my_lora_Adapter.weight", True),
    ],
)
def test_of_two_factors_the_randomly_initialised_one_is_frozen(name, learns):
    assert all(FFA.local.trains(name, round_) == learns for round_ in (1, 2, 7))


def test_an_adapter_without_the_two_factors_is_refused_before_training():
    for names in ([A], [B], ["ia3_l"], [HEAD], ["x.lora_embedding_A", B]):
        with pytest.raises(ConfigError, match=r"adapter does not have both.\n  Set adapter.kind"):
            FFA.init(dict.fromkeys(names, torch.zeros(1)), 3)
    assert FFA.init({A: torch.zeros(1), B: torch.zeros(1)}, 3) == {}


def test_the_server_refuses_an_update_that_contains_a():
    adapter = {A: torch.ones(2, 3), B: torch.zeros(4, 2), HEAD: torch.zeros(2)}
    state = ServerState(0, adapter)
    assert expected_layout(FFA, state) == layout_of({n: adapter[n] for n in (B, HEAD)})
    expected = what_is_expected(FFA, state, ["north"], known_of(recipe(), ["north"]))
    good = {n: torch.ones_like(adapter[n]) for n in (B, HEAD)}
    check_update(Update("north", 1, good, 4, {}), expected, {"north"})
    bad = Update("north", 1, {**good, A: torch.zeros(2, 3)}, 4, {})  # though it did not move
    with pytest.raises(UpdateError, match=rf"client 'north', round 1: tensor '{A}' is unknown"):
        check_update(bad, expected, {"north"})


# --- rounds of real clients on tiny models


def recipe(**changes):
    table = {
        "rounds": 3,
        "data": {"path": "rows.jsonl"},
        "algorithm": {"name": "ffa_lora"},
        "adapter": {"rank": 2, "alpha": 4},
        "train": {"batch_size": 4, "local_steps": 2, "lr": 1e-2, "max_length": 128},
    }
    return parse(changed(table, changes))


def known_of(run, clients):
    return Known(run, lambda: {key: {"num_train": 6, "num_eval": 2} for key in clients})


def rows_of(client, task="instruct"):
    if task == "classify":
        row = [{"text": f"{client} film {i}", "label": ("bad", "good")[i % 2]} for i in range(8)]
    else:
        row = [
            (
                {"role": "user", "content": f"{client} {i}?"},
                {"role": "assistant", "content": client * (1 + i % 3)},
            )
            for i in range(8)
        ]
    return ClientRows(client, tuple(row[:6]), tuple(row[6:]))


def worker_of(run, model, algorithm=FFA):
    labels = ("bad", "good") if run.task == "classify" else ()
    model = ModelConfig(name=str(model), dtype="float32")
    loaded = load_model(model, run.adapter, seed=1, device="cpu", labels=labels)
    if run.adapter.head == "local":
        algorithm = keep_local(algorithm, loaded.head)
    return Worker(loaded, build_task(run.task, labels), run, algorithm)


def play_rounds(worker, *, rounds=3, clients=("north", "south")):
    """Rounds as the product runs them, without a disk.

    Yields each update with the state it answers and the adapter left at the client; then the end.
    """
    run, algorithm, memories = worker.run, worker.algorithm, {}
    adapter = read_adapter(worker.loaded)
    state = ServerState(0, adapter, algorithm.init(adapter, len(clients)))
    data = [prepare_client(rows_of(name, run.task), worker) for name in clients]
    for round_ in range(1, rounds + 1):
        expected, updates = what_is_expected(algorithm, state, clients, known_of(run, clients)), []
        message = Broadcast(round_, state.adapter, score=False)
        for own in data:
            memory = memories.get(own.name, ClientMemory())
            hidden = Protection(run, own.name, round_, plan=None)
            update, memories[own.name] = train_round(worker, own, message, memory, hidden)
            updates.append(check_update(update, expected, {own.name}))
            yield updates[-1], state, read_adapter(worker.loaded)
        state = play(algorithm, state, updates)
    yield None, state, read_adapter(worker.loaded)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_stays_bit_for_bit_at_server_and_clients_and_only_b_is_sent(tiny_model, optimizer):
    run = recipe(train__optimizer=optimizer, train__weight_decay=0.1, adapter__dropout=0.1)
    worker = worker_of(run, tiny_model)
    first = read_adapter(worker.loaded)
    frozen = {n for n in first if "lora_A" in n}
    assert all(bool((first[n] != 0).all()) for n in frozen)
    sent = {n: t for n, t in first.items() if n not in frozen}
    answers = list(play_rounds(worker))
    for update, state, at_client in answers:
        assert all(torch.equal(state.adapter[n], first[n]) for n in frozen)
        assert all(torch.equal(at_client[n], first[n]) for n in frozen)
        if update is not None:
            assert update.delta.keys() == sent.keys()
            assert update.bytes_up == size_bytes(sent)
            assert update.bytes_down == size_bytes(first), "A comes down with every broadcast"
    state = answers[-1][1]
    assert all(not torch.equal(state.adapter[n], first[n]) for n in sent)
    assert state.round == 3


def test_one_client_and_one_step_are_plain_training_with_a_frozen(tiny_model):
    run = recipe(
        rounds=1,
        train__optimizer="sgd",
        train__clip_norm=0.0,
        train__local_steps=1,
        train__batch_size=6,
        train__lr=0.5,
    )
    worker = worker_of(run, tiny_model)
    gen = torch.Generator().manual_seed(4)
    start = {  # B away from zero, so that A has a gradient too
        n: t + 0.1 * torch.randn(t.shape, generator=gen)
        for n, t in read_adapter(worker.loaded).items()
    }
    write_adapter(worker.loaded, start)
    *_, (_, state, _) = play_rounds(worker, rounds=1, clients=("only",))

    write_adapter(worker.loaded, start)
    params = worker.loaded.parameters
    for p in params.values():
        p.requires_grad_(True)
    examples = INSTRUCT.prepare(rows_of("only").train, worker.loaded.tokenizer, 128).examples
    batch = collate(examples)
    loss = INSTRUCT.loss(worker.loaded, batch).loss_sum / batch.num_trained
    gradients = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
    for name, before in start.items():
        assert float(gradients[name].norm()) > 0
        moved = 0.0 if "lora_A" in name else 0.5
        expected = before - moved * gradients[name]
        torch.testing.assert_close(state.adapter[name], expected, rtol=1e-5, atol=1e-7)


def test_steps_with_clipping_and_adamw_are_torchs_own_with_a_frozen(tiny_model):
    run = recipe(train__clip_norm=0.05, train__batch_size=6, train__local_steps=3)
    worker = worker_of(run, tiny_model)
    start = read_adapter(worker.loaded)
    *_, (_, state, _) = play_rounds(worker, rounds=1, clients=("only",))

    write_adapter(worker.loaded, start)
    params = worker.loaded.parameters
    learning = [p.requires_grad_("lora_A" not in n) for n, p in params.items()]
    learning = [p for p in learning if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2, weight_decay=0.0)
    examples = INSTRUCT.prepare(rows_of("only").train, worker.loaded.tokenizer, 128).examples
    batch = collate(examples)  # all rows in every step, so their order does not matter
    for _ in range(3):
        optimizer.zero_grad()
        (INSTRUCT.loss(worker.loaded, batch).loss_sum / batch.num_trained).backward()
        nn.utils.clip_grad_norm_(learning, 0.05)
        optimizer.step()
    for name, p in params.items():
        torch.testing.assert_close(state.adapter[name], p.detach(), rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return build_tiny_encoder(tmp_path_factory.mktemp("encoder") / "bert")


@pytest.mark.parametrize("head", ["train", "freeze", "local"])
def test_a_classification_head_is_sent_with_b_if_the_recipe_says_so(encoder, head):
    run = recipe(task="classify", adapter__head=head, data__labels=["bad", "good"])
    worker = worker_of(run, encoder)
    first, own = read_adapter(worker.loaded), worker.loaded.head
    frozen = {n for n in first if "lora_A" in n}
    stays = frozen | (own if head == "local" else set())
    assert bool(own) == (head != "freeze")
    *answers, (_, state, _) = play_rounds(worker, rounds=2)
    assert all(u is not None and u.delta.keys() == first.keys() - stays for u, _, _ in answers)
    for name, tensor in first.items():
        assert torch.equal(state.adapter[name], tensor) == (name in stays), name


def test_for_an_embedding_the_factor_that_starts_at_zero_is_trained(encoder):
    more = {"adapter__targets": ["word_embeddings"], "adapter__head": "freeze"}
    run = recipe(task="classify", data__labels=["bad", "good"], **more)
    worker = worker_of(run, encoder)
    first = read_adapter(worker.loaded)
    moves = {n for n in first if n.endswith("lora_embedding_A")}
    assert len(first) == 2
    assert len(moves) == 1
    assert all(bool((t == 0).all()) == (n in moves) for n, t in first.items())
    *_, (_, state, _) = play_rounds(worker, rounds=1)
    assert {n for n, t in first.items() if not torch.equal(t, state.adapter[n])} == moves


# --- contradictions


@pytest.mark.parametrize(
    "adapter",
    [
        {"kind": "full"},
        {"kind": "ia3"},
        {"kind": "prompt"},
        {"kind": "prefix"},
        {"kind": "peft", "peft": {"peft_type": "LOHA"}},
    ],
    ids=lambda a: a["kind"],
)
def test_other_kinds_of_adapter_are_refused(adapter):
    said = (
        f"adapter.kind: '{adapter['kind']}' cannot be used with algorithm 'ffa_lora', which works "
        "on LoRA's two factors; use lora"
    )
    with pytest.raises(ConfigError) as error:
        recipe(adapter=adapter)
    assert said in str(error.value)
    arm = {"algorithm": {"name": "fedavg"}, "compare": {"algorithms": ["ffa_lora"]}}
    with pytest.raises(ConfigError) as error:
        recipe(adapter=adapter, **arm)
    assert said in str(error.value)
    recipe(adapter=adapter, algorithm={"name": "fedavg"})


def test_dora_is_refused_because_its_mean_would_not_be_exact():
    said = r"adapter.dora: cannot be used with algorithm 'ffa_lora': DoRA is not linear in the"
    with pytest.raises(ConfigError, match=said):
        recipe(adapter__dora=True)


def test_an_arm_of_a_comparison_that_trains_all_weights_is_refused_by_its_name():
    run = recipe(compare={"arms": {"all": {"adapter": {"kind": "full"}}}})
    with pytest.raises(ConfigError, match=r"compare.arms.all(.|\n)*'full' cannot be used"):
        federated_arms(run)
    fixed = {"adapter": {"kind": "full"}, "algorithm": {"name": "fedavg"}}
    assert len(federated_arms(recipe(compare={"arms": {"all": fixed}}))) == 2


def test_options_that_keep_the_two_factors_are_allowed():
    kept = {"rslora": True, "peft": {"init_lora_weights": "orthogonal"}}
    assert recipe(adapter=kept).adapter == AdapterConfig(**kept)
