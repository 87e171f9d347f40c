"""FedSA-LoRA: A is shared and B never travels; on tensors, in seconds.

Whole runs are in tests/integration/test_personal.py.
"""

import pytest
import torch

from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.algorithms.fedsa_lora import FedSALoRAConfig, fedsa_lora
from silotune.core.algorithm import expected_layout
from silotune.core.errors import ConfigError, UpdateError
from silotune.core.seeds import generator
from silotune.core.tree import layout_of, sha256
from silotune.core.types import ServerState, Update
from silotune.federation.acceptance import Expected, Known, check_update
from silotune.recipes.parse import parse

A, B, HEAD = "layers.0.lora_A.weight", "layers.0.lora_B.weight", "score.weight"
FEDAVG, FEDSA = fedavg(FedAvgConfig()), fedsa_lora(FedSALoRAConfig())
START = {A: torch.tensor([[1.0, -2.0, 3.0]]), B: torch.zeros(2, 1), HEAD: torch.ones(2)}


@pytest.mark.parametrize(
    ("name", "stays"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", False),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight", True),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", True),
        ("base_model.model.model.embed_tokens.lora_embedding_A", True),
        ("base_model.model.model.embed_tokens.lora_embedding_B", False),
        ("base_model.model.score.weight", False),
        ("my_lora_B_like.weight", False),
    ],
)
def test_what_starts_at_zero_is_trained_in_every_round_and_stays(name, stays):
    assert all(FEDSA.local.trains(name, round_) for round_ in (1, 2, 7))
    assert FEDSA.local.personal(name) == stays


def test_a_and_the_head_are_averaged_and_the_servers_b_stays_zero():
    deltas = {"north": ([[4.0, 0.0, -4.0]], 3), "south": ([[0.0, 8.0, 4.0]], 1)}
    updates = [
        Update(name, 1, {A: torch.tensor(a), HEAD: torch.full((2,), 4.0)}, num, {})
        for name, (a, num) in deltas.items()
    ]
    state = ServerState(0, START, FEDSA.init(START, 2))
    after = FEDSA.step(state, FEDSA.combine(state, updates)).adapter
    assert after[A].tolist() == [[4.0, 0.0, 1.0]]  # by hand: 1 + 3, -2 + 2, 3 - 3 + 1
    assert after[HEAD].tolist() == [5.0, 5.0]
    assert torch.equal(after[B], START[B]), "a new client begins with A and B = 0"
    plain = FEDAVG.step(state, FEDAVG.combine(state, updates)).adapter
    assert sha256(after) == sha256(plain), "the server side is FedAvg's on what is sent"


def test_the_server_refuses_an_update_that_contains_b():
    state = ServerState(0, START)
    assert expected_layout(FEDSA, state) == layout_of({n: START[n] for n in (A, HEAD)})
    run = parse({"rounds": 1, "data": {"path": "rows.jsonl"}, "algorithm": {"name": "fedsa_lora"}})
    known = Known(run, lambda: {"north": {"num_train": 6, "num_eval": 2}})
    layouts = {"north": expected_layout(FEDSA, state)}
    expected = Expected(1, ["north"], layouts, {"north": {}}, {}, known)
    good = {n: torch.ones_like(START[n]) for n in (A, HEAD)}
    check_update(Update("north", 1, good, 4, {}), expected, {"north"})
    leak = Update("north", 1, {**good, B: torch.zeros(2, 1)}, 4, {})
    with pytest.raises(UpdateError, match=rf"client 'north', round 1: tensor '{B}' is unknown"):
        check_update(leak, expected, {"north"})


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"runtime": {"name": "flower"}},
            "'fedsa_lora' cannot be used with runtime.name = 'flower",
        ),
        ({"checkpoint": {"keep": "best"}}, "'best' cannot be used with algorithm.name = 'fedsa_lo"),
        ({"evaluate": {"server_path": "t.jsonl"}}, "without a factor B to score with"),
        ({"server": {"work": "fine-tune", "data_path": "s"}}, "without a factor B to train with"),
        ({"adapter": {"kind": "ia3"}}, "which works on LoRA's two factors"),
        ({"adapter": {"dora": True}}, "DoRA is not linear"),
    ],
    ids=str,
)
def test_what_needs_a_complete_model_is_refused(changes, why):
    recipe = {"rounds": 1, "data": {"path": "rows.jsonl"}, "algorithm": {"name": "fedsa_lora"}}
    with pytest.raises(ConfigError, match=why):
        parse({**recipe, **changes})


def test_an_arm_that_keeps_b_needs_a_server_without_work():
    recipe = {"rounds": 1, "data": {"path": "r"}, "compare": {"algorithms": ["fedsa_lora"]}}
    parse(recipe)
    with pytest.raises(ConfigError, match=r"compare\.algorithms\.0: 'fedsa_lora' leaves the serv"):
        parse({**recipe, "server": {"work": "fine-tune", "data_path": "s"}})


# --- the toy: clients that answer the same question differently

CLIENTS, ROWS, D_IN, D_OUT, RANK = 6, 12, 24, 4, 2
ROUNDS, STEPS, LR = 150, 5, 0.05


def own_errors(algorithm, *, alone=False):
    """Each client's relative error |B A - W_i| / |W_i| with its own B where it keeps one.

    W_i = L_i R: the clients share the 2 directions R of x that matter, and each maps them to an
    answer of its own. No client has enough rows to find R by itself. With seed 5 the mean errors
    are 0.015 (own B), 0.98 (one B for all) and 0.82 (alone).
    """

    def normal(purpose, *shape):
        return torch.randn(*shape, generator=generator(5, purpose), dtype=torch.float64)

    shared = torch.linalg.qr(normal("R", D_IN, RANK))[0].T
    maps = [normal(f"L {i}", D_OUT, RANK) for i in range(CLIENTS)]
    rows = [normal(f"x {i}", ROWS, D_IN) for i in range(CLIENTS)]
    first = {A: normal("A", RANK, D_IN) / D_IN**0.5, B: torch.zeros(D_OUT, RANK).double()}
    state, kept = ServerState(0, first), [dict[str, torch.Tensor]() for _ in range(CLIENTS)]
    for _ in range(ROUNDS):
        updates = []
        for i, x in enumerate(rows):
            received = {**state.adapter, **kept[i]}
            now = dict(received)
            for _ in range(STEPS):
                slope = (now[B] @ now[A] - maps[i] @ shared) @ x.T @ x / ROWS
                step = {A: now[B].T @ slope, B: slope @ now[A].T}
                now = {n: now[n] - LR * step[n] for n in now}
            kept[i] = {n: t for n, t in now.items() if alone or algorithm.local.personal(n)}
            sent = {n: now[n] - received[n] for n in now if not algorithm.local.personal(n)}
            updates.append(Update(f"c{i}", 1, sent, ROWS, {}))
        state = algorithm.step(state, algorithm.combine(state, updates))
    held = [{**state.adapter, **own} for own in kept]
    wanted = [left @ shared for left in maps]
    return [
        float((own[B] @ own[A] - w).norm() / w.norm()) for own, w in zip(held, wanted, strict=True)
    ]


def test_clients_with_other_answers_need_a_b_of_their_own_and_gain_by_a_shared_a():
    personal, common, alone = own_errors(FEDSA), own_errors(FEDAVG), own_errors(FEDAVG, alone=True)
    assert max(personal) < 0.1 * min(common), "one B cannot give two answers"
    assert max(personal) < 0.1 * min(alone), "R takes the rows of several clients"
