"""Updates that are finite and far too large: refused by name, and the others' round goes on."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from silotune.algorithms import ALGORITHMS
from silotune.core.algorithm import starting_state
from silotune.core.errors import QuorumError, UpdateError
from silotune.core.tree import l2_norm, scale, sha256
from silotune.core.types import Score, ServerState, Update
from silotune.federation.metrics import held_out_losses
from silotune.federation.outliers import refuse_outliers
from silotune.federation.privacy_guarantee import with_privacy
from silotune.federation.progress import Progress
from silotune.federation.rounds import run_rounds
from silotune.federation.run_folder import RunFolder
from silotune.recipes.parse import parse
from tests.conftest import changed

START = {"lora_A": torch.full((2, 3), 0.5), "lora_B": torch.zeros(3, 2)}
NAMES = ("east", "north", "south", "west")


def recipe(**changes):
    table = {"rounds": 1, "data": {"path": "medquad_mini"}, "partition": {"by": "source"}}
    return parse(changed(table, {"evaluate__every": 0, **changes}))


def usual(client: str, round_: int) -> dict:
    gen = torch.Generator().manual_seed(sum(client.encode()) * 100 + round_)
    return {n: 0.01 * torch.randn(t.shape, generator=gen) for n, t in START.items()}


def filled(value: float) -> dict:
    return {n: torch.full_like(t, value) for n, t in START.items()}


class Clients:
    """Honest clients, and `south`, which sends what a test wants."""

    def __init__(self, south=None, names=NAMES):
        self.south, self._names, self.asked = south, names, []

    def names(self):
        return list(self._names)

    def num_rows(self):
        return {key: {"num_train": 4, "num_eval": 4} for key in self._names}

    def train(self, messages):
        for name, broadcast in messages.items():
            self.asked.append((broadcast.round, name))
            delta = usual(name, broadcast.round)
            if name == "south" and self.south is not None:
                delta = self.south(delta, broadcast.round)
            facts = {"train_loss": 1.0, "num_tokens": 5, "seconds_training": 1, "seconds": 1}
            yield Update(name, broadcast.round, delta, 4, facts)

    def evaluate(self, messages):
        return iter([Score(name, 1.0, 1, 1, 1) for name in messages])


class Heard(Progress):
    def __init__(self):
        self.failures = []

    def client_failed(self, failure):
        self.failures.append(failure)


def go(place, clients, run=None, *, folder=None, algorithm="fedavg", guard=False, **options):
    run = run or recipe()
    cfg, build = ALGORITHMS[algorithm]
    folder = folder or RunFolder.create(place / "run", run)
    built = build(cfg(**options))
    if guard:
        built = with_privacy(built, run, folder, dict.fromkeys(clients.names(), 4))
    state = folder.load_state() or starting_state(built, START, len(NAMES))
    heard = Heard()
    parts = {"algorithm": built, "clients": clients, "folder": folder, "progress": heard}
    return run_rounds(run, state, **parts), folder, heard


HUGE = {
    "as large as a float32 can be": lambda d, _: filled(3e38),
    "1e18": lambda d, _: filled(1e18),
    "one number": lambda d, _: {**d, "lora_B": torch.tensor([[0, 0], [0, -1e18], [0, 0.0]])},
    "1e5": lambda d, _: filled(1e5),
    "a thousand times the others": lambda d, _: scale(d, 1e3),
}


@pytest.mark.parametrize("kind", HUGE)
@pytest.mark.parametrize("algorithm", ["fedavg", "fedavgm", "fedadam"])
def test_a_huge_update_is_refused_by_name_and_the_round_is_that_of_the_others(
    tmp_path, kind, algorithm
):
    """Bug: 3e38 was accepted and saved; then every honest client failed, and was blamed."""
    state, folder, heard = go(tmp_path, Clients(HUGE[kind]), algorithm=algorithm)
    (failure,) = heard.failures
    assert (failure.client, failure.code) == ("south", "refused")
    assert "client 'south', round 1" in failure.place
    assert "Lower train.lr or set train.clip_norm at this client" in failure.place
    status = {r["client"]: r["status"] for r in folder.metrics() if r["event"] == "train"}
    assert status == {**dict.fromkeys(NAMES, "ok"), "south": "refused"}
    others, _, _ = go(
        tmp_path / "others",
        Clients(names=[n for n in NAMES if n != "south"]),
        algorithm=algorithm,
    )
    assert sha256(state.adapter) == sha256(others.adapter)


def test_the_message_has_the_norm_the_limit_and_the_key(tmp_path):
    _, _, heard = go(tmp_path, Clients(lambda d, _: scale(d, 1e3)))
    place = heard.failures[0].place
    assert "its delta has norm" in place
    assert "100 times (sampling.max_norm_ratio) the median" in place
    assert "of the round's 4 updates" in place


def test_refused_updates_do_not_count_for_the_quorum(tmp_path):
    run = recipe(sampling__quorum=1.0)
    with pytest.raises(QuorumError, match=r"3 usable updates of 4[\s\S]*south: refused"):
        go(tmp_path, Clients(lambda d, _: scale(d, 1e3)), run)
    honest = Clients()
    _, _, heard = go(tmp_path, honest, run, folder=RunFolder.open(tmp_path / "run"))
    assert honest.asked == [(1, "south")]  # the spool no longer holds its update
    assert not heard.failures


def test_a_tiny_update_cannot_make_the_others_look_huge(tmp_path):
    """Of two updates, neither is the usual one; of many zeros and one change, the change is."""
    for names in (("north", "south"), NAMES):
        clients = Clients(lambda d, _: scale(d, 1e-30), names=names)
        _, _, heard = go(tmp_path / str(len(names)), clients)
        assert not heard.failures
    still = Clients(lambda d, _: d)
    still.train = lambda messages: (
        replace(update, delta=filled(0.0)) if update.client != "south" else update
        for update in Clients.train(still, messages)
    )
    _, _, heard = go(tmp_path / "still", still)
    assert not heard.failures


@pytest.mark.parametrize("names", [("south",), ("north", "south")])
def test_one_or_two_updates_are_compared_with_the_adapter(tmp_path, names):
    limit = 100 * l2_norm(START)
    for factor, refused in ((0.99, False), (1.01, True)):
        delta = scale(filled(1.0), factor * limit / l2_norm(filled(1.0)))
        clients = Clients(lambda _, __, d=delta: d, names=names)
        run = recipe(sampling__quorum=0.5)
        place = tmp_path / str(factor)
        if refused and names == ("south",):
            with pytest.raises(QuorumError, match=r"above .* the adapter's norm"):
                go(place, clients, run)
            continue
        _, _, heard = go(place, clients, run)
        assert [f.client for f in heard.failures] == (["south"] if refused else [])


@given(norms=st.lists(st.floats(0.1, 9.9), min_size=1, max_size=8), hostile=st.floats(1e6, 1e30))
def test_honest_norms_are_never_refused_and_a_minority_of_huge_ones_always_is(norms, hostile):
    """Honest: within a factor of 99 of each other. Hostile: fewer than half."""
    num_hostile = (len(norms) - 1) // 2
    sent = [*norms, *[hostile] * num_hostile]
    spool = FakeSpool(sent)
    refused = refuse_outliers(recipe(), ServerState(0, START), spool, Progress())
    assert sorted(spool.dropped) == sorted(f.client for f in refused)
    assert {f.client for f in refused} == {f"c{i}" for i in range(len(norms), len(sent))}


class FakeSpool:
    def __init__(self, norms):
        self._norms, self.dropped = norms, []

    def reports(self):
        return [Update(f"c{i}", 1, {}, 1, {"delta_norm": n}) for i, n in enumerate(self._norms)]

    def discard(self, client):
        self.dropped.append(client)


# --- the guard clips ------------------------------------------------------------------------------

PRIVATE = {
    "algorithm": {"weights": "uniform"},
    "privacy__unit": "client",
    "privacy__noise_multiplier": 0.0,
    "privacy__delta": 1e-3,
    "privacy__clip_norm": 0.5,
    "privacy__noise": "seeded",
}


@pytest.mark.parametrize("value", [1e3, 1e18, 3e38])
def test_a_server_that_clips_scales_a_huge_update_down_and_refuses_nobody(tmp_path, value):
    """Who is left out must not depend on the others' updates: that would not be covered."""
    run = recipe(**PRIVATE)
    state, _, heard = go(tmp_path, Clients(lambda d, _: filled(value)), run, guard=True)
    assert not heard.failures
    honest = [usual(n, 1) for n in NAMES if n != "south"]
    clipped = 0.5 / l2_norm(filled(1.0))
    for name, start in START.items():
        mean = (sum(d[name].double() for d in honest) + clipped) / 4
        torch.testing.assert_close(state.adapter[name].double(), start.double() + mean)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_server_that_clips_refuses_what_has_no_norm(tmp_path, value):
    _, _, heard = go(tmp_path, Clients(lambda d, _: filled(value)), recipe(**PRIVATE), guard=True)
    assert [(f.client, f.code) for f in heard.failures] == [("south", "refused")]
    assert "contains NaN or infinity" in heard.failures[0].place


# --- the state ------------------------------------------------------------------------------------


def test_a_state_that_no_client_could_use_never_replaces_a_checkpoint(tmp_path):
    """A single client may grow a hundredfold in each round, until the state itself is absurd."""

    def grow(_, round_):
        return filled({1: 10.0, 2: 1000.0, 3: 40_000.0}[round_])

    run = recipe(rounds=4, sampling__max_norm_ratio=1e5)
    with pytest.raises(UpdateError) as caught:
        go(tmp_path, Clients(grow, names=("south",)), run, server_lr=2.0)
    text = str(caught.value)
    assert "round 3, the new state: 'lora_A' contains a value beyond 65504." in text
    assert "The largest update came from client 'south'" in text
    assert "resume" in text
    folder = RunFolder.open(tmp_path / "run")
    kept = folder.load_state()
    assert kept is not None
    assert kept.round == 2
    assert max(float(t.abs().max()) for t in kept.adapter.values()) < 65504
    again = Clients(lambda d, _: d, names=("south",))
    state, _, _ = go(tmp_path, again, run, folder=folder)
    assert state.round == 4
    assert again.asked == [(3, "south"), (4, "south")]


def test_moments_that_overflow_are_refused_with_the_state(tmp_path):
    def overflow(state):
        state.extra["momentum"]["lora_A"][0, 0] = float("inf")
        return state

    cfg, build = ALGORITHMS["fedavgm"]
    built = build(cfg())
    spoilt = replace(built, step=lambda s, c: overflow(built.step(s, c)))
    folder = RunFolder.create(tmp_path / "run", recipe())
    state = ServerState(0, START, built.init(START, 4))
    parts = {"algorithm": spoilt, "clients": Clients(), "folder": folder, "progress": Progress()}
    with pytest.raises(UpdateError, match=r"the new state, momentum: 'lora_A' contains NaN or inf"):
        run_rounds(recipe(), state, **parts)
    assert folder.load_state() is None


# --- scores ---------------------------------------------------------------------------------------


def scored(losses):
    return [
        {"event": "evaluate", "status": "ok", "round": 1, "client": c, "loss": x, "num_tokens": n}
        for c, (x, n) in losses.items()
    ]


def test_one_client_counts_at_most_as_much_as_all_others_together():
    """A client that reports a billion rows would otherwise be the curve of all."""
    rows = scored({"a": (2.0, 10), "b": (2.0, 30), "c": (0.0, 10**9)})
    assert held_out_losses(rows) == {1: 1.0}
    # whoever holds less than half counts by its tokens, as before
    rows = scored({"a": (1.0, 10), "b": (2.0, 20), "c": (4.0, 30)})
    assert held_out_losses(rows)[1] == pytest.approx((10 + 40 + 120) / 60)
    # two clients are what they say: to make them equal would change every honest pair
    assert held_out_losses(scored({"a": (1.0, 10), "b": (2.0, 30)}))[1] == pytest.approx(1.75)
