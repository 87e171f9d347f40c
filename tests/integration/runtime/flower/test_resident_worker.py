"""The resident worker: one per client, found again, ended when idle, never waited for in vain.

One test starts the real worker. The others start it without its heavy half: the real `main`, with a
stub for what reads the configuration and for what answers, so that it is up in a fraction of a
second.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
import pytest
import tomli_w

from silotune.core.errors import EngineError
from silotune.core.types import Failure
from silotune.data.clients import load_client
from silotune.data.reading import DataConfig
from silotune.recipes.parse import load_recipe
from silotune.runtime import wire
from silotune.runtime.flower import resident_worker
from silotune.runtime.payload import Parcel, pack, unpack
from tests.conftest import write_jsonl, write_tiny_recipe

LIGHT = """
import contextlib, json, os, sys, time, types
from pathlib import Path
from silotune.runtime.flower import resident_worker
from silotune.runtime.payload import Parcel

config = Path(sys.argv[1])
own = json.loads(config.read_text())
if "exit" in own:
    sys.exit(own["exit"])
time.sleep(own.get("loads", 0))

class Deployed:
    def __init__(self, config):
        self.asked = 0
        self.live = types.SimpleNamespace(writing=contextlib.nullcontext)

    def answer(self, parcel):
        self.asked += 1
        print("asked", parcel.about, flush=True)
        if "sleep" in parcel.about:
            (config.parent / "sleeping").touch()
            time.sleep(parcel.about["sleep"])
        about = {"pid": os.getpid(), "asked": self.asked, **parcel.about}
        return Parcel(about, parcel.values)

runtime = types.SimpleNamespace(idle_s=own.get("idle_s", 60))
loaded = types.SimpleNamespace(state=str(config.parent / "state"), runtime=runtime)
sys.modules["silotune.federation.client_config"] = types.SimpleNamespace(
    load_client_config=lambda _: loaded
)
sys.modules["silotune.runtime.real_client"] = types.SimpleNamespace(Deployed=Deployed)
resident_worker.main(config)
"""


@contextlib.contextmanager
def temporary(folder):
    """The folder for temporary files, here and in the processes that are started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", None)
        yield folder


@pytest.fixture(scope="module", autouse=True)
def short():
    """A short private folder: sockets allow few bytes, and pytest's folders have long names."""
    folder = Path(tempfile.mkdtemp(prefix="st-", dir="/tmp"))
    with temporary(folder):
        yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def light_workers():
    """Light workers replace real ones and start at once. Returns those that were started."""
    processes: list[subprocess.Popen] = []

    def start(config):
        command = [sys.executable, "-c", LIGHT, str(config)]
        processes.append(subprocess.Popen(command, start_new_session=True))
        return processes[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resident_worker, "_start", start)
        try:
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.wait()


@pytest.fixture
def light():
    with light_workers() as processes:
        yield processes


@pytest.fixture(scope="module")
def up(tmp_path_factory):
    """The configuration of a client whose worker is up, for tests that leave it up."""
    config = configure(tmp_path_factory.mktemp("up"))
    with light_workers() as processes:
        assert ask(config)["pid"] == processes[0].pid
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                resident_worker, "_start", lambda _: pytest.fail("a worker is already up")
            )
            yield config


def configure(tmp_path, text="{}", name="client.toml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def ask(config, **about):
    return resident_worker.ask(config, Parcel(about), round_=3).about


def failure_of(about) -> Failure:
    failure = wire.decode_answer(Parcel(about), "north", bytes_down=0)
    assert isinstance(failure, Failure)
    assert failure.round == 3
    assert failure.fix == "the reason is in this client's log"
    return failure


def wait_until(true, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


# --- found again, ended, started again -----------------------------------------------------------


def test_the_same_process_answers_until_it_is_idle(tmp_path, light):
    config = configure(tmp_path, '{"idle_s": 0.3}')
    answers = [ask(config), ask(config), ask(config)]
    assert [a["asked"] for a in answers] == [1, 2, 3]
    assert {a["pid"] for a in answers} == {light[0].pid}
    light[0].wait(timeout=30)
    assert light[0].returncode == 0
    assert not resident_worker._socket(config).exists()


def test_numbers_travel_both_ways(up):
    values = np.arange(300_000, dtype="<f4").view(np.uint8)
    answer = resident_worker.ask(up, Parcel({"kind": "train"}, values), round_=1)
    assert answer.values.tobytes() == values.tobytes()
    assert answer.about["kind"] == "train"


def test_each_client_has_its_own_worker(tmp_path, light, up):
    assert ask(configure(tmp_path))["pid"] == light[0].pid != ask(up)["pid"]


def test_the_socket_is_in_a_folder_that_only_this_user_can_enter(up):
    sock = resident_worker._socket(up)
    assert sock.is_socket()
    assert sock.parent.stat().st_mode & 0o777 == 0o700
    assert sock.parent.stat().st_uid == os.getuid()


def test_the_workers_output_is_in_the_clients_state_folder(up, capfd):
    ask(up, word="hello")
    assert "hello" in (up.parent / "state" / "worker.log").read_text()
    assert "hello" not in "".join(capfd.readouterr())


def test_a_second_worker_of_a_client_ends_and_the_first_continues(up):
    first = ask(up)["pid"]
    second = subprocess.run([sys.executable, "-c", LIGHT, str(up)], timeout=30)
    assert second.returncode == 0
    assert ask(up)["pid"] == first


def test_processes_that_ask_together_find_one_worker(tmp_path, light):
    """The second worker to start ends at once; its starter must not take that for a failure."""
    config, answers = configure(tmp_path, '{"loads": 0.3}'), []
    threads = [threading.Thread(target=lambda: answers.append(ask(config))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 3
    assert len({a.get("pid") for a in answers}) == 1, answers
    assert sorted(a["asked"] for a in answers) == [1, 2, 3]


def test_a_worker_that_holds_the_lock_and_is_ending_is_waited_for(tmp_path, light):
    """Its socket was already gone; the worker started in its place ended, and none was left."""
    import fcntl

    config = configure(tmp_path)
    answers: list = []
    lock = resident_worker._socket(config).with_suffix(".lock")
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: answers.append(ask(config)))
        thread.start()
        wait_until(lambda: light and light[0].poll() == 0)
    thread.join(60)
    assert answers[0]["pid"] == light[-1].pid
    assert len(light) >= 2


# --- killed, broken, hanging ---------------------------------------------------------------------


def test_a_worker_that_is_killed_while_it_answers_is_a_failure_at_once(tmp_path, light):
    config, answers = configure(tmp_path), []
    thread = threading.Thread(target=lambda: answers.append(ask(config, sleep=100)))
    thread.start()
    wait_until(lambda: (tmp_path / "sleeping").exists())
    light[0].send_signal(signal.SIGKILL)
    thread.join(30)
    failure = failure_of(answers[0])
    assert (failure.code, failure.place) == ("worker ended", "resident worker")
    assert ask(config)["pid"] == light[1].pid, "and the next message finds a new one"


def test_a_worker_that_was_killed_before_is_replaced(tmp_path, light):
    config = configure(tmp_path)
    ask(config)
    light[0].kill()
    light[0].wait()
    assert resident_worker._socket(config).exists(), "it could not clean up"
    assert ask(config)["pid"] == light[1].pid


@pytest.mark.parametrize("sent", [b"", b"\x00\x00", b"\x00\x00\x01\x00half of the answer"])
def test_a_worker_that_ends_in_the_middle_of_its_answer_is_a_failure(tmp_path, sent):
    config = configure(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(resident_worker._socket(config)))
        listener.listen()

        def serve():
            accepted, _ = listener.accept()
            with Connection(accepted.detach()) as line:
                line.recv_bytes()
                os.write(line.fileno(), sent)

        thread = threading.Thread(target=serve)
        thread.start()
        assert failure_of(ask(config)).code == "worker ended"
        thread.join(30)


def test_a_worker_that_cannot_start_is_a_failure_whose_reason_stays_here(tmp_path, light, capfd):
    config, began = configure(tmp_path, '{"exit": 3}'), time.monotonic()
    about = ask(config)
    assert time.monotonic() - began < 30, "it is seen to have ended"
    assert failure_of(about).code == "worker not started"
    assert str(tmp_path) not in repr(about)
    assert f"the resident worker of {config} did not start" in capfd.readouterr().err
    assert len(light) == 1


def test_a_worker_that_hangs_at_its_start_is_given_up(tmp_path, light, monkeypatch):
    monkeypatch.setattr(resident_worker, "START_S", 0.3)
    began = time.monotonic()
    assert failure_of(ask(configure(tmp_path, '{"loads": 100}'))).code == "worker not started"
    assert time.monotonic() - began < 10


def test_a_process_that_ends_in_the_middle_of_a_question_does_not_end_the_worker(up):
    """It was started by Flower, and Flower may end it at any time."""
    first = ask(up)["pid"]
    address = str(resident_worker._socket(up))
    data = pack(Parcel({"kind": "query"}, np.ones(4 * 10**6, dtype=np.uint8)))
    for part in (b"", b"\x00", len(data).to_bytes(4, "big") + data[:1000]):
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(address)
            line.sendall(part)
    with socket.socket(socket.AF_UNIX) as line:  # asks without waiting for the answer
        line.connect(address)
        line.sendall(len(data).to_bytes(4, "big") + data)
    assert ask(up)["pid"] == first


def test_a_question_waits_for_the_one_before_it(up):
    answers: list = []
    (up.parent / "sleeping").unlink(missing_ok=True)
    thread = threading.Thread(target=lambda: answers.append(ask(up, sleep=0.2)))
    thread.start()
    wait_until(lambda: (up.parent / "sleeping").exists())
    last = ask(up)["asked"]
    thread.join(30)
    assert answers[0]["asked"] == last - 1


def test_an_answer_that_is_not_a_parcel_is_our_own_error(tmp_path):
    config = configure(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(resident_worker._socket(config)))
        listener.listen()

        def serve():
            accepted, _ = listener.accept()
            with Connection(accepted.detach()) as line:
                assert unpack(line.recv_bytes()).about == {}
                line.send_bytes(b"hello")

        thread = threading.Thread(target=serve)
        thread.start()
        assert failure_of(ask(config)).code == "worker ended"
        thread.join(30)


# --- whose folder it is --------------------------------------------------------------------------


def open_to_all(folder):
    folder.mkdir()
    folder.chmod(0o755)


def open_to_a_group(folder):
    folder.mkdir()
    folder.chmod(0o710)


def a_link(folder):
    folder.with_name("elsewhere").mkdir(mode=0o700)
    folder.symlink_to(folder.with_name("elsewhere"))


def a_dead_link(folder):
    folder.symlink_to(folder.with_name("nowhere"))


def a_file(folder):
    folder.touch(mode=0o600)


@pytest.mark.parametrize("make", [open_to_all, open_to_a_group, a_link, a_dead_link, a_file])
def test_a_folder_that_others_could_enter_is_refused(tmp_path, light, make, capfd):
    folder = tmp_path / f"silotune-{os.getuid()}"
    make(folder)
    config = configure(tmp_path)
    with temporary(tmp_path):
        with pytest.raises(EngineError, match=r"Remove it, or set TMPDIR") as caught:
            resident_worker._socket(config)
        assert str(folder) in str(caught.value)
        assert failure_of(ask(config)).code == "worker not started"
    assert "Remove it, or set TMPDIR" in capfd.readouterr().err
    assert light == [], "nothing was started"


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    (tmp_path / f"silotune-{os.getuid() + 1}").mkdir(mode=0o700)
    real = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: real + 1)
    with temporary(tmp_path), pytest.raises(EngineError, match="open to other users"):
        resident_worker._socket(configure(tmp_path))


def test_a_path_that_is_too_long_for_a_socket_is_named(tmp_path, light, short, capfd):
    long = short / ("x" * 80)
    long.mkdir()
    with temporary(long):
        assert failure_of(ask(configure(tmp_path))).code == "worker not started"
    assert "Set TMPDIR to a shorter path" in capfd.readouterr().err


def test_the_longest_path_that_is_accepted_works(tmp_path, light, short):
    tail = len(f"/silotune-{os.getuid()}/") + len("0" * 16 + ".sock")
    folder = short / ("x" * (resident_worker.MAX_PATH - len(str(short)) - 1 - tail))
    folder.mkdir()
    config = configure(tmp_path)
    with temporary(folder):
        assert len(os.fsencode(resident_worker._socket(config))) == resident_worker.MAX_PATH
        assert ask(config)["pid"] == light[0].pid


# --- the real one --------------------------------------------------------------------------------

ASK_TWICE = """
import json, sys
from pathlib import Path
from silotune.runtime.flower import resident_worker
from silotune.runtime.payload import Parcel

asked = Parcel(json.loads(Path(sys.argv[2]).read_text()))
for _ in range(2):
    print(json.dumps(resident_worker.ask(Path(sys.argv[1]), asked, round_=0).about), flush=True)
heavy = {"torch", "transformers", "peft", "datasets"} & set(sys.modules)
sys.exit(f"who asks imports {heavy}" if heavy else 0)
"""


@pytest.fixture(scope="module", autouse=True)
def real(tmp_path_factory, tiny_model, short):
    """A process that asks a real worker, as Flower's would. It starts during the other tests."""
    place = tmp_path_factory.mktemp("real")
    run = load_recipe(write_tiny_recipe(place, tiny_model))
    rows = [{"question": f"What is a{i}?", "answer": f"It is a{i}."} for i in range(8)]
    write_jsonl(place / "rows.jsonl", rows)
    table = {
        "name": "north",
        "model": str(tiny_model),
        "data": {"path": "rows.jsonl"},
        "runtime": {"device": "cpu", "threads": 1, "idle_s": 1.0},
    }
    config = configure(place, tomli_w.dumps(table))
    recipe = run.model_dump_json(serialize_as_any=True)
    asked = {"kind": "query", "recipe": recipe, "run": "a1", "parcel": {}}
    (place / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    tmp = short / "real"
    tmp.mkdir()
    asking = subprocess.Popen(
        [sys.executable, "-c", ASK_TWICE, str(config), str(place / "asked.json")],
        env={**os.environ, "TMPDIR": str(tmp)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield asking, place, tmp
    asking.kill()
    asking.communicate()
    for process in processes_in(tmp):
        process.kill()


def processes_in(tmp):
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("TMPDIR") == str(tmp):
                found.append(process)
    return found


def test_a_client_is_answered_by_one_process_that_loads_its_base_once(real):
    asking, place, tmp = real
    out, err = asking.communicate(timeout=60)
    assert (asking.returncode, err) == (0, "")
    one, other = map(json.loads, out.splitlines())
    assert one["report"] == other["report"]
    run = load_recipe(place / "tiny.toml")
    rows = load_client(DataConfig(path=str(place / "rows.jsonl")), "north", seed=run.seed)
    assert one["report"]["num_train"] == len(rows.train)
    assert one["client"] == "north"
    assert one["process"]["id"] == other["process"]["id"]
    assert one["process"]["base_loads"] == other["process"]["base_loads"] == 1
    assert not one["process"]["id"].endswith(f"/{asking.pid}")
    wait_until(lambda: not processes_in(tmp))  # nobody asks any more
    assert not list(tmp.rglob("*.sock"))
    assert "Traceback" not in (place / "state" / "worker.log").read_text()
