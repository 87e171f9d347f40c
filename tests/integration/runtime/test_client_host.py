"""Answers where the rows are: bits as in the plain loop, one model for all, no rows in errors."""

import fcntl
import json
import math
import re
import shutil
import sys
import threading
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
import torch

from silotune.core.atomic_files import load_tensors, save_tensors
from silotune.core.errors import (
    BudgetSpent,
    DataError,
    Declined,
    DiskError,
    QuorumError,
    SilotuneError,
    UpdateError,
)
from silotune.core.installed import code_sha256, version
from silotune.core.seeds import generator
from silotune.core.tree import l2_norm, sha256, size_bytes
from silotune.core.types import Broadcast, Failure, News, Score, Update
from silotune.data.chat_templates import set_template
from silotune.data.clients import load_clients
from silotune.data.conversations import conversation
from silotune.federation.client import Worker, score, take_part
from silotune.federation.client_config import load_client_config
from silotune.federation.client_memory import load_memory
from silotune.federation.client_recipe import own_rows
from silotune.federation.ledger import lines
from silotune.federation.prepared_rows import prepare_client
from silotune.federation.recipe_model import load_for
from silotune.federation.run_folder import RunFolder
from silotune.models.loading import load_model, num_base_loads, read_adapter
from silotune.models.sources import content_hash
from silotune.privacy.accountant import Steps, spent_in_all
from silotune.privacy.base import PrivacyConfig
from silotune.recipes.parse import load_recipe, parse
from silotune.runtime import wire
from silotune.runtime.client_host import Place, Station, failure_from, guarded
from silotune.runtime.flower import client as flower_client
from silotune.runtime.flower import resident_worker
from silotune.runtime.flower.strategy import algorithm_of
from silotune.runtime.payload import Parcel, pack, round_of, unpack
from silotune.runtime.real_client import Deployed
from silotune.training.tasks.instruct import INSTRUCT
from tests.conftest import write_jsonl, write_tiny_recipe
from tests.tiny_encoders import build_tiny_encoder

SECRET = "patient 4711 has measles"


# --- errors --------------------------------------------------------------------------------------


def caught(work) -> BaseException:
    try:
        work()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def failing(error):
    def work():
        raise error

    return work


class Speaks:
    """Raises in user code that silotune calls."""

    def __str__(self):
        raise ValueError(SECRET)


def test_the_place_is_the_innermost_line_of_silotune():
    error = caught(lambda: generator(1, Speaks()))  # type: ignore[arg-type]
    failure = failure_from(error, client="north", round_=3)
    assert (failure.client, failure.round, failure.code) == ("north", 3, "ValueError")
    assert re.fullmatch(r"seeds\.py:\d+ in \w+", failure.place)
    assert failure.fix == ""


def test_the_place_of_our_own_error_is_where_it_was_raised():
    row = {"question": SECRET, "answer": ""}
    failure = failure_from(caught(lambda: conversation(row, where=SECRET)), client="n", round_=1)
    assert failure.code == "EmptyRowError"
    assert re.fullmatch(r"cells\.py:\d+ in \w+", failure.place)
    assert failure.fix == "the reason is in this client's log"


def test_without_a_line_of_silotune_the_last_line_is_the_place():
    failure = failure_from(caught(failing(KeyError(SECRET))), client="n", round_=1)
    assert re.fullmatch(r"test_client_host\.py:\d+ in work", failure.place)


def test_without_any_line_the_place_is_unknown():
    assert failure_from(KeyError(SECRET), client="n", round_=1).place == "unknown place"


class Silent(Exception):
    """Even its text fails."""

    def __str__(self):
        raise RuntimeError(SECRET)


class OwnUpdateError(UpdateError):
    """Not ours: its text may hold anything."""


def chained():
    try:
        raise ValueError(SECRET)
    except ValueError as error:
        raise UpdateError("client 'n': 'lora_A' is wrong") from error


NOT_TOLD = [
    ValueError(SECRET),
    KeyError(SECRET),
    OSError(2, SECRET, SECRET),
    UnicodeDecodeError("utf-8", SECRET.encode(), 0, 1, SECRET),
    MemoryError(SECRET),
    RecursionError(SECRET),
    AssertionError(SECRET),
    StopIteration(SECRET),
    Silent(SECRET),
    ExceptionGroup(SECRET, [ValueError(SECRET)]),
    SilotuneError(SECRET),
    DataError(SECRET),
    QuorumError(SECRET),
    OwnUpdateError(SECRET),
]


@pytest.mark.parametrize("error", NOT_TOLD, ids=lambda e: type(e).__name__)
def test_the_text_of_an_exception_stays_here(error, capsys):
    answer = guarded(failing(error), client="north", round_=2)
    parcel = unpack(pack(answer))
    assert SECRET not in json.dumps(parcel.about)
    assert "4711" not in json.dumps(parcel.about)
    assert parcel.values.size == 0
    failure = wire.decode_answer(parcel, "north", bytes_down=0)
    assert isinstance(failure, Failure)
    assert (failure.code, failure.round) == (type(error).__name__, 2)
    ours = isinstance(error, SilotuneError)
    assert failure.fix == ("the reason is in this client's log" if ours else "")
    if not isinstance(error, Silent):
        assert SECRET in capsys.readouterr().err, "the log on this side has it"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UpdateError("client 'n', round 2: 'a' holds NaN"), "training failed"),
        (Declined("client 'n' does not take part:\n  rounds = 9 is above"), "declined"),
        (BudgetSpent("client 'n', round 2: this round would spend"), "privacy budget spent"),
    ],
)
def test_texts_that_hold_only_names_are_passed_on(error, code):
    failure = failure_from(caught(failing(error)), client="north", round_=2)
    assert (failure.code, failure.place) == (code, str(error))


def test_a_failure_is_reported_even_if_its_text_cannot_be_logged(monkeypatch):
    """On a full disk the log could not be written, and the worker ended without saying why."""

    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    answer = guarded(failing(DiskError("full")), client="north", round_=2)
    assert answer.about["failure"]["code"] == "DiskError"


def test_a_cause_is_not_passed_on():
    answer = guarded(chained, client="n", round_=1)
    failure = wire.decode_answer(answer, "n", bytes_down=0)
    assert isinstance(failure, Failure)
    assert failure.place == "client 'n': 'lora_A' is wrong"


def test_a_text_that_is_too_long_is_truncated_here():
    long = UpdateError("x" * 5000)
    named = type("E" * 300, (Exception,), {})()
    for error in (long, named):
        parcel = guarded(failing(error), client="n", round_=1)
        assert isinstance(wire.decode_answer(parcel, "n", bytes_down=0), Failure)


def test_an_answer_carries_the_name_of_its_client():
    answer = guarded(lambda: Parcel({"report": {}, "client": "mallory"}), client="n", round_=1)
    assert answer.about == {"report": {}, "client": "n"}
    assert guarded(failing(ValueError()), client="n", round_=1).about["client"] == "n"


def test_the_end_of_the_process_is_not_a_failure():
    with pytest.raises(KeyboardInterrupt):
        guarded(failing(KeyboardInterrupt()), client="n", round_=1)


# --- a station -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model):
    return load_recipe(write_tiny_recipe(tmp_path_factory.mktemp("recipe"), tiny_model))


@pytest.fixture(scope="module")
def rows(run):
    return load_clients(run.data, run.partition, seed=run.seed)


@pytest.fixture(scope="module")
def base(run):
    """The first adapter and a separate worker: the oracle."""
    loaded = load_model(run.model, run.adapter, seed=run.seed, device="cpu")
    set_template(loaded.tokenizer)
    return Worker(loaded, INSTRUCT, run, algorithm_of(run.algorithm)), read_adapter(loaded)


def ask(station, kind, client, broadcast=None):
    """A message and its answer, as bytes between two processes."""
    sent = wire.encode_broadcast(broadcast) if broadcast else Parcel({})
    parcel = unpack(pack(station.answer(kind, client, unpack(pack(sent)))))
    return parcel, parcel if broadcast is None else wire.decode_answer(
        Parcel({k: v for k, v in parcel.about.items() if k != "process"}, parcel.values),
        client,
        bytes_down=sent.values.nbytes,
    )


def test_a_client_makes_the_first_adapter_and_starts_from_it(run, rows, base, tmp_path):
    """The message of the first round says that nothing is new; the update is the same."""
    _, adapter = base
    name = next(iter(rows))
    own = tmp_path / name
    place = Place(run, rows.__getitem__, tmp_path.joinpath, holds_adapters=True)
    station = Station(place)
    about, _ = ask(station, "query", name)
    assert about.about["report"]["first_sha256"] == sha256(adapter)
    first = Broadcast(1, {}, news=News(0, (), {}))
    _, got = ask(station, "train", name, first)
    shutil.rmtree(own)
    _, want = ask(station, "train", name, Broadcast(1, adapter))
    assert sha256(got.delta) == sha256(want.delta)
    assert (got.bytes_down, want.bytes_down) == (0, size_bytes(adapter))
    # what came later is not replaced by the first one
    ask(station, "evaluate", name, Broadcast(2, adapter))
    with pytest.raises(UpdateError, match="holds that of round 1"):
        ask(again := Station(place), "train", name, first)
    shutil.rmtree(own)
    _, got = ask(again, "train", name, first)
    assert sha256(got.delta) == sha256(want.delta), "a client that has lost its folder makes it too"


def test_a_station_gives_the_bits_of_the_plain_loop_and_loads_the_base_once(
    run, rows, base, tmp_path
):
    worker, adapter = base
    asked_for = []

    def rows_of(name):
        asked_for.append(name)
        return rows[name]

    loads = num_base_loads()
    station = Station(Place(run, rows_of, lambda name: tmp_path / "station" / name))
    clients = list(rows)
    assert len(clients) == 3
    for round_ in (1, 2):
        for name in clients:
            sent = Broadcast(round_, adapter, score=round_ == 1)
            _, got = ask(station, "train", name, sent)
            data = prepare_client(rows[name], worker)
            want = take_part(worker, data, sent, tmp_path / "plain" / name)
            assert isinstance(got, Update)
            assert sha256(got.delta) == sha256(want.delta)
            timed = {"seconds", "seconds_training"}
            assert {k: v for k, v in got.metrics.items() if k not in timed} == {
                k: v for k, v in want.metrics.items() if k not in timed
            }
            for key in ("client", "round", "num_examples", "settings", "extra", "score"):
                assert getattr(got, key) == getattr(want, key), key
            assert (got.bytes_up, got.bytes_down) == (want.bytes_up, want.bytes_down)
            sums = {n: adapter[n] + got.delta[n] for n in adapter}
            _, scored = ask(station, "evaluate", name, Broadcast(round_ + 1, sums))
            memory = load_memory(tmp_path / "plain" / name, round_ + 1)
            ours = score(worker, data, Broadcast(round_ + 1, sums), memory)
            assert scored == replace(ours, size_bytes=got.bytes_down)
    assert num_base_loads() == loads + 1
    assert asked_for == clients, "rows are read and tokenized once"
    kept = [
        sorted(p.relative_to(tmp_path / who) for p in (tmp_path / who).rglob("*.safetensors"))
        for who in ("station", "plain")
    ]
    assert kept[0] == kept[1]


def test_a_query_is_answered_with_only_counts_and_fingerprints(
    run, rows, base, tmp_path, tiny_model
):
    station = Station(Place(run, rows.__getitem__, lambda name: tmp_path / name))
    parcel, _ = ask(station, "query", "hospital-1")
    data = prepare_client(rows["hospital-1"], base[0])
    report = wire.decode_report(parcel, "hospital-1")
    assert report == {
        "num_train": len(data.examples),
        "num_eval": data.scored.num_rows,
        "num_cut": 0,
        "num_dropped": 0,
        "base_sha256": content_hash(tiny_model),
        "dtype": str(station.worker.loaded.dtype),
        "quantization": "none",
        "optimizer": run.train.optimizer,
        "threads": 1,
        "rank": run.adapter.rank,
        "version": version(),
        "first_sha256": sha256(base[1]),
        "code_sha256": code_sha256(),
    }
    process = wire.decode_process(parcel)
    assert process["base_loads"] == num_base_loads()
    assert process["peak_memory_bytes"] > 10**7
    assert parcel.values.size == 0
    assert set(parcel.about) == {"report", "process"}, "nothing about the rows"


def test_an_unknown_client_a_broken_message_and_another_adapter_are_failures(
    run, rows, base, tmp_path
):
    station = Station(Place(run, rows.__getitem__, lambda name: tmp_path / name))
    _, adapter = base
    good = wire.encode_broadcast(Broadcast(1, adapter))
    fewer = wire.encode_broadcast(Broadcast(1, dict(list(adapter.items())[1:])))
    for client, parcel, code in (
        ("mallory", good, "KeyError"),
        ("hospital-0", Parcel({}), "training failed"),
        ("hospital-0", Parcel(good.about, good.values[:-1]), "training failed"),
        ("hospital-0", fewer, "training failed"),
    ):
        answer = guarded(
            lambda c=client, p=parcel: station.answer("train", c, p), client=client, round_=1
        )
        failure = wire.decode_answer(answer, client, bytes_down=0)
        assert isinstance(failure, Failure)
        assert failure.code == code, failure
    _, got = ask(station, "train", "hospital-0", Broadcast(1, adapter))
    assert isinstance(got, Update), "and the station continues"


def test_a_client_whose_training_ends_in_nan_says_so_and_keeps_nothing(run, rows, base, tmp_path):
    wild = run.model_copy(
        update={"train": run.train.model_copy(update={"lr": 1e30, "clip_norm": 0.0})}
    )
    station = Station(Place(wild, rows.__getitem__, lambda name: tmp_path / name))
    sent = wire.encode_broadcast(Broadcast(1, base[1]))
    answer = guarded(
        lambda: station.answer("train", "hospital-0", sent), client="hospital-0", round_=1
    )
    failure = wire.decode_answer(answer, "hospital-0", bytes_down=0)
    assert isinstance(failure, Failure)
    assert failure.code == "training failed"
    assert "hospital-0" in failure.place
    assert not list(tmp_path.rglob("*.safetensors"))


# --- who answers a message -----------------------------------------------------------------------


def test_in_simulation_the_number_of_a_node_names_the_client(run, base, tmp_path):
    folder = RunFolder.create(tmp_path / "run", run)
    names = ["hospital-0", "hospital-1", "hospital-2"]
    settings = {
        "recipe": run.model_dump_json(serialize_as_any=True),
        "clients": json.dumps(names),
        "folder": str(folder.path),
        "run": "a1",
    }
    sent, loads = wire.encode_broadcast(Broadcast(1, base[1])), num_base_loads()
    flower_client._station.cache_clear()
    try:
        for number, name in enumerate(names):
            answer = flower_client.pass_on("train", sent, settings, {"partition-id": number})
            got = wire.decode_answer(answer, name, bytes_down=0)
            assert isinstance(got, Update)
            assert answer.about["client"] == name
            assert [p.parent.name for p in folder.client_folder(name).glob("*.safetensors")] == [
                name
            ]
        assert num_base_loads() == loads + 1, "one model for all clients of an actor"
        nobody = {**settings, "clients": json.dumps(["hospital-9"])}
        answer = flower_client.pass_on("train", sent, nobody, {"partition-id": 0})
        failure = wire.decode_answer(answer, "hospital-9", bytes_down=0)
        assert isinstance(failure, Failure)
        assert (failure.code, failure.round) == ("KeyError", 1)
    finally:
        flower_client._station.cache_clear()


def test_in_deployment_the_clients_own_worker_is_asked(run, base, monkeypatch):
    asked = []

    def ask(config, parcel, *, round_):
        asked.append((config, parcel, round_))
        return Parcel({"report": {}})

    monkeypatch.setattr(resident_worker, "ask", ask)
    settings = {"recipe": "the recipe", "run": "a1", "clients": "[]", "folder": "/srv/run"}
    sent = wire.encode_broadcast(Broadcast(5, base[1]))
    flower_client.pass_on("train", sent, settings, {"client": "/own/client.toml"})
    ((config, parcel, round_),) = asked
    assert (config, round_) == (Path("/own/client.toml"), 5)
    assert parcel.about == {
        "kind": "train",
        "recipe": "the recipe",
        "run": "a1",
        "parcel": sent.about,
    }
    assert parcel.values is sent.values


# --- in deployment: the client's own configuration -----------------------------------------------


@pytest.fixture
def own(tmp_path, tiny_model):
    """A client's own folder; call it with changed limits."""
    write_jsonl(
        tmp_path / "rows.jsonl",
        [{"question": f"What is a{i}?", "answer": f"It is a{i}."} for i in range(8)],
    )

    def write(**limits) -> Path:
        table = {
            "name": "hospital-0",
            "model": str(tiny_model),
            # a seed of its own: otherwise the split of a private run follows from a secret
            "data": {"path": "rows.jsonl", "split_seed": 3},
            "runtime": {"device": "cpu", "threads": 1},
            "limits": limits,
        }
        path = tmp_path / "client.toml"
        path.write_text(tomli_w.dumps(table), encoding="utf-8")
        return path

    return write


def num_train(run, path):
    """Of the eight rows, those that are not held out."""
    return len(own_rows(run, load_client_config(path)).train)


def message(run, kind, parcel=None, run_id="a1"):
    parcel = parcel or Parcel({})
    recipe = run.model_dump_json(serialize_as_any=True)
    asked = {"kind": kind, "recipe": recipe, "run": run_id, "parcel": parcel.about}
    return Parcel(asked, parcel.values)


def test_a_deployed_client_keeps_its_model_while_nothing_changes(run, own, base):
    client, loads = Deployed(own()), num_base_loads()
    report = client.answer(message(run, "query")).about["report"]
    assert report["num_train"] == num_train(run, own()) < 8
    for round_ in (1, 2):
        sent = wire.encode_broadcast(Broadcast(round_, base[1]))
        answer = client.answer(message(run, "train", sent))
        got = wire.decode_answer(answer, "hospital-0", bytes_down=0)
        assert isinstance(got, Update), got
        assert answer.about["client"] == "hospital-0"
    scored = client.answer(message(run, "evaluate", sent))
    assert isinstance(wire.decode_answer(scored, "hospital-0", bytes_down=0), Score)
    assert num_base_loads() == loads + 1
    client.answer(message(run, "query", run_id="b2"))
    assert num_base_loads() == loads + 2, "another run keeps its memory elsewhere"
    kept = own().parent / "state" / "runs"
    assert [p.name for p in sorted(kept.iterdir())] == ["a1"]


def test_a_client_trains_on_its_own_number_of_processes(run, own, base, tmp_path):
    """Its client.toml decides, not the recipe; with record-level privacy it declines."""
    whole = run.model_copy(update={"adapter": run.adapter.model_copy(update={"dropout": 0.0})})
    path = own()
    one = answered(Deployed(path), train(whole, 1, base[1]))
    table = tomllib.loads(path.read_text())
    table["runtime"] |= {"client_processes": 2, "threads": 2}
    table["state"] = "elsewhere"
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    client = Deployed(path)
    try:
        two = answered(client, train(whole, 1, base[1]))
    finally:
        client.close()
    assert one.delta.keys() == two.delta.keys()
    for name, value in one.delta.items():
        torch.testing.assert_close(two.delta[name], value, rtol=0, atol=1e-5)
    asked = message(private(run, RECORD), "query")
    assert "runtime.client_processes = 1" in refusal(client, asked).place


@pytest.mark.parametrize("stored", [False, True])
def test_a_run_that_began_with_another_choice_of_held_out_rows_is_declined(
    run, own, base, stored, tmp_path
):
    """Otherwise a new version would score on rows that the former one has trained on."""
    path = own()
    if stored:  # then no version chooses
        shutil.copy(tmp_path / "rows.jsonl", tmp_path / "held.jsonl")
        table = tomllib.loads(path.read_text())
        table["data"]["eval_path"] = "held.jsonl"
        path.write_text(tomli_w.dumps(table), encoding="utf-8")
    answered(Deployed(path), train(run, 1, base[1]))
    answered(Deployed(path), train(run, 2, base[1]))
    memory = sorted((tmp_path / "state").rglob("round-*.safetensors"))[-1]
    tensors, about = load_tensors(memory)
    save_tensors(memory, tensors, about={"position": about["position"]})
    if stored:
        answered(Deployed(path), train(run, 3, base[1]))
        return
    failure = refusal(Deployed(path), train(run, 3, base[1]))
    assert failure.code == "declined"
    assert "another version of silotune" in failure.place


def refusal(client, asked) -> Failure:
    answer = client.answer(asked)
    failure = wire.decode_answer(answer, "hospital-0", bytes_down=0)
    assert isinstance(failure, Failure)
    assert answer.about["client"] == "hospital-0"
    return failure


def test_limits_apply_from_the_moment_they_are_written(run, own):
    client = Deployed(own())
    assert "report" in client.answer(message(run, "query")).about
    own(max_rounds=2)
    failure = refusal(client, message(run, "train", Parcel({"round": 1})))
    assert (failure.code, failure.round) == ("declined", 1)
    assert "rounds = 3 is above limits.max_rounds = 2" in failure.place
    own(max_steps=1)
    assert (
        "local_steps = 2 is above limits.max_steps" in refusal(client, message(run, "query")).place
    )
    own()
    assert "report" in client.answer(message(run, "query")).about


def test_passes_over_the_rows_are_limited_by_the_rows_that_are_there(run, own):
    train = run.train.model_copy(update={"local_steps": None, "local_epochs": 1})
    epochs = run.model_copy(update={"train": train})
    steps = math.ceil(num_train(run, own()) / 2)
    told = refusal(Deployed(own(max_steps=steps - 1)), message(epochs, "query")).place
    assert f"{steps} forward passes in a round" in told
    assert "report" in Deployed(own(max_steps=steps)).answer(message(epochs, "query")).about


def test_a_configuration_that_breaks_in_mid_run_is_a_failure_and_can_be_fixed(run, own):
    path = own()
    client = Deployed(path)
    path.write_text(f'name = "{SECRET}', encoding="utf-8")
    failure = refusal(client, message(run, "query"))
    assert failure.code == "ConfigError"
    assert SECRET not in failure.place
    own()
    assert "report" in client.answer(message(run, "query")).about


@pytest.mark.parametrize("run_id", ["../../etc", "a/b", "", "a b", "a.b"])
def test_a_run_cannot_name_a_path_of_the_client(run, own, run_id):
    path = own()
    failure = refusal(Deployed(path), message(run, "query", run_id=run_id))
    assert (failure.code, failure.place) == (
        "declined",
        "the run's id must consist of letters and digits",
    )
    assert {p.name for p in path.parent.iterdir()} <= {"client.toml", "rows.jsonl", "state"}


def test_something_that_is_not_a_recipe_is_a_failure_without_its_text(run, own):
    asked = message(run, "query")
    broken = Parcel({**asked.about, "recipe": json.dumps({"rounds": SECRET})})
    failure = refusal(Deployed(own()), broken)
    assert failure.code == "ValidationError"
    assert SECRET not in failure.place + failure.fix


def test_clients_that_share_a_machine_take_turns(run, own, tmp_path):
    path = own()
    table = path.read_text().replace("[runtime]", '[runtime]\nturn = "turn"')
    path.write_text(table)
    client, answers = Deployed(path), []
    with (tmp_path / "turn").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        thread = threading.Thread(
            target=lambda: answers.append(client.answer(message(run, "query")))
        )
        thread.start()
        thread.join(0.3)
        assert thread.is_alive(), "it waits for the other one to end"
    thread.join(30)
    assert "report" in answers[0].about


# --- a real client under [privacy] ---------------------------------------------------------------

RECORD = {"unit": "record", "noise_multiplier": 1.0, "delta": 1e-2, "clip_norm": 0.5}
WHOLE = {**RECORD, "unit": "client", "noise_at": "client"}
AT_SERVER = {**RECORD, "unit": "client"}
LEDGER = "state/privacy.jsonl"
TOLD = {"lr", "num_steps"}
MECHANISM = {"noise_multiplier", "sampling_rate", "num_lots"}


def private(run, privacy=RECORD, **train):
    """The recipe as a server may send it, checked or not."""
    weights = "uniform" if privacy is AT_SERVER else "examples"
    return run.model_copy(
        update={
            "privacy": PrivacyConfig.model_validate(privacy),
            "train": run.train.model_copy(update=train),
            "algorithm": run.algorithm.model_copy(update={"weights": weights}),
        }
    )


def train(run, round_, adapter, **more):
    return message(run, "train", wire.encode_broadcast(Broadcast(round_, adapter)), **more)


def answered(client, asked) -> Update:
    answer = client.answer(asked)
    got = wire.decode_answer(answer, "hospital-0", bytes_down=0)
    assert isinstance(got, Update), got
    return got


def cost(*lots: tuple[float, int, float], delta=1e-2) -> float:
    return spent_in_all([Steps(*own) for own in lots], delta=delta).pld


@pytest.mark.parametrize(
    ("privacy", "told"),
    [(RECORD, TOLD | MECHANISM), (WHOLE, TOLD | MECHANISM), (AT_SERVER, TOLD)],
)
def test_nothing_without_noise_leaves_a_private_client(run, own, base, privacy, told):
    """Its rows are truncated, and it is asked for a score; a plain client reports all of that."""
    asked = private(run, privacy, max_length=36)
    client = Deployed(own())
    plain = Deployed(own()).answer(message(private(run, {}, max_length=36), "query")).about
    about = client.answer(message(asked, "query")).about
    assert plain["report"]["num_cut"] > 0
    assert plain["process"]["peak_memory_bytes"] > 0
    assert (about["report"]["num_cut"], about["report"]["num_dropped"]) == (0, 0)
    assert about["process"]["peak_memory_bytes"] == 0
    assert about["report"]["num_train"] == plain["report"]["num_train"]
    sent = client.answer(train(asked, 1, base[1]))
    assert sent.about["process"]["peak_memory_bytes"] == 0
    assert set(sent.about["update"]["metrics"]) == told
    assert sent.about["update"]["score"] is None
    assert sent.about["update"]["num_examples"] == plain["report"]["num_train"]
    failure = refusal(
        client, message(asked, "evaluate", wire.encode_broadcast(Broadcast(2, base[1])))
    )
    assert failure.code == "declined"
    assert "does not send scores" in failure.place
    full = Deployed(own()).answer(train(private(run, {}), 1, base[1])).about["update"]
    assert full["score"] is not None
    assert {"train_loss", "num_tokens", "num_targets", "penalty"} <= set(full["metrics"])


def test_every_answer_to_a_training_message_is_a_line_of_the_ledger(run, own, base):
    """Asked for the same round repeatedly, in one run or in the same run under another name."""
    path = own()
    client, asked = Deployed(path), private(run)
    for n in range(3):
        answered(client, train(asked, 1, base[1]))
        assert len(lines(path.parent / LEDGER)) == n + 1
    assert [line["round"] for line in lines(path.parent / LEDGER)] == [1, 1, 1]
    failure = refusal(client, train(asked, 1, base[1]))
    assert failure.code == "privacy budget spent"
    assert "its privacy budget is for 3 rounds" in failure.place
    answered(client, train(asked, 1, base[1], run_id="b2"))
    found = lines(path.parent / LEDGER)
    assert [line["run"] for line in found] == ["a1", "a1", "a1", "b2"]
    client.answer(message(asked, "query"))
    assert len(lines(path.parent / LEDGER)) == 4, "an answer that releases nothing adds no line"


def spend(client, recipes, adapter, **more):
    """Ask in every way that a server can, until the client answers none of them."""
    sent = []
    for n in range(8):
        got = wire.decode_answer(
            client.answer(train(recipes[n % len(recipes)], n + 1, adapter, run_id=f"r{n}", **more)),
            "hospital-0", bytes_down=0,
        )  # fmt: skip
        sent.append(got)
    assert all(isinstance(s, Update) or s.code == "privacy budget spent" for s in sent), sent
    return sum(isinstance(s, Update) for s in sent)


@pytest.mark.parametrize(
    "changes",
    [
        [{"noise_multiplier": 1.0}],
        [{"noise_multiplier": 1.0, "max_participations": 2}, {"max_participations": 10**6}],
        [{"noise_multiplier": 1.0}, {"noise_multiplier": 0.9, "clip_norm": 1e8}],
        [{"noise_multiplier": 1.0}, {"noise_multiplier": 0.0}],
        [{"noise_multiplier": 1e-6}],
        [{"delta": 0.999}],
        [WHOLE],
        [WHOLE, RECORD],
    ],
)
def test_whatever_a_server_asks_the_clients_limit_holds(run, own, base, changes):
    """Repeated rounds, new names of a run, changed recipes, less noise, more participations."""
    path = own(epsilon=3.0, delta=1e-2)
    recipes = [private(run, {**RECORD, **change}) for change in changes]
    recipes = [recipe.model_copy(update={"rounds": 10**4}) for recipe in recipes]
    count = spend(Deployed(path), recipes, base[1])
    found = lines(path.parent / LEDGER)
    assert len(found) == count
    # a row more or less replaces one clipped change by another: twice the bound
    mixed = len({line["unit"] for line in found}) == 2
    noises = [
        line["noise_multiplier"] / (2 if mixed and line["unit"] == "client" else 1)
        for line in found
    ]
    spent = [(z, line["num_lots"], line["sampling_rate"])
             for z, line in zip(noises, found, strict=True)]  # fmt: skip
    assert cost(*spent) <= 3.0
    assert (count == 0) == (changes == [{"noise_multiplier": 1e-6}])
    if len(changes) == 1 and count:
        assert cost(*spent, spent[0]) > 3.0, "and it takes part as long as it may"


def test_a_target_above_the_clients_limit_gets_more_noise_here(run, own, base):
    path = own(epsilon=1.0, delta=1e-3)
    wanted = {"noise_multiplier": None, "target_epsilon": 50.0, "delta": 0.999}
    asked = private(run, {**WHOLE, **wanted})
    client = Deployed(path)
    for round_ in (1, 2, 3):
        told = answered(client, train(asked, round_, base[1])).metrics
        assert 0.99 < cost((told["noise_multiplier"], 3, 1.0), delta=1e-3) <= 1.0
    assert refusal(client, train(asked, 4, base[1])).code == "privacy budget spent"


@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
@pytest.mark.parametrize("privacy", [{}, AT_SERVER, {**RECORD, "noise": "seeded"}])
def test_a_recipe_without_this_clients_noise_gets_nothing(run, own, base, kind, privacy):
    path = own(epsilon=3.0, delta=1e-2)
    sent = wire.encode_broadcast(Broadcast(1, base[1]))
    failure = refusal(Deployed(path), message(private(run, privacy), kind, sent))
    assert failure.code == "declined"
    assert "privacy" in failure.place
    assert lines(path.parent / LEDGER) == []


def test_protection_that_is_taken_away_in_mid_run_ends_the_run_for_this_client(run, own, base):
    path = own(epsilon=50.0, delta=1e-2)
    client = Deployed(path)
    answered(client, train(private(run), 1, base[1]))
    assert refusal(client, train(private(run, {}), 2, base[1])).code == "declined"
    assert refusal(client, train(private(run, packing=True), 2, base[1])).code == "declined"
    assert len(lines(path.parent / LEDGER)) == 1
    answered(client, train(private(run), 2, base[1]))


def test_clients_that_keep_their_state_in_one_folder_spend_their_own_budgets(run, own, base):
    path = own(epsilon=6.0, delta=1e-2)
    other = path.with_name("other.toml")
    other.write_text(path.read_text().replace("hospital-0", "hospital-1"), encoding="utf-8")
    asked = private(run)
    one, two = spend(Deployed(path), [asked], base[1]), spend(Deployed(other), [asked], base[1])
    assert one == two > 1
    assert len(lines(path.parent / LEDGER)) == one + two


@pytest.mark.parametrize(("lr", "start"), [(1e30, 0.0), (1e-2, 1e30)])
def test_a_whole_client_whose_training_fails_sends_noise_and_not_that_it_failed(
    run, own, base, lr, start
):
    """The rows decide whether changes or a loss overflow, so this must not be revealed."""
    wild = {"lr": lr, "clip_norm": 0.0}
    sent = {name: t + start for name, t in base[1].items()}
    plain = Deployed(own()).answer(train(private(run, {}, **wild), 1, sent))
    failure = plain.about["failure"]
    assert failure["code"] == "training failed", "otherwise this would show nothing"
    assert ("the training loss is not a number" in failure["place"]) == (start > 0)
    got = answered(Deployed(own()), train(private(run, WHOLE, **wild), 1, sent))
    size = sum(t.numel() for t in got.delta.values())
    assert 0.4 < l2_norm(got.delta) / size**0.5 < 0.6, "1.0 * 0.5 in every number"
    silent = {**WHOLE, "noise_multiplier": 0.0}
    got = answered(Deployed(own()), train(private(run, silent, **wild), 1, sent, run_id="b"))
    assert l2_norm(got.delta) == 0


@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_no_weight_moves_a_private_client_beyond_its_bound(run, own, base, weights):
    bare = private(run, {**WHOLE, "noise_multiplier": 0.0, "clip_norm": 1e-3}, lr=10.0)
    asked = bare.model_copy(
        update={"algorithm": bare.algorithm.model_copy(update={"weights": weights})}
    )
    got = answered(Deployed(own()), train(asked, 1, base[1]))
    assert l2_norm(got.delta) == pytest.approx(1e-3, rel=1e-5)
    assert got.num_examples == num_train(run, own())


def test_a_head_that_stays_is_trained_under_the_same_noise_and_never_sent(tmp_path):
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = build_tiny_encoder(tmp_path / "m", "bert", **still)
    rows = [{"text": "ab" * (i % 7 + 1), "label": "ab"[i % 2]} for i in range(12)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    table = {
        "name": "hospital-0",
        "model": str(model),
        "data": {"path": "rows.jsonl"},
        "runtime": {"device": "cpu", "threads": 1},
        "limits": {"epsilon": 100.0, "delta": 1e-2},
    }
    path = tmp_path / "client.toml"
    path.write_text(tomli_w.dumps(table), encoding="utf-8")

    def head(noise_multiplier, run_id):
        """What the client keeps of its head; every step takes all rows, so only noise is random."""
        recipe = parse(
            {
                "rounds": 1,
                "task": "classify",
                "model": {"name": str(model), "dtype": "float32"},
                "adapter": {"rank": 2, "alpha": 4, "head": "local"},
                "data": {"path": "x", "labels": ["a", "b"]},
                "train": {"batch_size": 99, "local_steps": 2, "max_length": 32},
                "privacy": {**RECORD, "noise_multiplier": noise_multiplier},
                "runtime": {"device": "cpu", "threads": 1},
            }
        )
        loaded = load_for(recipe)
        client = Deployed(path)
        got = answered(client, train(recipe, 1, read_adapter(loaded), run_id=run_id))
        assert got.delta, "the adapter is sent"
        assert not got.delta.keys() & loaded.head
        kept = load_memory(tmp_path / "state" / "runs" / run_id / "hospital-0", 2)
        assert kept.tensors["personal"].keys() == loaded.head
        return sha256(kept.tensors["personal"])

    assert head(5.0, "a") != head(5.0, "b")
    path.write_text(tomli_w.dumps({**table, "limits": {}}), encoding="utf-8")
    assert head(0.0, "c") == head(0.0, "d"), "nothing else is random"


@pytest.mark.parametrize("round_", ["x", None, [], -1, 1.5, 10**400, {}])
def test_a_message_about_no_round_is_a_failure_and_no_traceback(round_):
    """Bug: `round = "x"` in a server's message ended a client's worker with a ValueError."""
    assert round_of({"round": round_}) == 0
    parcel = Parcel({"round": round_, "score": True, "tensors": []})

    def work():
        wire.decode_broadcast(parcel)
        raise AssertionError("it was read")

    answer = guarded(work, client="north", round_=round_of(parcel.about))
    said = wire.decode_answer(answer, "north", bytes_down=0)
    assert (said.code, said.round) == ("training failed", 0)
    assert "a message cannot be read: round" in said.place
