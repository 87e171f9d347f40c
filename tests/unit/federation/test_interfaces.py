"""What the interfaces of a round support besides FedAvg, shown by algorithms written in this file.

Clients of different ranks receive and send tensors of different shapes; updates that nobody may
read are accepted by other rules. Neither requires a change to `run_rounds`.
"""

from dataclasses import replace

import pytest
import torch

from silotune.algorithms.base import weight_of
from silotune.algorithms.fedavg import FedAvgConfig, fedavg, move
from silotune.core.errors import QuorumError
from silotune.core.seeds import generator
from silotune.core.tree import check_same_layout, layout_of, sha256
from silotune.core.types import Change, ServerState, TensorSpec, Update
from silotune.federation.acceptance import accept_updates
from silotune.federation.progress import Progress
from silotune.federation.rounds import run_rounds
from silotune.federation.run_folder import RunFolder
from silotune.recipes.parse import parse

A, B = "layers.0.lora_A", "layers.0.lora_B"
START = {A: torch.arange(12.0).reshape(4, 3) / 8, B: torch.zeros(2, 4)}
FEDAVG = FedAvgConfig(weights="uniform")
ROUNDS = 3


def play(place, algorithm, clients, **more):
    table = {"rounds": ROUNDS, "data": {"path": "medquad_mini"}, "evaluate": {"every": 0}}
    table["sampling"] = {"quorum": 1.0}
    run = parse({**table, "algorithm": {"weights": "uniform"}})
    state = ServerState(0, START, algorithm.init(START, len(clients.names())))
    folder = RunFolder.create(place, run)
    parts = {"clients": clients, "folder": folder, "progress": Progress(), **more}
    return run_rounds(run, state, algorithm=algorithm, **parts), folder


def drawn(name, round_, like):
    gen = generator(5, "delta", name, round_)
    return {key: torch.randn(t.shape, generator=gen) for key, t in like.items()}


class Clients:
    """Each client answers with a change drawn from its name, in the shapes that it received."""

    def __init__(self, *names):
        self._names, self.received = sorted(names), {}

    def names(self):
        return self._names

    def num_rows(self):
        return {name: {"num_train": 1, "num_eval": 0} for name in self.names()}

    def train(self, messages):
        for name, broadcast in reversed(messages.items()):
            self.received[name, broadcast.round] = broadcast.adapter
            yield self.update(name, broadcast)

    def evaluate(self, messages):
        return iter(())

    def update(self, name, broadcast):
        delta = self.delta(name, broadcast)
        facts = {"train_loss": 1.0, "num_tokens": 1, "seconds": 1, "seconds_training": 1}
        return Update(name, broadcast.round, delta, 1, facts)

    def delta(self, name, broadcast):
        return drawn(name, broadcast.round, broadcast.adapter)


# --- different ranks ------------------------------------------------------------------------------

RANKS = {"large": 4, "medium": 2, "small": 1}


def truncated(adapter, rank):
    return {A: adapter[A][:rank], B: adapter[B][:, :rank]}


def padded(delta, like):
    whole = {key: torch.zeros_like(t) for key, t in like.items()}
    rank = delta[A].shape[0]
    whole[A][:rank], whole[B][:, :rank] = delta[A], delta[B]
    return whole


def zero_padding():
    """HetLoRA without pruning: every client has the first rows and columns, up to its rank.

    Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models".
    """

    def layout(state, client):
        rank = max(RANKS.values()) if client is None else RANKS[client]
        return layout_of(truncated(state.adapter, rank))

    def combine(state, updates):
        deltas = [padded(u.delta, state.adapter) for u in updates]
        total = sum(weight_of(u, FEDAVG) for u in updates)
        return Change({key: sum(d[key] for d in deltas) / total for key in state.adapter})

    def tailor(broadcast, client):
        return replace(broadcast, adapter=truncated(broadcast.adapter, RANKS[client]))

    return replace(
        fedavg(FEDAVG), name="zero-padding", combine=combine, layout=layout, tailor=tailor
    )


def test_clients_of_different_ranks_receive_and_send_their_own_shapes(tmp_path):
    clients = Clients(*RANKS)
    state, _ = play(tmp_path / "run", zero_padding(), clients)
    for (name, _), adapter in clients.received.items():
        assert adapter[A].shape == (RANKS[name], 3)
        assert adapter[B].shape == (2, RANKS[name])
    assert len(clients.received) == ROUNDS * len(RANKS)
    # the oracle: dense sums in float64
    want = {key: t.double() for key, t in START.items()}
    for round_ in range(1, ROUNDS + 1):
        for name, rank in RANKS.items():
            delta = drawn(name, round_, truncated(START, rank))
            want[A][:rank] += delta[A].double() / 3
            want[B][:, :rank] += delta[B].double() / 3
    for key, tensor in want.items():
        torch.testing.assert_close(state.adapter[key].double(), tensor, rtol=1e-5, atol=1e-6)


def test_an_update_in_the_shapes_of_another_client_is_refused_by_name(tmp_path):
    class Confused(Clients):
        def delta(self, name, broadcast):
            rank = RANKS["medium"] if name == "small" else RANKS[name]
            return drawn(name, broadcast.round, truncated(START, rank))

    with pytest.raises(QuorumError, match=r"small: refused: .*shape \(2, 3\).*expects \(1, 3\)"):
        play(tmp_path / "run", zero_padding(), Confused(*RANKS))


def test_clients_that_are_not_tailored_share_one_message(tmp_path):
    clients = Clients("north", "south")
    play(tmp_path / "run", fedavg(FEDAVG), clients)
    for round_ in range(1, ROUNDS + 1):
        assert clients.received["north", round_] is clients.received["south", round_]


# --- updates that nobody may read -----------------------------------------------------------------

SCALE, RING = 2**16, 2**32


def encoded(delta):
    return {key: (t.double() * SCALE).round().to(torch.int64) % RING for key, t in delta.items()}


class MaskedClients(Clients):
    """Each client adds a mask; the masks of a round add up to 0 in the ring."""

    def delta(self, name, broadcast):
        sent = encoded(super().delta(name, broadcast))
        for other in self._names:
            if other != name:
                gen = generator(6, "mask", *sorted([name, other]), broadcast.round)
                sign = 1 if name < other else -1
                for key, tensor in sent.items():
                    mask = torch.randint(RING, tensor.shape, generator=gen)
                    sent[key] = (tensor + sign * mask) % RING
        return sent


def masked_sum():
    """FedAvg whose server only ever reads the sum of what clients send."""

    def layout(state, _):
        return {key: TensorSpec(tuple(t.shape), torch.int64) for key, t in state.adapter.items()}

    def combine(state, updates):
        total = {key: torch.zeros_like(t, dtype=torch.int64) for key, t in state.adapter.items()}
        for update in updates:
            total = {key: (t + update.delta[key]) % RING for key, t in total.items()}
        signed = {key: torch.where(t >= RING // 2, t - RING, t) for key, t in total.items()}
        return Change({k: (t.double() / SCALE / len(updates)).float() for k, t in signed.items()})

    def step(state, change):
        return move(state, change.delta)

    return replace(fedavg(FEDAVG), name="masked-sum", combine=combine, step=step, layout=layout)


def accept_masked(arrivals, spool, expected, progress):
    """Check names, shapes and the ring. The norm of noise says nothing, so it is not computed."""
    for update in arrivals:
        check_same_layout(update.delta, expected.layouts[update.client], who=update.client)
        assert all(bool(((t >= 0) & (t < RING)).all()) for t in update.delta.values())
        spool.add(update)
        progress.client_done(update)
    return []


def test_updates_that_nobody_may_read_have_their_own_acceptance(tmp_path):
    seen = []

    def accept(arrivals, spool, expected, progress):
        arrivals = list(arrivals)
        seen.extend(arrivals)
        return accept_masked(arrivals, spool, expected, progress)

    names = ("east", "north", "south")
    state, folder = play(tmp_path / "run", masked_sum(), MaskedClients(*names), accept=accept)
    plain, _ = play(tmp_path / "plain", fedavg(FEDAVG), Clients(*names))
    for key, tensor in plain.adapter.items():
        error = (state.adapter[key] - tensor).abs().max()
        assert error <= ROUNDS * 0.5 / SCALE * (1 + 1e-3)
    # what the server holds of one client looks like a draw from the ring
    hidden = torch.cat([t.flatten() for u in seen for t in u.delta.values()]).double() / RING
    assert abs(float(hidden.mean()) - 0.5) < 0.1
    assert all(row["status"] == "ok" for row in folder.metrics() if row["event"] == "train")


def test_the_default_acceptance_refuses_masked_updates(tmp_path):
    with pytest.raises(QuorumError, match="refused"):
        play(tmp_path / "run", fedavg(FEDAVG), MaskedClients("north", "south"))


def test_the_default_acceptance_is_the_one_that_is_used(tmp_path):
    one, _ = play(tmp_path / "one", fedavg(FEDAVG), Clients("north", "south"))
    other, _ = play(
        tmp_path / "other", fedavg(FEDAVG), Clients("north", "south"), accept=accept_updates
    )
    assert sha256(one.adapter) == sha256(other.adapter)
