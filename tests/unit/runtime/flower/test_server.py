"""The server's side of Flower on a grid in memory: who joins, who fails, and what is late.

Nodes are plain functions, so everything that goes wrong in a network can be simulated without one:
silence, delays, other orders, other identities, nonsense. No model, no Ray, no SuperLink.
"""

import io
import itertools
import json
import os
import re
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.serverapp import Grid

from silotune.algorithms import ALGORITHMS
from silotune.core.errors import DataError, EngineError, QuorumError, UpdateError
from silotune.core.installed import code_sha256, version
from silotune.core.seeds import generator
from silotune.core.tree import sha256
from silotune.core.types import AWAITS_CONSENT, Broadcast, Failure, Score, ServerState, Update
from silotune.federation import acceptance
from silotune.federation.metrics import held_out_losses
from silotune.federation.privacy_guarantee import with_privacy
from silotune.federation.progress import Progress
from silotune.federation.roster import Roster, versions_seen, write_members
from silotune.federation.rounds import run_rounds
from silotune.federation.run_folder import RunFolder
from silotune.federation.sampling import sample
from silotune.recipes.parse import parse
from silotune.runtime import wire
from silotune.runtime.client_host import guarded
from silotune.runtime.flower import mailbox, members
from silotune.runtime.flower import server as flower_server
from silotune.runtime.flower.records import from_record, to_record
from silotune.runtime.flower.server import FlowerClients, run_remaining
from silotune.runtime.flower.server_reports import Follower, read_outcome
from silotune.runtime.flower.submit import RUNS, SETTINGS, without_places
from silotune.runtime.payload import Parcel

NAMES = ("east", "north", "south", "west")
START = {"lora_A": torch.zeros(2, 3), "lora_B": torch.ones(3, 2)}
NUM_FLOATS = 12
BASE = "ab" * 32
SECRET = "patient 4711 has measles"
"""A row's text; it must not appear anywhere at the server."""


# --- a grid in memory ----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def task_identity(monkeypatch):
    """Outside its engine Flower makes no `Message` without these private numbers (engine.md)."""
    from flwr.supercore.task_identity import TaskIdentity

    for key in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, key, 1)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(flower_server, "POLL_S", (0.001, 0.01))
    monkeypatch.setattr(members, "POLL_S", 0.01)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no power is lost here


Answer = RecordDict | Error | None
Node = Callable[[Message], Answer]


class Nodes(Grid):
    """Flower's grid: each node is a function of a message; None is silence."""

    def __init__(self, nodes: dict[int, Node] | None = None):
        self.nodes = dict(nodes or {})
        self.hidden: dict[int, float] = {}
        self.messages: list[Message] = []
        self.pulled: list[list[str]] = []
        self.order: Callable[[list[Message]], list[Message]] = lambda replies: replies
        self.began = time.monotonic()
        self._replies: dict[str, Message] = {}
        self._ids = itertools.count(1)

    def get_node_ids(self):
        now = time.monotonic() - self.began
        return [n for n in self.nodes if now >= self.hidden.get(n, 0)]

    def push_messages(self, messages):
        ids = []
        for message in messages:
            assert message.metadata.ttl == mailbox.TTL_S
            ids.append(f"message-{next(self._ids)}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            self.messages.append(message)
        for message in self.messages[len(self.messages) - len(ids) :]:
            node = self.nodes.get(message.metadata.dst_node_id)
            self.reply(message, node(message) if node else Error(5, SECRET))
        return ids

    def reply(self, message: Message, answer: Answer) -> None:
        if answer is not None:
            key = message.metadata.message_id
            self._replies[key] = Message(answer, reply_to=message)

    def pull_messages(self, message_ids):
        ids = list(message_ids)
        self.pulled.append(ids)
        return self.order([self._replies.pop(i) for i in ids if i in self._replies])

    def sent(self, kind: str) -> list[tuple[int, int]]:
        """(round, node) of every message of a kind."""
        found = [m.metadata for m in self.messages if m.metadata.message_type == kind]
        return [(int(m.group_id or 0), m.dst_node_id) for m in found]

    run = property(lambda self: None)

    def not_used(self, *args, **kwargs):
        raise AssertionError("silotune waits by itself")

    set_run = create_message = send_and_receive = not_used


def delta_of(client: str, round_: int) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(sum(client.encode()) * 100 + round_)
    return {n: torch.randn(t.shape, generator=gen) for n, t in START.items()}


def update_of(client: str, broadcast: Broadcast) -> Update:
    return Update(
        client=client,
        round=broadcast.round,
        delta=delta_of(client, broadcast.round),
        num_examples=len(client),
        metrics={"train_loss": 1.0, "num_tokens": 5, "seconds_training": 0.1, "seconds": 1.0},
        score=Score(client, 2.0, 2, 1, 1) if broadcast.score else None,
    )


REPORT = {
    "num_train": 9,
    "num_eval": 2,
    "num_cut": 0,
    "num_dropped": 0,
    "base_sha256": BASE,
    "dtype": "torch.float32",
    "threads": 1,
}


@dataclass
class Client:
    """A node's function: what an honest client answers, or what a test wants instead."""

    name: str
    report: dict | Answer = field(default_factory=dict)
    train: Callable[[Broadcast], Parcel | Answer] | None = None
    evaluate: Callable[[Broadcast], Parcel | Answer] | None = None
    heard: list[tuple[str, int]] = field(default_factory=list)

    def __call__(self, message: Message) -> Answer:
        kind, parcel = message.metadata.message_type, from_record(message.content)
        self.heard.append((kind, parcel.about.get("round", 0)))
        if kind == "query":
            report = self.report
            answer = (
                Parcel({"report": {**REPORT, **report}}) if isinstance(report, dict) else report
            )
        else:
            broadcast = wire.decode_broadcast(parcel)
            own = self.train if kind == "train" else self.evaluate
            answer = own(broadcast) if own else self.honest(kind, broadcast)
        if not isinstance(answer, Parcel):
            return answer
        process = {"id": self.name, "base_loads": 1, "peak_memory_bytes": 100}
        about = {"client": self.name, "process": process, **answer.about}
        return to_record(Parcel(about, answer.values))

    def honest(self, kind: str, broadcast: Broadcast) -> Parcel:
        if kind == "train":
            return wire.encode_update(update_of(self.name, broadcast))
        return wire.encode_score(Score(self.name, 3.0, 2, 1, 1), broadcast.round)


class Heard(Progress):
    """Records everything that a person would see."""

    def __init__(self):
        self.notes, self.failures, self.done, self.consent = [], [], [], []

    def waits_for_consent(self, clients):
        self.consent.append(list(clients))

    def note(self, text):
        self.notes.append(text)

    def client_failed(self, failure):
        self.failures.append(failure)

    def client_done(self, update):
        self.done.append((update.round, update.client))


def recipe(**changes):
    table = {
        "rounds": 2,
        "data": {"path": "medquad_mini"},
        "partition": {"by": "source"},
        "sampling": {"timeout_s": 0.05, "quorum": 0.5},
        "evaluate": {"every": 0},
        "runtime": {"name": "flower", "join_timeout_s": 0.05},
    }
    for key, value in changes.items():
        section, _, inner = key.partition("__")
        if inner:
            table[section][inner] = value
        else:
            table[section] = value
    return parse(table)


def clients_by(**own) -> dict[int, Client]:
    """One honest client per name, or the one given, on nodes 11, 12, ..."""
    return {11 + i: own.get(name, Client(name)) for i, name in enumerate(NAMES)}


class Played:
    """A run on a grid, and what it leaves."""

    def __init__(self, tmp_path, grid, run=None, names=NAMES, *, join=True, **more):
        self.grid, self.run, self.heard = grid, run or recipe(), Heard()
        self.folder = RunFolder.create(tmp_path / "run", self.run)
        self.clients = FlowerClients(grid, names, self.run, self.heard, base_sha256=BASE, **more)
        if join:
            self.clients.join()

    def go(self):
        cfg, build = ALGORITHMS["fedavg"]
        self.state = run_rounds(
            self.run,
            ServerState(0, START),
            algorithm=build(cfg()),
            clients=self.clients,
            folder=self.folder,
            progress=self.heard,
        )
        return self

    def rows(self, event="train", **wanted):
        rows = [r for r in self.folder.metrics() if r["event"] == event]
        return [r for r in rows if all(r[k] == v for k, v in wanted.items())]

    def status(self, round_, event="train"):
        return {r["client"]: r["status"] for r in self.rows(event, round=round_)}

    def everything(self) -> str:
        """All that the server knows in words: rows, notes, failures, files."""
        files = [p for p in self.folder.path.rglob("*") if p.is_file()]
        texts = [p.read_bytes().decode(errors="replace") for p in files]
        return "\n".join([*texts, *self.heard.notes, repr(self.heard.failures)])


def play(tmp_path, nodes, run=None, **options) -> Played:
    grid = nodes if isinstance(nodes, Nodes) else Nodes(nodes)
    return Played(tmp_path, grid, run, **options).go()


class Plain:
    """An oracle without messages: the named clients of each round answer at once."""

    def __init__(self, names=NAMES, absent=()):
        self._names, self.absent = sorted(names), set(absent)

    def names(self):
        return self._names

    def num_rows(self):
        return {name: {"num_train": 1000000, "num_eval": 0} for name in self.names()}

    def train(self, messages):
        for name, broadcast in messages.items():
            if (broadcast.round, name) not in self.absent:
                yield update_of(name, broadcast)

    def evaluate(self, messages):
        return ()


def oracle(tmp_path, run=None, **options) -> str:
    cfg, build = ALGORITHMS["fedavg"]
    run = run or recipe()
    state = run_rounds(
        run,
        ServerState(0, START),
        algorithm=build(cfg()),
        clients=Plain(**options),
        folder=RunFolder.create(tmp_path / "oracle", run),
        progress=Progress(),
    )
    return sha256(state.adapter)


# --- all is well ---------------------------------------------------------------------------------


def test_messages_give_the_bits_of_a_plain_loop_and_their_bytes_are_counted(tmp_path):
    played = play(tmp_path, clients_by())
    assert sha256(played.state.adapter) == oracle(tmp_path)
    for row in played.rows():
        assert (row["status"], row["bytes_up"], row["bytes_down"]) == ("ok", *[4 * NUM_FLOATS] * 2)
    assert played.heard.notes == played.heard.failures == []
    assert played.clients.facts() == {
        "num_rows": {name: {"num_train": 9, "num_eval": 2} for name in NAMES},
        "processes": [
            {"id": name, "base_loads": 1, "peak_memory_bytes": 100}
            for name in played.clients.mailbox.processes
        ],
    }


@pytest.mark.parametrize("permutation", list(itertools.permutations(range(4)))[1::5])
def test_the_order_in_which_answers_come_cannot_change_a_bit(tmp_path, permutation):
    grid = Nodes(clients_by())
    grid.order = lambda replies: (
        [replies[i] for i in permutation] if len(replies) == 4 else replies[::-1]
    )
    played = play(tmp_path, grid)
    assert sha256(played.state.adapter) == oracle(tmp_path)
    if permutation != (0, 1, 2, 3):
        assert [name for r, name in played.heard.done if r == 1] != list(NAMES)


def test_answers_one_at_a_time_give_the_same_bits(tmp_path):
    grid, held = Nodes(clients_by()), []

    def one_of(replies):
        held.extend(replies)
        return [held.pop()] if held else []

    grid.order = one_of
    played = play(tmp_path, grid, recipe(sampling__timeout_s=20, runtime__join_timeout_s=20))
    assert sha256(played.state.adapter) == oracle(tmp_path)


def test_exactly_the_cohort_is_asked(tmp_path):
    run = recipe(rounds=6, sampling={"fraction": 0.5, "timeout_s": 5, "quorum": 1.0})
    nodes = clients_by()
    played = play(tmp_path, nodes, run)
    for r in range(1, 7):
        cohort = sample(NAMES, run.sampling, generator(run.seed, "sampling", r))
        asked = {nodes[node].name for round_, node in played.grid.sent("train") if round_ == r}
        assert asked == set(cohort)
    assert len(played.grid.sent("train")) == 12
    assert len(played.grid.sent("query")) == 4
    assert not played.grid.sent("evaluate")


def test_memory_holds_sixteen_answers_however_many_clients_there_are(tmp_path):
    names = [f"client-{i:02d}" for i in range(50)]
    grid = Nodes({100 + i: Client(name) for i, name in enumerate(names)})
    alive, most = [0], [0]

    class Counted(Message):
        def __del__(self):
            alive[0] -= 1

    def count(replies):
        for reply in replies:
            reply.__class__ = Counted
        alive[0] += len(replies)
        most[0] = max(most[0], alive[0])
        return replies

    grid.order = count
    played = play(tmp_path, grid, recipe(rounds=1, sampling__timeout_s=20), names=names)
    assert max(map(len, grid.pulled)) == mailbox.AT_ONCE == 16
    # one of the last batch may still be in use while the next is fetched
    assert most[0] <= 2 * mailbox.AT_ONCE
    assert set(played.status(1).values()) == {"ok"}
    assert sha256(played.state.adapter) == oracle(tmp_path, recipe(rounds=1), names=names)


@pytest.mark.parametrize(("adapters", "at_once"), [(0.5, 1), (1, 1), (3, 3)])
def test_fewer_large_answers_are_fetched_at_once(tmp_path, monkeypatch, adapters, at_once):
    """Sixteen adapters of 500 MB would be eight gigabytes."""
    monkeypatch.setattr(mailbox, "AT_ONCE_BYTES", adapters * 4 * NUM_FLOATS)
    grid = Nodes({100 + i: Client(name) for i, name in enumerate(NAMES)})
    played = play(tmp_path, grid, recipe(rounds=1, sampling__timeout_s=20))
    training = {m.metadata.message_id for m in grid.messages if m.metadata.message_type == "train"}
    assert max(len(ids) for ids in grid.pulled if training.intersection(ids)) == at_once
    assert set(played.status(1).values()) == {"ok"}


def test_a_large_answer_is_released_before_the_next_is_fetched(tmp_path, monkeypatch):
    """Every place that still holds the last adapter costs one more of them: gigabytes."""
    monkeypatch.setattr(mailbox, "AT_ONCE", 1)
    made, left = [], []

    def watched(module, name):
        original = getattr(module, name)

        def noting(*args, **options):
            made.append(weakref.ref(found := original(*args, **options)))
            return found

        monkeypatch.setattr(module, name, noting)

    watched(mailbox, "from_record")
    watched(flower_server, "_decode")
    watched(acceptance, "check_update")
    grid = Nodes(clients_by())

    def look(replies):
        if grid.sent("train"):  # earlier reports are small
            left.append([type(found()).__name__ for found in made if found() is not None])
        return replies

    grid.order = look
    played = play(tmp_path, grid, recipe(rounds=1, sampling__timeout_s=20))
    assert set(played.status(1).values()) == {"ok"}
    assert len(made) == 4 * len(NAMES)
    assert len(left) >= len(NAMES)
    assert left == [[]] * len(left)


def test_an_answer_that_is_delivered_twice_counts_once(tmp_path):
    grid, before = Nodes(clients_by()), []

    def again(replies):
        doubled = [*replies, *before]
        before[:] = replies
        return doubled

    grid.order = again
    played = play(tmp_path, grid)
    assert sha256(played.state.adapter) == oracle(tmp_path)
    assert len(played.rows()) == 8


# --- joining -------------------------------------------------------------------------------------


def test_join_waits_for_nodes_that_appear_one_after_the_other(tmp_path):
    grid = Nodes(clients_by())
    grid.hidden = {12: 0.03, 13: 0.06, 14: 0.09}
    played = play(tmp_path, grid, recipe(runtime__join_timeout_s=20))
    assert played.status(1) == dict.fromkeys(NAMES, "ok")
    assert played.heard.notes == []


def test_a_silent_node_does_not_keep_later_ones_from_joining(tmp_path):
    grid = Nodes(clients_by(east=Client("east", report=None)))
    grid.hidden = dict.fromkeys((12, 13, 14), 0.03)
    played = play(tmp_path, grid)
    others = {name: "ok" for name in NAMES if name != "east"}
    assert played.status(1) == {**others, "east": "not connected"}


def test_a_missing_client_is_named_with_the_key_and_the_run_continues(tmp_path):
    nodes = clients_by()
    del nodes[13]
    played = play(tmp_path, nodes)
    assert played.heard.notes == ["south: has not reported within 0.05 s (runtime.join_timeout_s)"]
    assert played.status(1)["south"] == played.status(2)["south"] == "not connected"
    assert {f.place for f in played.heard.failures} == {"it has not reported"}
    absent = {(1, "south"), (2, "south")}
    assert sha256(played.state.adapter) == oracle(tmp_path, absent=absent)


def test_a_run_without_clients_ends_in_a_quorum_error_that_names_all(tmp_path):
    with pytest.raises(QuorumError) as caught:
        play(tmp_path, {})
    assert all(f"{name}: not connected: it has not reported" in str(caught.value) for name in NAMES)


def test_a_client_that_appears_during_the_run_takes_part_from_then_on(tmp_path):
    grid = Nodes(clients_by())
    south = grid.nodes.pop(13)

    def north(broadcast):
        if broadcast.round == 2:
            grid.nodes[13] = south
        return wire.encode_update(update_of("north", broadcast))

    grid.nodes[12].train = north
    played = play(tmp_path, grid, recipe(rounds=3))
    assert [played.status(r)["south"] for r in (1, 2, 3)] == [
        "not connected",
        "not connected",
        "ok",
    ]


def test_a_start_names_the_clients_it_is_waiting_for(tmp_path, monkeypatch):
    """A run that was resumed while a client was away waited for minutes without saying so."""
    monkeypatch.setattr(members, "TELL_S", 0.01)
    monkeypatch.setattr(members, "TOLD", 1)
    grid = Nodes({100: Client("east"), 101: Client("north")})
    played = play(tmp_path, grid, recipe(rounds=1))
    waited = "waiting for south, ... to report, at most 0.05 s (runtime.join_timeout_s)"
    assert [n for n in played.heard.notes if n.startswith("waiting")] == [waited]


def test_a_node_that_reports_after_the_deadline_of_join_takes_part_later(tmp_path):
    """Its model took long to load: the report comes when nobody is waiting for it any longer."""
    grid, held = Nodes(clients_by()), []
    south = grid.nodes[13]
    grid.nodes[13] = lambda message: held.append(message) if not held else south(message)

    def north(broadcast):
        if broadcast.round == 2:
            grid.reply(held[0], south(held[0]))
        return wire.encode_update(update_of("north", broadcast))

    grid.nodes[12].train = north
    played = play(tmp_path, grid, recipe(rounds=3))
    assert [played.status(r)["south"] for r in (1, 2, 3)] == [
        "not connected",
        "not connected",
        "ok",
    ]
    assert len(grid.sent("query")) == 4, "it is asked once"
    assert {f.client for f in played.heard.failures} == {"south"}


def test_an_unknown_client_is_named_and_never_asked_to_train(tmp_path):
    mallory = Client("mallory")
    played = play(tmp_path, {**clients_by(), 99: mallory})
    (note,) = played.heard.notes
    assert note == "mallory: unknown client: this run has no client of that name"
    assert mallory.heard == [("query", 0)]
    assert sha256(played.state.adapter) == oracle(tmp_path)


def test_a_second_node_under_one_name_is_refused(tmp_path):
    double = Client("north", train=lambda b: pytest.fail("must not be asked"))
    played = play(tmp_path, {**clients_by(), 99: double})
    (note,) = played.heard.notes
    assert note == "north: name taken: another node has reported as this client"
    assert sha256(played.state.adapter) == oracle(tmp_path)


def test_the_second_node_under_a_name_takes_over_when_the_first_is_gone(tmp_path):
    """A client that was killed is listed until Flower misses its heartbeats; its new node must
    not remain the name's second owner."""
    grid = Nodes({**clients_by(), 99: Client("north")})

    def east(broadcast):
        if broadcast.round == 1:
            del grid.nodes[12]
        return wire.encode_update(update_of("east", broadcast))

    grid.nodes[11].train = east
    played = Played(tmp_path, grid, recipe(rounds=3)).go()
    assert [played.status(r)["north"] for r in (1, 2, 3)][1:] == ["ok", "ok"]
    assert {node for r, node in grid.sent("train") if r == 2} == {11, 13, 14, 99}


def test_a_client_with_another_base_model_is_refused_in_every_round(tmp_path):
    other = Client("south", report={"base_sha256": "c0ffee" * 10})
    played = play(tmp_path, clients_by(south=other))
    assert played.heard.notes == [
        "south: other base model: its base model has the sha256 c0ffeec0ffee..."
    ]
    assert played.status(1)["south"] == played.status(2)["south"] == "other base model"
    assert other.heard == [("query", 0)]


def failing(error, round_=0, name="south"):
    def work():
        raise error

    return guarded(work, client=name, round_=round_)


def test_a_client_that_cannot_start_gives_code_and_place_and_no_text(tmp_path, capsys):
    broken = Client("south", report=failing(DataError(f"row 3: {SECRET}")))
    broken.report = to_record(broken.report)
    played = play(tmp_path, clients_by(south=broken))
    assert SECRET in capsys.readouterr().err, "its own log has the text"
    (row,) = played.rows(round=1, client="south")
    assert row["status"] == "DataError"
    assert re.fullmatch(r"client_host\.py:\d+ in guarded", row["place"])
    assert SECRET not in played.everything()


REPORTS = {
    "nothing": {},
    "a list": {"report": []},
    "no counts": {"report": {"base_sha256": BASE}},
    "counts in words": {"report": {**REPORT, "num_train": "many"}},
    "negative counts": {"report": {**REPORT, "num_eval": -1}},
    "more keys": {"report": {**REPORT, "rows": [SECRET]}},
    "a sha that is none": {"report": {**REPORT, "base_sha256": 7}},
    "an update": {"update": {}},
    "a score": {"score": {"loss_sum": 1, "num_tokens": 1, "num_correct": 0, "num_examples": 1}},
    "half a failure": {"failure": {"code": SECRET}},
}


@pytest.mark.parametrize("kind", REPORTS)
def test_a_report_that_cannot_be_read_is_named_and_ends_nothing(tmp_path, kind):
    strange = Client("south", report=to_record(Parcel({**REPORTS[kind], "client": "south"})))
    played = play(tmp_path, clients_by(south=strange))
    assert played.heard.notes == ["south: unreadable: its report cannot be read"]
    assert played.status(1)["south"] == "unreadable"
    assert set(played.clients.facts()["num_rows"]) == set(NAMES) - {"south"}
    assert SECRET not in played.everything()


@pytest.mark.parametrize("name", [None, 7, ["south"], {"south": 1}])
def test_a_report_without_a_name_is_named_by_its_node(tmp_path, name):
    about = {"report": REPORT} | ({"client": name} if name is not None else {})
    played = play(tmp_path, clients_by(south=Client("south", report=to_record(Parcel(about)))))
    assert any("unknown client" in note for note in played.heard.notes)
    assert played.status(1)["south"] == "not connected"


def test_a_reply_that_is_not_a_parcel_at_join_is_named_by_its_node(tmp_path):
    played = play(tmp_path, clients_by(south=Client("south", report=RecordDict())))
    assert played.heard.notes[0].startswith("node 13: unreadable: a message has no readable text.")
    assert played.status(1)["south"] == "not connected"


def test_a_node_that_is_not_reachable_at_first_is_asked_again(tmp_path):
    grid, tries = Nodes(clients_by()), []
    south = grid.nodes[13]

    def flaky(message):
        tries.append(message)
        return Error(5, SECRET) if len(tries) == 1 else south(message)

    grid.nodes[13] = flaky
    played = play(tmp_path, grid, recipe(runtime__join_timeout_s=20))
    assert played.status(1) == dict.fromkeys(NAMES, "ok")
    assert played.heard.notes == ["node 13: not reachable: Flower's error code 5"]


def waiting(client: str = "north") -> Parcel:
    return wire.encode_failure(Failure(client, 0, AWAITS_CONSENT, "it has not agreed"))


@pytest.mark.parametrize("again_s", [0.0, 60.0])
def test_a_client_that_waits_for_consent_is_not_there_and_joins_once_it_agrees(
    tmp_path, monkeypatch, again_s
):
    monkeypatch.setattr(members, "CONSENT_S", again_s)
    north = Client("north", report=waiting())
    nodes = clients_by(north=north)
    played = Played(tmp_path, Nodes(nodes), recipe(rounds=3))
    assert "north: waiting for consent: its people have not agreed" in played.heard.notes[0]
    assert played.heard.consent[-1] == ["north"]
    assert not any("has not reported" in note for note in played.heard.notes)
    nodes[11].train = lambda broadcast: agree_as("east", north, broadcast)
    played.go()
    assert played.status(1) == {**dict.fromkeys(NAMES, "ok"), "north": AWAITS_CONSENT}
    assert played.status(3)["north"] == (AWAITS_CONSENT if again_s else "ok")
    assert ("train", 1) not in north.heard
    assert played.heard.consent[-1] == (["north"] if again_s else [])


def agree_as(name: str, other: Client, broadcast: Broadcast) -> Parcel:
    """An honest answer, at which another client's people agree."""
    other.report = {}
    return wire.encode_update(update_of(name, broadcast))


def test_a_start_waits_on_while_too_few_have_agreed(tmp_path, monkeypatch):
    """Otherwise a run would fail, and be tried again, while people read what it asks for."""
    monkeypatch.setattr(members, "CONSENT_S", 0.01)
    nodes = {11 + i: Client(name, report=waiting(name)) for i, name in enumerate(NAMES)}
    began = time.monotonic()

    def agree(node: Client) -> Node:
        def hear(message: Message) -> Answer:
            if time.monotonic() - began > 0.4:
                node.report = {}
            return node(message)

        return hear

    played = Played(tmp_path, Nodes({n: agree(c) for n, c in nodes.items()}))
    assert time.monotonic() - began > 0.4, "join_timeout_s is 0.05 here"
    assert played.go().status(1) == dict.fromkeys(NAMES, "ok")


def test_a_start_does_not_wait_for_one_that_waited_for_consent_and_is_gone(tmp_path, monkeypatch):
    nodes = {11 + i: Client(name, report=waiting(name)) for i, name in enumerate(NAMES)}
    grid = Nodes(nodes)
    played = Played(tmp_path, grid, join=False)
    monkeypatch.setattr(
        Heard, "waits_for_consent", lambda self, clients: grid.nodes.clear() if clients else None
    )
    played.clients.join()
    with pytest.raises(QuorumError, match="not connected"):
        played.go()


def test_a_client_that_declines_after_it_waited_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(members, "CONSENT_S", 0.0)
    north = Client("north", report=waiting())
    played = Played(tmp_path, Nodes(clients_by(north=north)))
    said = wire.encode_failure(Failure("north", 0, "declined", "its people declined this run"))
    north.report = said
    assert played.go().status(1)["north"] == "declined"
    assert played.heard.consent[-1] == []


def test_a_run_for_some_clients_asks_and_tells_nobody_else(tmp_path):
    nodes = clients_by()
    members_file = tmp_path / "members.json"
    write_members(members_file, {name: 11 + i for i, name in enumerate(NAMES)})
    chosen = ("east", "south")
    played = Played(tmp_path, Nodes(nodes), names=chosen, join=False)
    roster = Roster(members_file, only=chosen)
    played.clients = FlowerClients(
        played.grid, chosen, played.run, played.heard, base_sha256=BASE, roster=roster
    )
    played.clients.join()
    assert list(played.clients.names()) == list(chosen)
    assert played.go().status(2) == dict.fromkeys(chosen, "ok")
    heard = {node.name: len(node.heard) for node in nodes.values()}
    assert [heard[name] for name in NAMES if name not in chosen] == [0, 0]
    assert min(heard[name] for name in chosen) == 3
    assert roster.may_ask(12) is False
    assert roster.may_ask(99) is False, "a node that nobody knows is not told, either"
    assert Roster(members_file).may_ask(99)


@pytest.mark.parametrize(
    ("report", "says"),
    [
        ({}, None),
        ({"version": version(), "code_sha256": code_sha256()}, None),
        ({"version": "0.0.1"}, f"north: runs silotune 0.0.1, the server {version()}"),
        (
            {"version": version(), "code_sha256": "ab"},
            f"north: runs silotune {version()} with other files than the server",
        ),
        ({"version": "1\n2026 south: ok"}, "north: runs silotune 1 2026 south: ok, the server"),
    ],
)
def test_a_client_with_another_silotune_takes_part_and_is_named(tmp_path, report, says):
    path = tmp_path / "members.json"
    write_members(path, {name: 11 + i for i, name in enumerate(NAMES)})
    nodes = clients_by(north=Client("north", report=report))
    played = Played(tmp_path, Nodes(nodes), join=False)
    played.clients = FlowerClients(
        played.grid, NAMES, played.run, played.heard, base_sha256=BASE, roster=Roster(path)
    )
    played.clients.join()
    notes = [note for note in played.heard.notes if "silotune" in note]
    assert [note.startswith(says or "") for note in notes] == ([True] if says else [])
    assert all("\n" not in note for note in notes)
    seen = versions_seen(path)["north"]
    assert seen["version"] == report.get("version", "").replace("\n", " ")
    assert played.go().status(1) == dict.fromkeys(NAMES, "ok")


def test_truncated_rows_are_reported_once(tmp_path):
    cut = Client("north", report={"num_cut": 4, "num_dropped": 1})
    short = Client("south", report={"num_cut": 2})
    played = play(tmp_path, clients_by(north=cut, south=short))
    assert played.heard.notes == [
        "north: 4 rows truncated to train.max_length, "
        "1 of them left out because none of the answer remains",
        "south: 2 rows truncated to train.max_length",
    ]


@pytest.mark.parametrize(
    "process",
    [
        None,
        [],
        {},
        {"id": "x"},
        {"id": "x", "base_loads": "many", "peak_memory_bytes": 1},
        {"id": "x", "base_loads": 1, "peak_memory_bytes": -1},
        {"id": ["x"], "base_loads": 1, "peak_memory_bytes": 1},
    ],
)
def test_what_a_process_says_about_itself_is_left_out_if_it_cannot_be_read(tmp_path, process):
    def train(broadcast):
        parcel = wire.encode_update(update_of("south", broadcast))
        return to_record(Parcel({**parcel.about, "process": process}, parcel.values))

    odd = Client("south", train=train)
    odd.report = to_record(Parcel({"client": "south", "report": REPORT, "process": process}))
    played = play(tmp_path, clients_by(south=odd))
    assert played.status(1)["south"] == "ok"
    assert sorted(p["id"] for p in played.clients.facts()["processes"]) == ["east", "north", "west"]


# --- a client that does not deliver --------------------------------------------------------------


def test_a_silent_client_is_named_with_the_key_and_the_others_continue(tmp_path):
    silent = Client("south", train=lambda b: None if b.round == 1 else honest("south", b))
    began = time.monotonic()
    played = play(tmp_path, clients_by(south=silent))
    assert time.monotonic() - began < 5
    (row,) = played.rows(round=1, client="south")
    assert row["status"] == "timeout"
    assert row["place"] == "no answer within 0.05 s (sampling.timeout_s)"
    assert played.status(2) == dict.fromkeys(NAMES, "ok")
    assert sha256(played.state.adapter) == oracle(tmp_path, absent={(1, "south")})


def honest(name, broadcast):
    return wire.encode_update(update_of(name, broadcast))


def late_by_a_round(grid, node, name):
    """Its answer to round 1 arrives during round 2."""
    held = []
    inner = grid.nodes[node]

    def answer(message):
        if message.metadata.message_type == "train":
            if not held:
                held.append((message, inner(message)))
                return None
            grid.reply(*held[0])
        return inner(message)

    grid.nodes[node] = answer


def test_an_answer_after_the_deadline_is_named_late_in_the_next_round_and_not_used(tmp_path):
    grid = Nodes(clients_by())
    late_by_a_round(grid, 13, "south")
    played = play(tmp_path, grid)
    assert played.status(1)["south"] == "timeout"
    rows = played.rows(round=2, client="south")
    assert sorted(r["status"] for r in rows) == ["late", "ok"]
    (late,) = [r for r in rows if r["status"] == "late"]
    assert late["place"] == "its answer to round 1 came after the deadline and is not used"
    assert sha256(played.state.adapter) == oracle(tmp_path, absent={(1, "south")})


def test_a_late_answer_of_a_client_that_is_not_asked_again_is_named_too(tmp_path):
    run = recipe(rounds=2, sampling={"num_clients": 2, "timeout_s": 0.05, "quorum": 0.5})
    first, second = (
        sample(NAMES, run.sampling, generator(run.seed, "sampling", r)) for r in (1, 2)
    )
    (away, *_) = sorted(set(first) - set(second))
    node = 11 + NAMES.index(away)
    grid, held = Nodes(clients_by()), []
    inner = grid.nodes[node]

    def silent(message):
        if message.metadata.message_type != "train":
            return inner(message)
        held.append((message, inner(message)))
        return None

    grid.nodes[node] = silent
    other = grid.nodes[11 + NAMES.index(second[0])]

    def train(broadcast):
        if broadcast.round == 2:
            grid.reply(*held[0])
        return honest(other.name, broadcast)

    other.train = train
    played = play(tmp_path, grid, run)
    assert played.status(2) == {**dict.fromkeys(second, "ok"), away: "late"}
    assert sha256(played.state.adapter) == oracle(tmp_path, run, absent={(1, away)})


def test_a_late_answer_that_comes_while_a_new_node_is_met_is_named_too(tmp_path):
    """It used to be read as that node's report, and swallowed."""
    grid, held = Nodes(clients_by()), []
    south, west = grid.nodes[13], grid.nodes.pop(14)

    def silent(message):
        if message.metadata.message_type == "train" and not held:
            held.append((message, south(message)))
            return None
        return south(message)

    def reports(message):
        if held:
            grid.reply(*held[0])
        return west(message)

    def east(broadcast):
        grid.nodes[14] = reports
        return honest("east", broadcast)

    grid.nodes[13], grid.nodes[11].train = silent, east
    played = play(tmp_path, grid)
    statuses = sorted((r["client"], r["status"]) for r in played.rows(round=2))
    assert statuses == [
        *(("east", "ok"), ("north", "ok")),
        *(("south", "late"), ("south", "ok"), ("west", "ok")),
    ]


def test_an_exception_at_a_client_leaves_code_and_place_and_its_text_nowhere(tmp_path, capsys):
    def train(broadcast):
        return failing(ValueError(SECRET), round_=broadcast.round)

    played = play(tmp_path, clients_by(south=Client("south", train=train)))
    assert SECRET in capsys.readouterr().err, "its own log has the text"
    (row,) = played.rows(round=1, client="south")
    assert row["status"] == "ValueError"
    assert re.fullmatch(r"client_host\.py:\d+ in guarded", row["place"])
    assert SECRET not in played.everything()
    assert sha256(played.state.adapter) == oracle(tmp_path, absent={(1, "south"), (2, "south")})


def test_our_own_error_at_a_client_keeps_its_text(tmp_path):
    error = UpdateError("client 'south', round 1: 'lora_A' holds NaN or infinity.")
    broken = Client("south", train=lambda b: failing(error, round_=b.round))
    played = play(tmp_path, clients_by(south=broken))
    (row,) = played.rows(round=1, client="south")
    assert (row["status"], row["place"]) == ("training failed", str(error))


CODES = {
    0: "engine error",
    1: "client app not loaded",
    2: "client app failed",
    3: "message lost",
    4: "reply lost",
    5: "not reachable",
    6: "engine error",
    7: "client app refused",
    8: "client app ended",
    99: "engine error",
}


@pytest.mark.parametrize("code", CODES)
def test_flowers_error_codes_have_names_and_its_texts_are_not_shown(tmp_path, code):
    broken = Client("south", train=lambda b: Error(code, f"Traceback: {SECRET}"))
    played = play(tmp_path, clients_by(south=broken))
    (row,) = played.rows(round=1, client="south")
    assert (row["status"], row["place"]) == (CODES[code], f"Flower's error code {code}")
    assert SECRET not in played.everything()


def test_flowers_codes_are_those_of_the_installed_flower():
    """A private table, read here once: an upgrade that renumbers them should be seen."""
    from flwr.common.constant import ErrorCode

    assert {
        ErrorCode.LOAD_CLIENT_APP_EXCEPTION: "client app not loaded",
        ErrorCode.CLIENT_APP_RAISED_EXCEPTION: "client app failed",
        ErrorCode.MESSAGE_UNAVAILABLE: "message lost",
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "reply lost",
        ErrorCode.NODE_UNAVAILABLE: "not reachable",
        ErrorCode.INVALID_FAB: "client app refused",
        ErrorCode.CLIENT_APP_CRASHED: "client app ended",
    } == mailbox.ENGINE_CODES
    assert mailbox.NOT_REACHABLE == ErrorCode.NODE_UNAVAILABLE


def test_a_message_that_flower_does_not_accept_is_named(tmp_path):
    class Refuses(Nodes):
        def push_messages(self, messages):
            ids = super().push_messages(messages)
            kinds = {m.metadata.message_type for m in messages}
            return [None, *ids[1:]] if kinds == {"train"} else ids

    played = play(tmp_path, Refuses(clients_by()))
    assert played.status(1) == {**dict.fromkeys(NAMES, "ok"), "east": "message lost"}


def test_if_flower_accepts_no_message_at_all_everyone_is_named(tmp_path):
    class Refuses(Nodes):
        def push_messages(self, messages):
            kinds = {m.metadata.message_type for m in messages}
            return [] if kinds == {"train"} else super().push_messages(messages)

    with pytest.raises(QuorumError) as caught:
        play(tmp_path, Refuses(clients_by()))
    assert all(f"{n}: message lost: Flower's error code 3" in str(caught.value) for n in NAMES)


def test_a_node_that_is_gone_is_not_waited_for(tmp_path):
    grid = Nodes(clients_by())

    def east(broadcast):
        grid.nodes.pop(13, None)
        return honest("east", broadcast)

    grid.nodes[11].train = east
    run = recipe(sampling__timeout_s=30, runtime__join_timeout_s=30)
    began = time.monotonic()
    played = play(tmp_path, grid, run)
    assert time.monotonic() - began < 10
    (row,) = played.rows(round=2, client="south")
    assert (row["status"], row["place"]) == ("not connected", "its node is gone")
    assert played.status(1)["south"] in ("ok", "not reachable")


@pytest.mark.parametrize("new_id", [99, 13])
def test_a_restarted_client_is_found_under_its_new_node(tmp_path, new_id):
    grid = Nodes(clients_by())
    south = grid.nodes[13]

    def east(broadcast):
        if broadcast.round == 1:
            grid.nodes.pop(13)
        if broadcast.round == 2:
            grid.nodes[new_id] = south
        return honest("east", broadcast)

    grid.nodes[14].train = lambda b: honest("west", b)
    grid.nodes[11].train = east
    played = play(tmp_path, grid, recipe(rounds=3))
    assert [played.status(r)["south"] for r in (2, 3)] == ["not connected", "ok"]


def test_a_client_that_was_restarted_between_two_rounds_misses_none(tmp_path):
    grid = Nodes(clients_by())

    def west(broadcast):
        if broadcast.round == 1:
            grid.nodes[99] = grid.nodes.pop(13)
        return honest("west", broadcast)

    grid.nodes[14].train = west  # the last one that is asked
    played = play(tmp_path, grid)
    assert played.status(1) == played.status(2) == dict.fromkeys(NAMES, "ok")
    assert sha256(played.state.adapter) == oracle(tmp_path)


# --- answers that cannot be used -----------------------------------------------------------------


def changed(broadcast, **facts):
    parcel = honest("south", broadcast)
    return Parcel({"update": {**parcel.about["update"], **facts}}, parcel.values)


def objects(broadcast):
    file = io.BytesIO()
    np.save(file, np.array([print], dtype=object), allow_pickle=True)
    array = Array("float32", (1,), "numpy.ndarray", file.getvalue())
    about = to_record(honest("south", broadcast))["about"]
    return RecordDict({"about": about, "values": ArrayRecord({"values": array})})


UNREADABLE = {
    "an empty record": lambda b: RecordDict(),
    "no JSON": lambda b: RecordDict({"about": ConfigRecord({"about": SECRET})}),
    "nested without end": lambda b: RecordDict({"about": ConfigRecord({"about": "[" * 200_000})}),
    "pickled objects": objects,
    "a report": lambda b: Parcel({"report": REPORT}),
    "a score": lambda b: wire.encode_score(Score("south", 1.0, 1, 1, 1), b.round),
    "an earlier round": lambda b: changed(b, round=b.round - 1),
    "a later round": lambda b: changed(b, round=b.round + 1),
    "a shape beyond all bounds": lambda b: changed(
        b, tensors=[["delta", "lora_A", [2**62, 2**62]]]
    ),
    "no tensors": lambda b: changed(b, tensors=[]),
    "examples beyond all bounds": lambda b: changed(b, num_examples=10**400),
    "metrics that write over a row": lambda b: changed(b, metrics={"round": 1.0, "status": 0.0}),
    "half a character": lambda b: changed(b, settings={"\ud800": 1.0}),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_answer_that_cannot_be_read_is_one_clients_failure_and_ends_nothing(tmp_path, kind):
    played = play(tmp_path, clients_by(south=Client("south", train=UNREADABLE[kind])))
    for r in (1, 2):
        assert played.status(r) == {**dict.fromkeys(NAMES, "ok"), "south": "unreadable"}
    assert SECRET not in played.everything()
    absent = {(1, "south"), (2, "south")}
    assert sha256(played.state.adapter) == oracle(tmp_path, absent=absent)


def test_a_text_far_longer_than_an_answer_needs_is_refused_before_it_is_read(tmp_path, monkeypatch):
    """It is not in a round's bytes, so it has to be small beside them."""
    monkeypatch.setattr(mailbox, "MOST_TEXT", 2000)
    monkeypatch.setattr(mailbox, "TEXT_PER_TENSOR", 100)
    long = Client("south", train=lambda b: changed(b, settings={"x" * 3000: 1.0}))
    played = play(tmp_path, clients_by(south=long), recipe(rounds=1))
    (row,) = played.rows(client="south")
    assert row["status"] == "unreadable"
    assert "a message has a text of" in row["place"]
    assert "at most 2200 are accepted" in row["place"]


def test_the_text_of_a_refusal_is_cut(tmp_path):
    """Bug: 100,000 unknown settings led to an error of 1.5 MB in metrics.jsonl and the log."""
    settings = {f"{'x' * 90}{n}": 1.0 for n in range(100)}
    bad = Client("south", train=lambda b: spoilt(b, settings=settings))
    played = play(tmp_path, clients_by(south=bad), recipe(rounds=1))
    (row,) = played.rows(client="south")
    assert row["status"] == "refused"
    assert len(row["place"]) <= 1000
    assert row["place"].endswith("Use the same recipe at this client.")


def spoilt(broadcast, **changes):
    return wire.encode_update(replace(update_of("south", broadcast), **changes))


def holding(value):
    delta = delta_of("south", 1)
    delta["lora_B"][1, 1] = value
    return delta


REFUSED = {
    "NaN": ({"delta": holding(float("nan"))}, "'lora_B' contains NaN or infinity"),
    "infinity": ({"delta": holding(float("-inf"))}, "'lora_B' contains NaN or infinity"),
    "another rank": (
        {"delta": {"lora_A": torch.zeros(4, 3), "lora_B": torch.ones(3, 2)}},
        "'lora_A' has shape (4, 3), the server expects (2, 3)",
    ),
    "a missing tensor": ({"delta": {"lora_A": torch.zeros(2, 3)}}, "tensor 'lora_B' is missing"),
    "finite, and as large as a float32 can be": (
        {"delta": holding(3e38)},
        "'lora_B' contains a value beyond 65504",
    ),
    "ten thousand times the others": (
        {"delta": {n: t * 1e4 for n, t in delta_of("south", 1).items()}},
        "its delta has norm",
    ),
    "no examples": ({"num_examples": 0}, "no examples"),
    "more examples than it has reported": (
        {"num_examples": 2**53},
        "says that it has 9007199254740992 training rows; it reported 9",
    ),
    "a score over more rows than it has reported": (
        {"score": Score("south", 1e-9, 2**53, 2**53, 2)},
        "its score is over 2 rows and 9007199254740992 predictions; it reported 2 held-out rows, "
        "with at most 512 predictions each",
    ),
    "another mu": ({"settings": {"mu": 9.0}}, "trained with {'mu': 9.0}"),
    "more than asked for": ({"extra": {"controls": START}}, "sends ['controls']"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_update_that_cannot_be_combined_is_refused_by_name(tmp_path, kind):
    changes, text = REFUSED[kind]
    bad = Client("south", train=lambda b: spoilt(b, **changes))
    played = play(tmp_path, clients_by(south=bad), recipe(rounds=1))
    (row,) = played.rows(client="south")
    assert row["status"] == "refused"
    assert "client 'south'" in row["place"]
    assert text in row["place"]
    # whoever was honest is not blamed
    assert {f.client for f in played.heard.failures} == {"south"}
    assert sha256(played.state.adapter) == oracle(tmp_path, recipe(rounds=1), absent={(1, "south")})


@pytest.mark.parametrize(
    "score",
    [
        Score("south", 1e-9, 2**53, 0, 1),
        Score("south", 1.0, 2, 1, 3),
    ],
    ids=["tokens", "rows"],
)
def test_a_score_over_more_than_the_client_reported_is_refused_and_moves_no_curve(tmp_path, score):
    """Bug: one client's `num_tokens = 2**53` was the curve of all, and chose the best round."""
    bad = Client("south", evaluate=lambda b: wire.encode_score(score, b.round))
    run = recipe(evaluate={"every": 2}, rounds=2)
    played = play(tmp_path, clients_by(south=bad), run)
    status = {r["client"]: r["status"] for r in played.rows("evaluate", round=2)}
    assert status == {**dict.fromkeys(NAMES, "ok"), "south": "refused"}
    assert held_out_losses(played.folder.metrics())[2] == 1.5


def test_a_client_cannot_come_back_with_more_rows_than_it_first_reported(tmp_path):
    """Else it would leave and report again, and weigh whatever it likes."""
    grid = Nodes(clients_by())
    played = Played(tmp_path, grid, recipe(rounds=1))
    del grid.nodes[13]
    grid.nodes[23] = Client("south", report={"num_train": 10})
    played.go()
    assert played.status(1)["south"] == "more rows"
    assert played.clients.num_rows()["south"] == {"num_train": 9, "num_eval": 2}


def test_a_node_cannot_answer_in_the_name_of_another(tmp_path):
    def train(broadcast):
        parcel = wire.encode_update(update_of("north", broadcast))
        return Parcel({**parcel.about, "client": "north"}, parcel.values)

    played = play(tmp_path, clients_by(south=Client("south", train=train)), recipe(rounds=1))
    assert played.status(1) == dict.fromkeys(NAMES, "ok")
    rows = {r["client"]: r["num_examples"] for r in played.rows()}
    assert rows == {"east": 4, "north": 5, "south": 5, "west": 4}


def test_too_few_usable_updates_stop_the_run_and_name_the_clients(tmp_path):
    nodes = clients_by(
        east=Client("east", train=lambda b: None),
        north=Client("north", train=lambda b: Error(8, SECRET)),
        south=Client("south", train=lambda b: RecordDict()),
    )
    with pytest.raises(QuorumError) as caught:
        play(tmp_path, nodes)
    text = str(caught.value)
    assert "round 1: 1 usable updates of 4, and sampling.quorum = 0.5 needs 2" in text
    assert "  east: timeout: no answer within 0.05 s (sampling.timeout_s)" in text
    assert "  north: client app ended: Flower's error code 8" in text
    assert "  south: unreadable: a message has no readable text." in text
    assert "west" not in text
    assert SECRET not in text


# --- scoring -------------------------------------------------------------------------------------


def test_scores_come_with_their_names_and_what_they_cost(tmp_path):
    run = recipe(rounds=2, evaluate={"every": 1}, sampling__fraction=0.5)
    played = play(tmp_path, clients_by(), run)
    for behind in (0, 1, 2):
        assert played.status(behind, "evaluate") == dict.fromkeys(NAMES, "ok")
    last = played.rows("evaluate", round=2)
    assert {r["bytes_down"] for r in last} == {4 * NUM_FLOATS}
    assert {r["loss"] for r in last} == {1.5}


def test_clients_that_do_not_score_in_time_are_named(tmp_path):
    run = recipe(rounds=1, evaluate={"every": 1})
    nodes = clients_by(
        north=Client("north", evaluate=lambda b: None),
        south=Client("south", evaluate=lambda b: Error(2, SECRET)),
        west=Client("west", evaluate=lambda b: honest("west", b)),
    )
    played = play(tmp_path, nodes, run)
    places = {r["client"]: (r["status"], r.get("place")) for r in played.rows("evaluate", round=1)}
    assert places == {
        "east": ("ok", None),
        "north": ("timeout", "no answer within 0.05 s (sampling.timeout_s)"),
        "south": ("client app failed", "Flower's error code 2"),
        "west": ("unreadable", "it is not an answer to the evaluate message"),
    }
    assert SECRET not in played.everything()


def test_a_late_score_is_not_taken_for_that_of_another_round(tmp_path):
    """A score does not say its round: the message that it answers does."""
    run = recipe(rounds=2, evaluate={"every": 1}, sampling__num_clients=2)
    cohorts = [sample(NAMES, run.sampling, generator(run.seed, "sampling", r)) for r in (1, 2)]
    absent = sorted(set(NAMES) - set(cohorts[0]))
    name = absent[0]
    node = 11 + NAMES.index(name)
    grid, held = Nodes(clients_by()), []
    inner = grid.nodes[node]

    def answer(message):
        if message.metadata.message_type == "evaluate" and not held:
            wrong = Score(name, 1e6, 1, 0, 1)
            held.append((message, to_record(wire.encode_score(wrong, 1))))
            return None
        if message.metadata.message_type != "query":
            grid.reply(*held[0])
        return inner(message)

    grid.nodes[node] = answer
    played = play(tmp_path, grid, run)
    assert played.status(0, "evaluate")[name] == "timeout"
    assert played.status(2)[cohorts[1][0]] == "ok"
    assert f"{name}: its answer to the evaluate message of round 1 came late" in played.heard.notes
    assert max(r["loss"] for r in played.rows("evaluate", status="ok")) < 1e6
    rows = [(r["event"], r["round"], r.get("client")) for r in played.folder.metrics()]
    assert len(rows) == len(set(rows)), "nobody is named twice"


def test_a_late_score_of_an_earlier_adapter_is_not_taken_for_the_last_ones(tmp_path):
    run = recipe(rounds=1, evaluate={"every": 1}, sampling__num_clients=2)
    cohort = sample(NAMES, run.sampling, generator(run.seed, "sampling", 1))
    name = min(set(NAMES) - set(cohort))
    node = 11 + NAMES.index(name)
    grid, held = Nodes(clients_by()), []
    inner = grid.nodes[node]

    def answer(message):
        if message.metadata.message_type == "evaluate" and not held:
            held.append((message, to_record(wire.encode_score(Score(name, 1e6, 1, 0, 1), 1))))
            return None
        if message.metadata.message_type == "evaluate":
            grid.reply(*held[0])
        return inner(message)

    grid.nodes[node] = answer
    played = play(tmp_path, grid, run)
    assert played.status(0, "evaluate")[name] == "timeout"
    last = played.rows("evaluate", round=1)
    assert [(r["client"], r["loss"]) for r in last] == [(n, 1.5) for n in NAMES]
    assert played.heard.notes == [
        f"{name}: its answer to the evaluate message of round 1 came late"
    ]


def test_an_update_that_comes_while_the_last_adapter_is_scored_is_named(tmp_path):
    run = recipe(rounds=1, evaluate={"every": 1})
    grid, held = Nodes(clients_by()), []
    south = grid.nodes[13]

    def answer(message):
        if message.metadata.message_type == "train":
            held.append((message, south(message)))
            return None
        if message.metadata.message_type == "evaluate":
            grid.reply(*held[0])
        return south(message)

    grid.nodes[13] = answer
    played = play(tmp_path, grid, run)
    assert played.status(1)["south"] == "timeout"
    assert played.status(1, "evaluate") == dict.fromkeys(NAMES, "ok")
    assert played.heard.notes == ["south: its answer to the train message of round 1 came late"]


# --- the server app ------------------------------------------------------------------------------


def context_of(tmp_path, monkeypatch, run, names=NAMES) -> Context:
    folder = RunFolder.create(tmp_path / "run", run)
    folder.save(ServerState(0, START), last=False)
    place = tmp_path / "private"
    place.mkdir()
    monkeypatch.setenv(RUNS, str(tmp_path))
    settings = {
        "clients": list(names),
        "folder": str(folder.path),
        "base_sha256": BASE,
        "local": [],
        "members": None,
    }
    (place / SETTINGS).write_text(json.dumps(settings))
    told = {"recipe": run.model_dump_json(serialize_as_any=True), "run": place.name}
    return Context(1, 1, {}, RecordDict(), told)


def test_the_app_runs_the_rounds_and_leaves_progress_and_outcome(tmp_path, monkeypatch):
    run = recipe(evaluate={"every": 1})
    flower_server.app(Nodes(clients_by()), context_of(tmp_path, monkeypatch, run))
    outcome = read_outcome(tmp_path / "private")
    assert outcome is not None
    assert outcome["num_rows"] == {name: {"num_train": 9, "num_eval": 2} for name in NAMES}
    assert {p["id"] for p in outcome["processes"]} == set(NAMES)
    state = RunFolder.open(tmp_path / "run").load_state()
    assert state is not None
    assert sha256(state.adapter) == oracle(tmp_path)
    heard = Heard()
    follower = Follower(tmp_path / "private", heard)
    follower.follow()
    assert sorted(heard.done) == [(r, name) for r in (1, 2) for name in NAMES]


def test_the_app_leaves_the_error_that_ended_the_rounds(tmp_path, monkeypatch):
    nodes = {11: Client("east", train=lambda b: failing(ValueError(SECRET), b.round, "east"))}
    context = context_of(tmp_path, monkeypatch, recipe())
    with pytest.raises(QuorumError):
        flower_server.app(Nodes(nodes), context)
    with pytest.raises(QuorumError, match=r"east: ValueError: client_host\.py:\d+ in guarded"):
        read_outcome(tmp_path / "private")
    for path in (tmp_path / "private").iterdir():
        assert SECRET not in path.read_text()


def test_a_bug_in_the_app_leaves_its_kind_and_no_text(tmp_path, monkeypatch, capsys):
    class Broken(Nodes):
        def get_node_ids(self):
            raise ZeroDivisionError(SECRET)

    context = context_of(tmp_path, monkeypatch, recipe())
    with pytest.raises(ZeroDivisionError):
        flower_server.app(Broken(), context)
    with pytest.raises(EngineError, match="the server app ended with ZeroDivisionError"):
        read_outcome(tmp_path / "private")
    assert SECRET in capsys.readouterr().err, "the engine's log has the text"
    for path in (tmp_path / "private").iterdir():
        assert SECRET not in path.read_text()


def test_the_app_continues_where_a_checkpoint_ended(tmp_path, monkeypatch):
    run = recipe(rounds=3)
    context = context_of(tmp_path, monkeypatch, run)
    grid = Nodes(clients_by())
    flower_server.app(grid, context)
    whole = RunFolder.open(tmp_path / "run").load_state()
    assert whole is not None
    again = Nodes(clients_by())
    (tmp_path / "private" / "outcome.json").unlink()
    flower_server.app(again, context)
    assert not again.sent("train"), "all rounds are done"


def test_with_a_window_everybody_is_asked_but_few_at_once(tmp_path):
    class Counting(Nodes):
        most = under_way = 0

        def push_messages(self, messages):
            ids = super().push_messages(messages)
            self.under_way += len(ids)
            self.most = max(self.most, self.under_way)
            return ids

        def pull_messages(self, message_ids):
            found = super().pull_messages(message_ids)
            self.under_way -= len(found)
            return found

    grid = Counting(clients_by())
    run = recipe(runtime__join_timeout_s=30.0, sampling__timeout_s=30.0)
    played = play(tmp_path / "few", grid, run, window=2)
    assert grid.most == 2
    assert played.status(1) == dict.fromkeys(NAMES, "ok")
    whole = play(tmp_path / "all", clients_by(), run)
    assert sha256(played.state.adapter) == sha256(whole.state.adapter)


# --- a message of its own for each client ---------------------------------------------------------


def test_each_client_receives_its_own_message_and_one_that_all_share_is_encoded_once(
    tmp_path, monkeypatch
):
    encoded, encode = [], wire.encode_broadcast
    monkeypatch.setattr(wire, "encode_broadcast", lambda sent: encoded.append(sent) or encode(sent))
    received = {}

    def node(name):
        def train(broadcast):
            received[name] = broadcast.adapter
            return wire.encode_update(update_of(name, broadcast))

        return Client(name, train=train)

    grid = Nodes({11 + i: node(name) for i, name in enumerate(NAMES)})
    clients = Played(tmp_path, grid).clients
    own = {name: Broadcast(1, {n: t + i for n, t in START.items()}) for i, name in enumerate(NAMES)}
    answers = list(clients.train(own))
    assert {answer.client for answer in answers} == set(NAMES)
    for name, adapter in received.items():
        assert sha256(adapter) == sha256(own[name].adapter)
    assert len(encoded) == len(NAMES)
    encoded.clear()
    list(clients.train(dict.fromkeys(NAMES, Broadcast(2, START))))
    assert len(encoded) == 1


def test_the_start_goes_along_to_a_client_that_joins_late_and_once_more_after_a_failure(tmp_path):
    """As the reference of preferences, which only the first round's adapter is otherwise."""
    received = {name: [] for name in NAMES}

    def node(name, fails_in=()):
        def train(broadcast):
            received[name].append((broadcast.round, sha256(broadcast.start)))
            if broadcast.round in fails_in:
                return wire.encode_failure(Failure(name, broadcast.round, "x", "y"))
            return wire.encode_update(update_of(name, broadcast))

        return Client(name, train=train)

    grid = Nodes(clients_by(**{name: node(name, (2,) * (name == "south")) for name in NAMES}))
    late = 11 + NAMES.index("west")
    away = grid.nodes.pop(late)
    played = Played(tmp_path, grid, recipe(rounds=4), start=START)

    class Joins(Heard):
        def end_round(self, round_, rows):
            if round_ == 2:
                grid.nodes[late] = away

    played.heard = played.clients.progress = Joins()
    played.go()
    nothing, start = sha256({}), sha256(START)
    assert received["north"] == [(r, nothing) for r in (1, 2, 3, 4)]
    assert received["south"] == [(1, nothing), (2, nothing), (3, start), (4, nothing)]
    assert received["west"] == [(3, start), (4, nothing)]
    down = {row["round"]: row["bytes_down"] for row in played.rows(client="west", status="ok")}
    assert down == {3: 2 * 4 * NUM_FLOATS, 4: 4 * NUM_FLOATS}


# --- what only the server's recipe says ----------------------------------------------------------


def test_the_servers_own_recipe_ends_a_run_although_clients_do_not_see_it(tmp_path):
    run = recipe(
        rounds=9,
        data={"path": "medquad_mini", "validation_fraction": 0.2},
        evaluate={"every": 1},
        checkpoint={"keep": "best"},
        stop={"patience": 1},
        sampling={"timeout_s": 5},
    )
    played = Played(tmp_path, Nodes(clients_by()), run)
    played.clients.run = without_places(run)
    assert played.clients.run.stop.patience is None
    played.folder.save(ServerState(0, START), last=False)
    run_remaining(played.clients, played.folder, local=())
    state = played.folder.load_state()
    assert state is not None
    assert state.round == 3, "all rounds have the same loss: round 2 is not better than round 1"
    assert {row["part"] for row in played.rows("evaluate")} == {"validation"}


# --- private noise --------------------------------------------------------------------------------


def test_private_noise_is_added_at_the_server_of_an_engine_as_in_one_process(tmp_path):
    private = {"unit": "client", "delta": 0.1, "noise_multiplier": 1.0, "noise": "seeded"}
    run = recipe(
        privacy=private,
        algorithm={"weights": "uniform"},
        sampling={"timeout_s": 5},
        runtime={"name": "flower-simulation"},
    )
    cfg, build = ALGORITHMS["fedavg"]
    plain = build(cfg(weights="uniform"))
    num_examples = dict.fromkeys(NAMES, REPORT["num_train"])
    folder = RunFolder.create(tmp_path / "here" / "run", run)
    noisy = with_privacy(plain, run, folder, num_examples)
    first = ServerState(0, START, noisy.init(START, len(NAMES)))
    parts = {"clients": Plain(), "progress": Progress()}
    here = run_rounds(run, first, algorithm=noisy, folder=folder, **parts)

    played = Played(tmp_path / "there", Nodes(clients_by()), run)
    played.folder.save(first, last=False)
    run_remaining(played.clients, played.folder, local=())
    there = played.folder.load_state()
    assert there is not None
    assert there.round == run.rounds
    assert sha256(there.adapter) == sha256(here.adapter)
    assert len((played.folder.path / "privacy.jsonl").read_text().splitlines()) == run.rounds

    other = RunFolder.create(tmp_path / "plain" / "run", run)
    noiseless = run_rounds(run, ServerState(0, START), algorithm=plain, folder=other, **parts)
    assert sha256(noiseless.adapter) != sha256(here.adapter)
