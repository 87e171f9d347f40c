"""Secure sums by messages, without Flower: a relay in memory that may drop, replay and lie.

Every client is rebuilt from its folder for each message, as after a restart of its process.
"""

import contextlib
import json
import stat
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.core.errors import ConfigError, SilotuneError, UpdateError
from silotune.core.types import Failure, ServerState, Update
from silotune.federation.progress import Progress
from silotune.federation.run_folder import RunFolder
from silotune.federation.secure_sum import TENSOR, Numbers
from silotune.privacy.secure_sum.member import threshold_of
from silotune.privacy.secure_sum.opening import NotOpened
from silotune.recipes.parse import parse
from silotune.runtime import client_sums, sum_relay, wire
from silotune.runtime.client_sums import ClientSums
from silotune.runtime.identity import throwaway_of, write_throwaways
from silotune.runtime.payload import Parcel, pack, unpack
from silotune.runtime.sum_relay import Relay
from silotune.runtime.sum_wire import decode_step

NAMES = ["east", "north", "south", "west"]
SEVEN = [f"client-{n}" for n in range(7)]
COUNT = 6


def recipe(**sections):
    table = {
        "rounds": 3,
        "data": {"path": "medquad_mini"},
        "partition": {"by": "source"},
        "evaluate": {"every": 0},
        "sampling": {"quorum": 0.5},
        "runtime": {"name": "flower-simulation"},
        "algorithm": {"weights": "uniform"},
        "secure_sum": {"kind": "masks", "range": 1.0, "min_cohort": 3},
    }
    for key, value in sections.items():
        table[key] = {**table.get(key, {}), **value}
    return parse(table)


class Notes(Progress):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


class Federation:
    """A server and its clients. A test meddles by `gone` and `lie`."""

    def __init__(self, place, names=NAMES, **sections):
        self.run, self.names = recipe(**sections), list(names)
        self.folder = RunFolder.create(place / "run", self.run)
        write_throwaways(self.folder.path, self.names)
        self.gone: set[tuple[str, str]] = set()
        self.lie = lambda kind, name, about: about
        self.asked: list[tuple[str, str]] = []
        self.sent: list[dict] = []
        self.refused: dict[str, str] = {}
        self.relay = self.new_relay()

    def new_relay(self):
        return Relay(self.run, self.folder.run_id(), self.folder, self.ask)

    def client(self, name, run_id=None):
        return ClientSums(
            *(name, self.run, run_id or self.folder.run_id(), self.folder.client_folder(name)),
            *(throwaway_of(self.folder.path, name), self.run.secure_sum.min_cohort),
        )

    def tell(self, kind, name, about):
        """A client's answer, as bytes between two processes; or its failure."""
        asked = unpack(pack(Parcel(about)))
        try:
            answer = self.client(name).answer(kind, asked.about, lambda _: COUNT)
        except SilotuneError as error:
            self.refused[name] = str(error)
            return Failure(name, about["round"], "refused by the client", str(error))
        self.sent.append(answer)
        return decode_step(kind, unpack(pack(Parcel(answer))), name)

    def ask(self, kind, told):
        for name in reversed(list(told)):  # the order of arrival is not that of names
            self.asked.append((kind, name))
            if (kind, name) in self.gone:
                yield name, Failure(name, told[name]["round"], "timeout", "no answer")
            else:
                yield name, self.tell(kind, name, self.lie(kind, name, told[name]))

    def update(self, name, round_):
        made = torch.Generator().manual_seed(31 * self.names.index(name) + round_)
        delta = {"a": torch.rand(2, 2, generator=made) - 0.5, "b": torch.rand(2, generator=made)}
        return Update(name, round_, delta, 3 + self.names.index(name), {}, {})

    def train(self, name, round_, beside):
        """What a client sends in the end, as bytes on their way; None: it is gone, or refuses."""
        if ("train", name) in self.gone:
            return None
        about = self.lie("train", name, {"round": round_, "score": False, **beside})
        try:
            one = self.client(name)
            _, shares = one.taken_from(Parcel(about))
            masked = one.hide(self.update(name, round_), shares)
        except SilotuneError as error:
            self.refused[name] = str(error)
            return None
        parcel = unpack(pack(wire.encode_update(masked)))
        return wire.decode_answer(parcel, name, bytes_down=0)

    def begin_round(self, round_=1, names=None):
        """Everything up to the masked words; spools them."""
        failures, beside = self.relay.begin(round_, names or self.names)
        spool = self.folder.spool(round_)
        for name in beside:
            if (update := self.train(name, round_, beside[name])) is not None:
                spool.add(update)
        return failures, spool

    def open(self, round_, spool):
        words = {u.client: u.delta[TENSOR].numpy().view(np.uint32) for u in spool}
        total = sum(words.values(), np.zeros(COUNT + 1, np.uint32))
        return self.relay.open(round_, list(words), total)

    def plain(self, names, num, round_=1):
        encoded = [Numbers(self.run, num).encode(self.update(n, round_))[0] for n in names]
        return sum(encoded, np.zeros(COUNT + 1, np.uint32))


def test_three_rounds_open_the_sums_of_the_plain_words_bit_for_bit(tmp_path):
    one = Federation(tmp_path)
    for round_ in (1, 2, 3):
        failures, spool = one.begin_round(round_)
        opened, num = one.open(round_, spool)
        assert (failures, num) == ([], 4)
        assert np.array_equal(opened, one.plain(NAMES, 4, round_))
    first = ["query.keys", "query.shares", "query.open"]
    kinds = [kind for kind, _ in one.asked]
    assert kinds == [kind for kind in [*first, "query.open", "query.open"] for _ in NAMES]
    assert not one.refused


def test_any_words_survive_the_wire_bit_for_bit():
    """Also those that are NaN to whoever takes them for float32, signalling ones included."""
    words = torch.tensor([0, -1, 0x7FA00001, 0x7FC00000, -(2**31), 0x7F800001], dtype=torch.int32)
    sent = Update("a", 1, {TENSOR: words}, 1, {}, {})
    got = wire.decode_answer(unpack(pack(wire.encode_update(sent))), "a", bytes_down=0)
    assert got.delta[TENSOR].dtype == torch.int32
    assert got.delta[TENSOR].tolist() == words.tolist()


@pytest.mark.parametrize("step", ["query.keys", "query.shares", "train", "query.open"])
def test_two_of_seven_may_be_killed_at_any_step(tmp_path, step):
    one = Federation(tmp_path, SEVEN)
    one.gone = {(step, SEVEN[1]), (step, SEVEN[5])}
    failures, spool = one.begin_round()
    left = [n for n in SEVEN if n not in (SEVEN[1], SEVEN[5])]
    in_sum = SEVEN if step == "query.open" else left
    opened, num = one.open(1, spool)
    assert num == (5 if step == "query.keys" else 7)
    assert np.array_equal(opened, one.plain(in_sum, num))
    assert len(failures) == (2 if step in ("query.keys", "query.shares") else 0)


@pytest.mark.parametrize("step", ["query.keys", "query.shares"])
def test_with_one_more_gone_before_training_nobody_is_asked_to_train(tmp_path, step):
    one = Federation(tmp_path, SEVEN)
    one.gone = {(step, SEVEN[n]) for n in (1, 3, 5)}
    failures, spool = one.begin_round()
    assert len(failures) == 7
    assert len(spool) == 0
    (why,) = {f.place for f in failures if f.code == "not asked to train"}
    assert why.startswith("4 of 7 clients sent")
    assert why.endswith("a secure sum needs 5")
    one.gone = set()  # they are back: the same round, with fresh keys
    _, spool = one.begin_round()
    assert np.array_equal(one.open(1, spool)[0], one.plain(SEVEN, 7))


def test_with_one_more_gone_while_a_sum_is_opened_it_stays_closed_and_its_round_is_void(tmp_path):
    one = Federation(tmp_path, SEVEN)
    one.gone = {("query.open", SEVEN[n]) for n in (1, 3, 5)}
    _, spool = one.begin_round()
    with pytest.raises(NotOpened, match="4 of 7 clients answered, and a secure sum needs 5") as e:
        one.open(1, spool)
    assert f"{SEVEN[3]}: timeout" in str(e.value)
    assert "Resume the run: this round is then void" in str(e.value)
    one.gone, one.relay, told = set(), one.new_relay(), Notes()
    state = one.relay.settle(ServerState(0, {"a": torch.zeros(1)}), told)
    assert (state.round, len(one.folder.spool(1))) == (1, 0)
    assert "round 1 is void" in told.notes[0]
    saved = one.folder.load_state()
    assert saved is not None
    assert saved.round == 1
    # and if a server tried it all the same: who has given shares does not begin again
    _, spool = one.begin_round(2)
    assert np.array_equal(one.open(2, spool)[0], one.plain(SEVEN, 7, 2))


def test_a_server_killed_before_a_sum_is_opened_begins_again_with_fresh_keys(tmp_path):
    one = Federation(tmp_path)
    _, spool = one.begin_round()
    words = [u.delta[TENSOR].clone() for u in spool]
    one.relay = one.new_relay()
    assert one.relay.settle(ServerState(0, {}), Progress()).round == 0
    assert len(one.folder.spool(1)) == 0, "masked with keys that are gone"
    _, spool = one.begin_round()
    assert not any(torch.equal(a, u.delta[TENSOR]) for a, u in zip(words, spool, strict=True))
    assert np.array_equal(one.open(1, spool)[0], one.plain(NAMES, 4))


def test_a_server_killed_after_a_sum_was_opened_goes_on_with_it(tmp_path):
    one = Federation(tmp_path, SEVEN)
    one.gone = {("train", SEVEN[2])}
    _, spool = one.begin_round()
    opened, num = one.open(1, spool)
    one.relay, one.asked = one.new_relay(), []
    assert one.relay.settle(ServerState(0, {}), Progress()).round == 0
    failures, beside = one.relay.begin(1, [SEVEN[2]])
    assert ([f.client for f in failures], beside) == ([SEVEN[2]], {})
    again, num_again = one.open(1, one.folder.spool(1))
    assert np.array_equal(again, opened)
    assert (num_again, one.asked) == (num, []), "no client is asked twice"


def test_a_client_keeps_secrets_only_as_long_as_it_needs_them_and_for_itself(tmp_path):
    one, seen = Federation(tmp_path), {}
    path = one.folder.client_folder("east") / client_sums.FILE

    def look(kind, name, about):
        if name == "east" and path.exists() and about["round"] == 1:
            seen[kind] = json.loads(path.read_text())["rounds"]["1"]
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        return about

    one.lie = look
    _, spool = one.begin_round()
    one.open(1, spool)
    assert "secrets" in seen["query.shares"]
    assert "secrets" in seen["train"]
    assert "secrets" not in seen["query.open"]
    assert len(seen["query.open"]["held"]) == 4
    left = json.loads(path.read_text())
    assert left["opened"] == 1
    assert {r: own["next"] for r, own in left["rounds"].items()} == {"3": "share", "2": "mask"}
    for round_ in (2, 3):
        _, spool = one.begin_round(round_)
        one.open(round_, spool)
    assert json.loads(path.read_text()) == {"opened": 3, "rounds": {}}


# --- messages that ride on others -----------------------------------------------------------------


@given(st.data())
@settings(deadline=None, max_examples=12)
def test_whoever_is_lost_in_whichever_message_every_sum_is_that_of_the_others(data):
    """Two of seven in each of three rounds, that is with and without keys from earlier rounds."""
    kinds = ["query.keys", "query.shares", "train", "query.open"]
    with tempfile.TemporaryDirectory() as place:
        one = Federation(Path(place), SEVEN)
        for round_ in (1, 2, 3):
            lost = data.draw(st.lists(st.sampled_from(SEVEN), max_size=2, unique=True))
            one.gone = {(data.draw(st.sampled_from(kinds)), name) for name in lost}
            _, spool = one.begin_round(round_)
            opened, num = one.open(round_, spool)
            assert np.array_equal(opened, one.plain(spool.names(), num, round_))
            assert len(spool) >= 5


def test_a_lost_client_is_back_in_the_next_round_with_keys_of_its_own(tmp_path):
    one = Federation(tmp_path, SEVEN)
    one.gone = {("train", SEVEN[2])}
    _, spool = one.begin_round(1)
    one.open(1, spool)
    one.gone, one.asked = set(), []
    _, spool = one.begin_round(2)
    assert np.array_equal(one.open(2, spool)[0], one.plain(SEVEN, 7, 2))
    assert one.asked[0][0] == "query.keys", "not all of the next round's clients had shared"
    one.asked = []
    _, spool = one.begin_round(3)
    assert np.array_equal(one.open(3, spool)[0], one.plain(SEVEN, 7, 3))
    assert {kind for kind, _ in one.asked} == {"query.open"}


@pytest.mark.parametrize("asked", [SEVEN, SEVEN[1:6]], ids=["one more", "one less"])
def test_a_round_of_other_clients_than_those_that_have_shared_begins_with_keys(tmp_path, asked):
    """Members of a consortium come and go between rounds."""
    one = Federation(tmp_path, SEVEN)
    _, spool = one.begin_round(1, SEVEN[:6])
    one.open(1, spool)
    one.asked = []
    _, spool = one.begin_round(2, asked)
    assert one.asked[0][0] == "query.keys"
    opened, num = one.open(2, spool)
    assert np.array_equal(opened, one.plain(asked, len(asked), 2))
    assert num == len(asked)


def test_wrong_keys_for_the_next_round_spoil_neither_this_one_nor_the_next(tmp_path, capsys):
    one = Federation(tmp_path)

    def lie(kind, name, about):
        if (kind, name, about["round"]) == ("query.open", "north", 1):
            keys = about["keys"]
            return {**about, "keys": {**keys, "east": keys["west"]}}
        return about

    one.lie = lie
    _, spool = one.begin_round(1)
    assert np.array_equal(one.open(1, spool)[0], one.plain(NAMES, 4))
    assert "the keys of 'east' are not signed by it for this round" in capsys.readouterr().err
    one.asked = []
    _, spool = one.begin_round(2)
    assert np.array_equal(one.open(2, spool)[0], one.plain(NAMES, 4, 2))
    assert one.asked[0][0] == "query.keys"


def test_where_only_some_clients_are_asked_nothing_rides_ahead(tmp_path):
    one = Federation(tmp_path, sampling={"num_clients": 4})
    for round_ in (1, 2):
        _, spool = one.begin_round(round_)
        assert np.array_equal(one.open(round_, spool)[0], one.plain(NAMES, 4, round_))
    assert [kind for kind, _ in one.asked[::4]] == ["query.keys", "query.shares", "query.open"] * 2


# --- what a client refuses ------------------------------------------------------------------------


def refused_in(one, lie, round_=1):
    """A round with a lie told to north; what north says, and what north sent after that."""
    one.lie = lambda kind, name, about: lie(kind, about) if name == "north" else about
    failures, spool = one.begin_round(round_)
    if len(spool):
        with contextlib.suppress(NotOpened):
            one.open(round_, spool)
    assert set(one.refused) == {"north"}, one.refused
    return one.refused["north"], failures


def changed(kind, part, change):
    def lie(now, about):
        return {**about, part: change(about[part])} if now == kind else about

    return lie


KEYS, OPEN, TRAIN = "query.shares", "query.open", "train"


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (changed(KEYS, "keys", lambda k: {**k, "mallory": k["east"]}), "not on this client's ros"),
        (changed(KEYS, "keys", lambda k: {**k, "east": k["west"]}), "are not signed by it for th"),
        (changed(KEYS, "keys", lambda k: {n: k[n] for n in k if n != "north"}), "own keys"),
        (changed(KEYS, "keys", lambda k: {n: k[n] for n in ("east", "north")}), "fewer than 3"),
        (changed(KEYS, "round", lambda r: r + 5), "has not exchanged keys"),
        (changed(TRAIN, "round", lambda r: r + 5), "has not exchanged keys"),
        (changed(TRAIN, "shares", lambda s: dict(list(s.items())[:1])), "only 2 clients of 4"),
        (
            changed(TRAIN, "shares", lambda s: {**s, "east": s["west"]}),
            "the shares of 'east' were changed",
        ),
        (changed(OPEN, "survivors", lambda s: [n for n in s if n != "north"]), "were sent"),
        (changed(OPEN, "survivors", lambda s: [*s, "mallory"]), "'mallory', which has no mask"),
        (changed(OPEN, "survivors", lambda s: ["north", "east"]), "over 2 of 4 clients only"),
        (changed(OPEN, "round", lambda r: r + 5), "has not exchanged keys"),
    ],
)
def test_a_client_refuses_a_lie_with_a_clear_error_and_sends_nothing_more(tmp_path, lie, said):
    one = Federation(tmp_path)
    why, _ = refused_in(one, lie)
    assert said in why
    assert why.startswith("client 'north', round ")
    assert "Ask who runs the server" in why
    if "has not exchanged" in said:  # another round's message does not end this one
        return
    one.lie = lambda kind, name, about: about
    for kind, about in (("query.open", {"survivors": NAMES}), ("query.shares", {"keys": {}})):
        assert isinstance(one.tell(kind, "north", {"round": 1, **about}), Failure)
    assert one.train("north", 1, {"shares": {}}) is None


def test_a_second_question_is_refused_whether_it_names_others_or_the_same(tmp_path):
    one = Federation(tmp_path)
    _, spool = one.begin_round()
    one.open(1, spool)
    for survivors in (NAMES, NAMES[:3]):
        answer = one.tell("query.open", "north", {"round": 1, "survivors": survivors})
        assert isinstance(answer, Failure)
        assert "has already given its shares for round 1" in answer.place


def test_a_round_that_a_client_has_opened_is_not_begun_again_nor_an_earlier_one(tmp_path):
    """Else the sums over 4 and over 3 clients would differ by one client's change."""
    one = Federation(tmp_path)
    for round_ in (1, 2):
        _, spool = one.begin_round(round_)
        one.open(round_, spool)
    for round_ in (1, 2):
        answer = one.tell("query.keys", "north", {"round": round_})
        assert isinstance(answer, Failure)
        assert "has already given its shares for round 2" in answer.place
    assert not isinstance(one.tell("query.keys", "north", {"round": 3}), Failure)


def test_a_client_trains_and_masks_once(tmp_path):
    one = Federation(tmp_path)
    one.begin_round()
    assert one.train("north", 1, {"shares": {}}) is None
    assert "has sent its numbers before" in one.refused["north"]


def test_keys_of_another_round_or_run_do_not_pass_as_those_of_this_one(tmp_path):
    one, old = Federation(tmp_path), {}

    def remember(kind, name, about):
        if kind == "query.shares":
            old.update(about["keys"])
        return about

    one.lie = remember
    _, spool = one.begin_round(1)
    one.open(1, spool)
    one.relay = one.new_relay()  # which asks for keys again
    why, _ = refused_in(one, changed(KEYS, "keys", lambda k: {**k, "east": old["east"]}), 2)
    assert "the keys of 'east' are not signed by it for this round" in why
    other = one.client("east", run_id="other").answer("query.keys", {"round": 3}, lambda _: COUNT)
    other = other["keys"]["3"]
    one.refused, one.relay = {}, one.new_relay()
    why, _ = refused_in(one, changed(KEYS, "keys", lambda k: {**k, "east": other}), 3)
    assert "the keys of 'east' are not signed by it for this round" in why


def test_two_cohorts_cannot_both_be_opened(tmp_path):
    """The server tells half of the clients that west has dropped out."""
    one = Federation(tmp_path)
    one.begin_round()
    given = {}
    for name, survivors in (("east", NAMES), ("north", NAMES), ("south", NAMES[:3])):
        given[name] = one.tell("query.open", name, {"round": 1, "survivors": survivors})["opened"]
    own = sum("west" in each["own"] for each in given.values())
    masking = sum("west" in each["masking"] for each in given.values())
    assert (own, masking) == (2, 1)
    assert max(own, masking) < threshold_of(4)
    assert isinstance(one.tell("query.open", "west", {"round": 1, "survivors": NAMES[:3]}), Failure)


@pytest.mark.parametrize(
    ("kind", "about"),
    [
        ("query.shares", {"keys": 3}),
        ("query.shares", {"keys": {"east": {"channel": "00"}}}),
        ("query.shares", {}),
        ("query.open", {"survivors": "east"}),
        ("query.open", {"survivors": [1]}),
    ],
)
def test_a_message_of_another_form_is_an_error_without_its_values(tmp_path, kind, about):
    one = Federation(tmp_path)
    one.begin_round()
    with pytest.raises(UpdateError, match="a message cannot be read"):
        one.client("north").answer(kind, {"round": 1, **about}, lambda _: COUNT)


# --- what a server refuses ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("query.keys", {"keys": {"channel": "00"}}),
        ("query.keys", {}),
        ("query.keys", {"keys": {}, "report": {}}),
        ("query.shares", {"shares": {"east": "00"}}),
        ("query.shares", {"shares": {}}),
        ("query.open", {"opened": {"own": {"east": "zz"}, "masking": {}}}),
        ("query.open", {"opened": []}),
    ],
)
def test_a_client_that_answers_nonsense_is_left_out_by_name(tmp_path, kind, answer):
    one = Federation(tmp_path)
    honest = one.tell

    def tell(now, name, about):
        if (now, name) != (kind, "west"):
            return honest(now, name, about)
        try:
            return decode_step(now, unpack(pack(Parcel(answer))), name)
        except UpdateError as error:
            return Failure(name, 1, "unreadable", str(error))

    one.tell = tell
    failures, spool = one.begin_round()
    opened, _ = one.open(1, spool)
    in_sum = NAMES if kind == "query.open" else NAMES[:3]
    assert np.array_equal(opened, one.plain(in_sum, 3 if kind == "query.keys" else 4))
    assert [f.client for f in failures] == ([] if kind == "query.open" else ["west"])


def test_too_small_a_cohort_is_refused_before_anybody_is_asked(tmp_path):
    one = Federation(tmp_path, secure_sum={"min_cohort": 5})
    with pytest.raises(ConfigError, match=r"asks 4 clients, and secure_sum.min_cohort is 5"):
        one.begin_round()
    assert not one.asked


def test_a_damaged_opened_sum_is_not_used(tmp_path):
    one = Federation(tmp_path)
    _, spool = one.begin_round()
    one.open(1, spool)
    (one.folder.path / sum_relay.WORDS).write_bytes(b"\0" * 4 * (COUNT + 1))
    with pytest.raises(NotOpened, match="is damaged"):
        one.open(1, spool)


def test_rows_weigh_and_a_client_with_more_rows_than_allowed_sends_nothing(tmp_path):
    one = Federation(
        tmp_path, algorithm={"weights": "examples"}, secure_sum={"range": 1.0, "max_examples": 5}
    )
    _, spool = one.begin_round()
    assert "more than secure_sum.max_examples = 5" in one.refused["west"]
    opened, _ = one.open(1, spool)
    assert opened[-1] == 3 + 4 + 5


# --- a server that is killed between any two messages ---------------------------------------------


class Killed(Exception):
    """Stands for kill -9: nothing after it runs in this process."""


@pytest.mark.parametrize("at", range(24))
def test_a_server_killed_at_any_message_of_two_rounds_goes_on_to_right_sums(tmp_path, at):
    """Every sum that is opened is right, no client helps to open a round twice, and the end comes.

    Three messages of four clients in each round without keys ahead. A round may end up void, but
    only if clients had been asked to open it.
    """
    one = Federation(tmp_path, sampling={"num_clients": 4})
    honest, said, opened = one.tell, 0, {}

    def tell(kind, name, about):
        nonlocal said
        said += 1
        if said == at + 1:
            raise Killed
        answer = honest(kind, name, about)
        if kind == "query.open" and not isinstance(answer, Failure):
            opened.setdefault((name, about["round"]), []).append(about["survivors"])
        return answer

    one.tell = tell
    done, killed, void = 0, 0, []
    while done < 2:
        try:
            _, spool = one.begin_round(done + 1)
            total, num = one.open(done + 1, spool)
        except Killed:
            killed += 1
            one.relay = one.new_relay()
            state = one.relay.settle(ServerState(done, {"a": torch.zeros(1)}), Progress())
            void += range(done + 1, state.round + 1)
            done = state.round
            continue
        assert np.array_equal(total, one.plain(NAMES, num, done + 1))
        done += 1
    assert killed == 1
    assert all(len(asked) == 1 for asked in opened.values()), "a client has opened a round twice"
    assert void == ([at // 12 + 1] if at % 12 >= 8 else [])
