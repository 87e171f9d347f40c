"""Secure sums of real clients with kits, all in this process: what they send, refuse and survive.

The whole path of a message but Flower's processes: server app, records, client app, configuration.
"""

import itertools
import json

import pytest
import tomli_w
from flwr.app import Error, Message
from flwr.serverapp import Grid

import silotune
from silotune.core.errors import QuorumError
from silotune.core.types import ServerState
from silotune.data.clients import load_clients
from silotune.deployment.client_status import Activity
from silotune.federation.operator_log import REFUSED, entries, verify
from silotune.federation.outbound_log import answer_words
from silotune.federation.privacy_guarantee import promise_of
from silotune.federation.progress import Progress
from silotune.federation.recipe_model import load_for
from silotune.federation.run_folder import RunFolder
from silotune.federation.simulated_clients import write_client_configs
from silotune.models.loading import read_adapter
from silotune.privacy.secure_sum.config import SecureSumConfig
from silotune.runtime.client_sums import FILE
from silotune.runtime.flower import client as flower_client
from silotune.runtime.flower import members, resident_worker
from silotune.runtime.flower import server as flower_server
from silotune.runtime.flower.records import from_record, to_record
from silotune.runtime.flower.server import FlowerClients, run_remaining
from silotune.runtime.flower.submit import travelling
from silotune.runtime.payload import Parcel
from silotune.runtime.real_client import Deployed
from tests.conftest import hospital_rows, write_jsonl, write_tiny_recipe
from tests.consortium import Kits

NAMES = [f"hospital-{n}" for n in range(4)]
SUMS = [
    *("rounds=2", "data.max_rows=4", "secure_sum.kind=masks", "secure_sum.range=0.25"),
    *("secure_sum.min_cohort=3", "evaluate.every=0"),
]
TOLD = {
    *("event", "round", "client", "status", "num_examples", "bytes_down", "bytes_up"),
    *("lr", "num_steps"),
}
ROUND = ["query.keys", "query.shares", "train", "query.open"]


class Loopback(Grid):
    """Flower's grid, whose nodes answer at once. `lose` says which messages get no answer."""

    def __init__(self, answer):
        self.answer, self.lose, self.replies = answer, lambda kind, node, round_: False, {}
        self.ids = itertools.count(1)

    def get_node_ids(self):
        return range(11, 11 + len(NAMES))

    def push_messages(self, messages):
        ids = []
        for message in messages:
            ids.append(f"message-{next(self.ids)}")
            about = message.metadata
            about.__dict__["_message_id"] = ids[-1]
            if self.lose(about.message_type, about.dst_node_id, int(about.group_id)):
                content = Error(5, "")
            else:
                content = self.answer(about.message_type, about.dst_node_id, message.content)
            self.replies[ids[-1]] = Message(content, reply_to=message)
        return ids

    def pull_messages(self, message_ids):
        return [self.replies.pop(i) for i in message_ids if i in self.replies]

    run = property(lambda self: None)

    def not_used(self, *args, **kwargs):
        raise AssertionError("silotune waits by itself")

    set_run = create_message = send_and_receive = not_used


class Notes(Progress):
    def __init__(self):
        self.notes, self.failures = [], []

    def note(self, text):
        self.notes.append(text)

    def client_failed(self, failure):
        self.failures.append(failure)


class Hospitals:
    """Four clients with kits, and a server. `meddle` changes what a client is told."""

    def __init__(self, place, recipe, model, monkeypatch, keys):
        self.run = silotune.load_recipe(recipe, [*SUMS, "runtime.name=flower", *keys])
        self.keys = keys
        rows = load_clients(self.run.data, self.run.partition, seed=3, task=self.run.task)
        self.configs = write_client_configs(
            *(place / "clients", rows, self.run),
            model=str(model),
            state=lambda name: place / "states" / name,
        )
        kits = Kits({name: path.parent for name, path in self.configs.items()})
        for name, path in self.configs.items():
            own = {"required": True, "min_cohort": 3, "roster": kits.others(name)}
            path.write_text(path.read_text() + "\n" + tomli_w.dumps({"secure_sum": own}))
        self.kits, self.place = kits, place
        self.workers, self.meddle = {}, lambda kind, name, about: about
        self.restart()
        monkeypatch.setattr(resident_worker, "ask", self.ask)
        self.grid, self.told = Loopback(self.node), Notes()
        self.folder = RunFolder.create(place / "run", self.run)
        first = read_adapter(load_for(self.run))
        self.folder.save(ServerState(0, first), last=False)
        self.own = {
            "recipe": travelling(self.run).model_dump_json(serialize_as_any=True),
            "run": self.folder.run_id(),
        }

    def restart(self, *names):
        """Every client's worker ends, and another one is started by the next message."""
        for name in names or NAMES:
            self.workers.pop(name, None)

    def ask(self, config, parcel, *, round_):
        name = config.parent.name
        if name not in self.workers:
            self.workers[name] = Deployed(config)
        return self.workers[name].answer(parcel)

    def node(self, kind, node, content):
        name, sent = NAMES[node - 11], from_record(content)
        sent = Parcel(self.meddle(kind, name, sent.about), sent.values)
        where = {"client": str(self.configs[name])}
        return to_record(flower_client.pass_on(kind, sent, self.own, where))

    def go(self):
        clients = FlowerClients(self.grid, NAMES, self.run, self.told)
        clients.join()
        run_remaining(clients, self.folder, local=())
        return self.folder.load_state()

    def state(self, name):
        (path,) = (self.place / "states" / name / "runs").rglob(FILE)
        return json.loads(path.read_text())

    def sent(self, name):
        path = self.place / "states" / name / "outbound.jsonl"
        return [line for line in map(json.loads, path.read_text().splitlines()) if "run" in line]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model):
    place = tmp_path_factory.mktemp("recipe")
    path = write_tiny_recipe(place, tiny_model)
    write_jsonl(place / "hospitals.jsonl", hospital_rows(4, 6))
    return path


@pytest.fixture(scope="module")
def here(recipe, tmp_path_factory):
    """The same numbers without masks and messages."""
    place = tmp_path_factory.mktemp("here") / "run"
    done = silotune.run(recipe, [*SUMS, "secure_sum.simulate=true"], out=place)
    return RunFolder.open(done.path).load_state()


@pytest.fixture
def hospitals(request, tmp_path, recipe, tiny_model, monkeypatch):
    from flwr.supercore.task_identity import TaskIdentity

    for key in ("_run_id", "_node_id", "_task_id"):  # Flower makes no `Message` without them
        monkeypatch.setattr(TaskIdentity, key, 1)
    monkeypatch.setattr(flower_server, "POLL_S", (0.001, 0.01))
    monkeypatch.setattr(members, "POLL_S", 0.01)
    keys = getattr(request, "param", ())
    return Hospitals(tmp_path, recipe, tiny_model, monkeypatch, keys)


def equal(one, other):
    return one.adapter.keys() == other.adapter.keys() and all(
        tensor.equal(other.adapter[name]) for name, tensor in one.adapter.items()
    )


def test_real_clients_open_the_sums_of_one_process_and_send_no_number_about_themselves(
    hospitals, here
):
    def restart(kind, name, about):
        if about.get("round") == 2:
            hospitals.restart(name)  # its worker ends between any two messages of this round
        return about

    hospitals.meddle = restart
    assert equal(hospitals.go(), here)
    rows = [row for row in hospitals.folder.metrics() if row["event"] == "train"]
    assert len(rows) == 8
    assert all(set(row) == TOLD for row in rows), rows[0]
    for name in NAMES:
        sent = hospitals.sent(name)
        assert [line["asked"] for line in sent] == ["query", *ROUND, "train", "query.open"]
        assert not any("norm" in line for line in sent)
        assert sent[2]["said"]["shares"] == [other for other in NAMES if other != name]
        others = sent[2]["said"]["shares"]
        assert sent[4]["said"]["opened"] == {"own": NAMES, "masking": [], "shares": others}
        assert sent[6]["said"]["opened"] == {"own": NAMES, "masking": []}
        assert set(sent[3]["said"]["update"]["metrics"]) == {"lr", "num_steps"}
        assert sent[3]["said"]["update"]["score"] is None
        assert hospitals.state(name)["opened"] == 2
    assert not hospitals.told.failures


def test_a_client_killed_in_mid_round_is_left_out_and_one_more_makes_the_round_void(hospitals):
    """One is tolerated, of four; two stop the run before anything is opened, and it resumes."""
    hospitals.grid.lose = lambda kind, node, round_: (
        (kind, node) == ("train", 12)
        or (kind, node, round_) == ("query.open", 11, 2)
        or (kind, node, round_) == ("query.open", 13, 2)
    )
    with pytest.raises(Exception, match="round 2: 1 of 4 clients answered, and a secure sum need"):
        hospitals.go()
    used = {
        (r["round"], r["client"]): r["status"] for r in hospitals.folder.metrics() if "client" in r
    }
    assert used == {(1, n): ("not reachable" if n == NAMES[1] else "ok") for n in NAMES}
    hospitals.grid.lose = lambda kind, node, round_: (kind, node) == ("query.keys", 12)
    state = hospitals.go()
    assert state.round == 2
    assert any("round 2 is void" in note for note in hospitals.told.notes)


def test_too_few_for_a_sum_stop_the_run_before_training_and_it_goes_on_with_fresh_keys(
    hospitals, here
):
    hospitals.grid.lose = lambda kind, node, round_: kind == "query.shares" and node in (12, 13)
    with pytest.raises(QuorumError) as error:
        hospitals.go()
    assert "not asked to train: 2 of 4 clients sent shares, and a secure sum needs 3" in str(
        error.value
    )
    assert "train" not in [line["asked"] for line in hospitals.sent(NAMES[0])]
    hospitals.grid.lose = lambda kind, node, round_: False
    assert equal(hospitals.go(), here)


def test_a_key_that_the_server_made_is_refused_and_the_clients_log_says_why(hospitals, capsys):
    """The authority's key is at the server: it can make a certificate, but not a roster."""
    from silotune.deployment.consortium.certificates import fingerprint, new_key

    mine = new_key()

    def meddle(kind, name, about):
        if kind == "query.shares" and name == NAMES[0] and about["round"] == 1:
            forged = hospitals.kits.certificate(NAMES[1], mine)
            other = {**about["keys"][NAMES[1]], "credential": forged}
            return {**about, "keys": {**about["keys"], NAMES[1]: other}}
        return about

    hospitals.meddle = meddle
    hospitals.go()  # the other three are enough, and the next round has all four
    (failure,) = hospitals.told.failures
    assert (failure.client, failure.code) == (NAMES[0], "refused by the client")
    assert fingerprint(mine.public_key()) in failure.place
    assert hospitals.kits.roster[NAMES[1]] in capsys.readouterr().err
    folder = hospitals.configs[NAMES[0]].parent
    (line,) = entries(folder, REFUSED)
    assert (line["run"], verify(folder).lines) == (hospitals.folder.run_id(), 1)
    assert fingerprint(mine.public_key()) in line["why"]
    last = hospitals.sent(NAMES[0])
    assert "failure" in last[2]["said"]
    assert not any("update" in line["said"] or "opened" in line["said"] for line in last[:3])
    assert [line["asked"] for line in last[3:]] == ROUND


def test_a_client_without_a_roster_takes_no_part_and_says_what_is_missing(hospitals):
    path = hospitals.configs[NAMES[3]]
    path.write_text(path.read_text().split("[secure_sum]")[0])
    clients = FlowerClients(hospitals.grid, NAMES, hospitals.run, hospitals.told)
    clients.join()
    (note,) = (text for text in hospitals.told.notes if text.startswith(NAMES[3]))
    assert "roster in its client.toml is empty" in note
    assert hospitals.kits.roster[NAMES[3]] in note
    said = answer_words(hospitals.sent(NAMES[3])[-1])  # what `join` and `status` print
    assert said.startswith(
        "round 0: failure: declined: client 'hospital-3' does not take part: [se"
    )
    assert hospitals.kits.roster[NAMES[3]] in said


# --- what a server that is not to be trusted may try; with real processes in tests/slow


def refusals(hospitals, name):
    """The reasons in a client's log of operators, which is as it was written."""
    folder = hospitals.configs[name].parent
    verify(folder)
    return [line["why"] for line in entries(folder, REFUSED)]


def test_a_sum_that_is_opened_twice_is_refused_by_everybody_and_written_down_once(hospitals):
    """The difference of the two sums would be one client's change."""
    hospitals.go()
    for node, name in enumerate(NAMES, start=11):
        activity = Activity(hospitals.configs[name].parent, hospitals.place / "states" / name)
        asked = to_record(Parcel({"round": 2, "survivors": NAMES[1:]}))
        for _ in range(2):
            answer = from_record(hospitals.node("query.open", node, asked)).about
            assert answer["failure"]["code"] == "refused by the client"
            assert "opened" not in answer
        (why,) = refusals(hospitals, name)
        assert "has already given its shares for round 2 of this run" in why
        said = list(activity.news())
        assert len(said) == 2
        assert all("has already given its shares for round 2" in text for text in said)


def test_a_client_that_the_server_adds_is_refused_by_everybody_who_does_not_know_it(hospitals):
    """It has a certificate of the authority like everybody else."""
    for name in NAMES[:3]:
        path = hospitals.configs[name]
        known = {n: text for n, text in hospitals.kits.others(name).items() if n != NAMES[3]}
        own = {"required": True, "min_cohort": 3, "roster": known}
        table = tomli_w.dumps({"secure_sum": own})
        path.write_text(path.read_text().split("[secure_sum]")[0] + table)
    with pytest.raises(QuorumError):
        hospitals.go()
    for name in NAMES[:3]:
        (why,) = refusals(hospitals, name)
        assert f"'{NAMES[3]}' is not on this client's roster" in why
        assert not any("update" in line["said"] for line in hospitals.sent(name))


def test_a_recipe_for_plain_updates_is_refused_and_written_down(hospitals):
    plain = hospitals.run.model_copy(update={"secure_sum": SecureSumConfig()})
    hospitals.own["recipe"] = travelling(plain).model_dump_json(serialize_as_any=True)
    answer = from_record(hospitals.node("query", 11, to_record(Parcel({})))).about
    assert answer["failure"]["code"] == "declined"
    (why,) = refusals(hospitals, NAMES[0])
    assert "secure_sum.kind must be 'masks': this client requires it" in why


PRIVATE = [
    *("rounds=1", "algorithm.weights=uniform", "privacy.delta=0.01", "privacy.clip_norm=0.1"),
    *("privacy.noise_multiplier=1", "secure_sum.range=4", "data.max_rows=none"),
]
RECORD = [*PRIVATE, "privacy.unit=record", "train.local_steps=1", "train.optimizer=sgd"]
CLIENT = [*PRIVATE, "privacy.unit=client", "privacy.noise_at=client"]


@pytest.mark.parametrize("hospitals", [RECORD, CLIENT], ids=["record", "client"], indirect=True)
def test_clients_with_noise_of_their_own_are_summed_and_the_promise_is_that_of_one_process(
    hospitals, recipe
):
    hospitals.go()
    rows = [row for row in hospitals.folder.metrics() if row["event"] == "train"]
    assert [row["status"] for row in rows] == ["ok"] * 4
    assert all(
        row.keys() - TOLD <= {"noise_multiplier", "sampling_rate", "num_lots"} for row in rows
    )
    here = silotune.load_recipe(recipe, [*SUMS, *hospitals.keys])
    nums = dict.fromkeys(NAMES, 4)
    promise = promise_of(hospitals.run, nums)
    assert promise == promise_of(here, nums)
    assert promise["sums"]["num_noisy"] == 2, "of min_cohort, one colludes"
    assert promise["sums"]["epsilon"]["pld"] < promise["epsilon"]["pld"]
    for name in NAMES:
        ledger = hospitals.place / "states" / name / "privacy.jsonl"
        assert [json.loads(line)["round"] for line in ledger.read_text().splitlines()] == [1]
