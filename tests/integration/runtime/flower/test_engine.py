"""What the engine receives, and how its failures end: with a name and a log, and nothing left."""

import ast
import http.server
import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import psutil
import pytest
import torch

from silotune.core.errors import ConfigError, EngineError, QuorumError
from silotune.core.types import ServerState
from silotune.data.client_rows import ClientRows
from silotune.federation.progress import Progress
from silotune.federation.run_folder import RunFolder
from silotune.recipes.parse import parse
from silotune.runtime.flower import engine as flower_engine
from silotune.runtime.flower import engine_command, kept_processes, submit
from silotune.runtime.flower.engine import _Engine, check_installed, private_folder
from silotune.runtime.flower.engine_command import RUNS
from silotune.runtime.flower.kept_processes import KEEPER
from silotune.runtime.flower.process_keeper import MARK
from silotune.runtime.flower.server_reports import FileProgress, write_outcome
from silotune.runtime.flower.submit import OWN, SETTINGS, travelling
from silotune.runtime.job import Job
from tests.conftest import changed, hospital_rows, write_jsonl

TALK = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})


def recipe(name="flower-simulation", **changes):
    table = {"rounds": 1, "data": {"path": "medquad_mini"}, "runtime": {"name": name, "threads": 3}}
    return parse(changed(table, changes))


class Heard(Progress):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def job(tmp_path):
    def make(run=None, names=("north", "south")):
        run = run or recipe()
        rows = {name: ClientRows(name, (TALK,), (TALK,)) for name in names}
        folder = RunFolder.create(tmp_path / "run", run)
        state = ServerState(0, {"a": torch.zeros(2)})
        return Job(run, state, rows, folder, Heard(), base_sha256="ab" * 32)

    return make


# --- what must be there --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runtime", "gone", "text"),
    [
        ("flower", {"flwr"}, "needs flwr.\n  Install it: make env EXTRAS=flower"),
        (
            "flower",
            {"flwr", "psutil"},
            "needs flwr, psutil.\n  Install it: make env EXTRAS=flower",
        ),
        (
            "flower-simulation",
            {"ray"},
            "needs ray.\n  Install it: make env EXTRAS=simulation",
        ),
        (
            "flower-simulation",
            {"flwr", "psutil", "ray"},
            "needs flwr, psutil, ray.\n  Install it: make env EXTRAS=simulation",
        ),
    ],
)
def test_a_missing_library_is_named_with_its_extra(monkeypatch, runtime, gone, text):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in gone else real(name, *a)
    )
    with pytest.raises(ConfigError) as caught:
        check_installed(recipe(runtime))
    assert str(caught.value) == f"runtime.name = '{runtime}' {text}"


def test_deployment_does_without_ray(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "ray" else real(name, *a)
    )
    check_installed(recipe("flower"))


REFUSED = {
    "another address": (
        "flower",
        {"host": "0.0.0.0"},
        "host",
        "outside loopback, the engine's control",
    ),
    "a name": (
        "flower",
        {"host": "server.example"},
        "host",
        "outside loopback, the engine's control",
    ),
    "host in simulation": (
        "flower-simulation",
        {"host": "localhost"},
        "host",
        "only has an effect with runtime.name = 'flower'",
    ),
    "cpus in deployment": (
        "flower",
        {"client_cpus": 2},
        "client_cpus",
        "only has an effect with runtime.name = 'flower-simulation'",
    ),
    "gpus in deployment": (
        "flower",
        {"client_gpus": 0.5},
        "client_gpus",
        "only has an effect with runtime.name = 'flower-simulation'",
    ),
    "ray in deployment": (
        "flower",
        {"ray_address": "a:1"},
        "ray_address",
        "only has an effect with runtime.name = 'flower-simulation'",
    ),
    "joining in process": (
        "in-process",
        {"join_timeout_s": 5},
        "join_timeout_s",
        "only has an effect with runtime.name = 'flower-simulation' or 'flower'",
    ),
    "cpus in process": (
        "in-process",
        {"client_cpus": 2},
        "client_cpus",
        "only has an effect with runtime.name = 'flower-simulation'",
    ),
    "gpus for the processor": (
        "flower-simulation",
        {"client_gpus": 0.5, "device": "cpu"},
        "client_gpus",
        "asks for GPUs that runtime.device = 'cpu' does not use",
    ),
    "mps in simulation": ("flower-simulation", {"device": "mps"}, "device", "use in-process"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_contradiction_is_refused_with_its_reason(kind):
    name, keys, key, reason = REFUSED[kind]
    with pytest.raises(ConfigError) as caught:
        recipe(name, runtime={"name": name, **keys})
    (line,) = str(caught.value).splitlines()[1:]
    assert line.strip().startswith(f"runtime.{key}: ")
    assert reason in line


def test_all_contradictions_are_reported_together():
    keys = {"host": "10.0.0.1", "client_cpus": 2, "client_gpus": 1.0, "ray_address": "a:1"}
    with pytest.raises(ConfigError) as caught:
        recipe(runtime={"name": "in-process", **keys})
    text = str(caught.value)
    assert all(f"runtime.{key}: " in text for key in keys)
    assert text.count("runtime.host: ") == 2, "no effect, and refused"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_is_accepted(host):
    assert recipe("flower", runtime__host=host).runtime.host == host


# --- the recipe as it is sent --------------------------------------------------------------------


def test_in_simulation_paths_are_absolute(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "rows.jsonl", hospital_rows())
    (tmp_path / "held").mkdir()
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    run = recipe(
        data={"path": "rows.jsonl", "eval_path": "held", "system": "S"},
        model__name="models/tiny",
        partition={"by": "source"},
    )
    sent = travelling(run)
    assert sent.data.path == str(tmp_path / "rows.jsonl")
    assert sent.data.eval_path == str(tmp_path / "held")
    assert sent.model.name == str(tmp_path / "models" / "tiny")
    same = {"path": "rows.jsonl", "eval_path": "held"}
    assert sent.data.model_copy(update=same) == run.data
    assert sent.partition == run.partition
    assert sent.train == run.train


def test_in_simulation_the_home_folder_is_spelt_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "rows.jsonl", hospital_rows())
    sent = travelling(recipe(data__path="~/rows.jsonl"))
    assert sent.data.path == str(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("path", "model"),
    [("medquad_mini", "smollm2-135m-instruct"), ("owner/rows", "owner/model")],
)
def test_in_simulation_names_stay_names_even_next_to_folders_of_that_name(
    tmp_path, monkeypatch, path, model
):
    """A named example or model wins over a folder of its name, here as everywhere."""
    monkeypatch.chdir(tmp_path)
    run = recipe(data__path=path, model__name=model)
    assert travelling(run) == run
    if "/" not in path:
        (tmp_path / path).mkdir()
        (tmp_path / model).mkdir()
        assert travelling(run) == run


def test_in_deployment_no_path_of_the_server_is_sent(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", hospital_rows())
    held = write_jsonl(tmp_path / "held.jsonl", hospital_rows())
    run = recipe(
        "flower",
        data={"path": str(rows), "eval_path": str(held), "system": "S", "max_rows": 3},
        partition={"by": "source"},
    )
    sent = travelling(run)
    text = sent.model_dump_json(serialize_as_any=True)
    assert str(tmp_path) not in text
    assert sent.partition is None
    assert sent.data.path == OWN
    # the clients get rows that are already converted and truncated: nothing may be done twice
    assert sent.data.model_dump(exclude_defaults=True) == {"path": OWN, "system": "S"}
    assert sent.train == run.train


def test_in_deployment_with_real_clients_formats_are_sent_and_places_are_not(tmp_path):
    (tmp_path / "north.toml").write_text('name = "north"\n[data]\npath = "rows.jsonl"\n')
    run = recipe(
        "flower",
        data={
            "path": str(tmp_path),
            "prompt": "{q}",
            "completion": "{a}",
            "max_rows": 3,
            "eval_fraction": 0.3,
        },
    )
    sent = travelling(run)
    assert str(tmp_path) not in sent.model_dump_json(serialize_as_any=True)
    assert sent.data.model_dump(exclude_defaults=True) == {
        "path": OWN,
        "prompt": "{q}",
        "completion": "{a}",
        "max_rows": 3,
        "eval_fraction": 0.3,
    }


# --- what Flower is given ------------------------------------------------------------------------


def engine_of(job, tmp_path) -> _Engine:
    private = tmp_path / "private"
    private.mkdir()
    return _Engine(private, job)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({}, "num-supernodes=2 client-resources-num-cpus=3 client-resources-num-gpus=0.0"),
        (
            {"client_cpus": 2, "client_gpus": 0.25},
            "num-supernodes=2 client-resources-num-cpus=2 client-resources-num-gpus=0.25",
        ),
        (
            {"client_gpus": 1},
            "num-supernodes=2 client-resources-num-cpus=3 client-resources-num-gpus=1.0",
        ),
    ],
)
def test_resources_are_given_in_flowers_words(job, tmp_path, keys, text):
    run = recipe(runtime={"name": "flower-simulation", "threads": 3, **keys})
    assert engine_of(job(run), tmp_path)._resources() == text


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.1", "127.0.0.1:"), ("localhost", "127.0.0.1:"), ("::1", "[::1]:")],
)
def test_addresses_are_written_as_flower_reads_them(job, tmp_path, host, address):
    """`flwr` took ::1:8000 for the port ':1:8000'."""
    engine = engine_of(job(recipe("flower", runtime__host=host)), tmp_path)
    assert engine.address == f"{address}{engine.port}"
    with engine:
        table = tomllib.loads((engine.private / "flwr" / "config.toml").read_text())
    assert table["superlink"]["engine"] == {"address": engine.address, "insecure": True}


def test_the_environment_is_the_callers_and_sends_nothing_home(job, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/somewhere")
    monkeypatch.setenv("RAY_ADDRESS", "stale:1")
    run = recipe(runtime__ray_address="10.0.0.1:6379")
    engine = engine_of(job(run), tmp_path)
    env = engine._environment()
    assert env["HF_HOME"] == "/somewhere"
    assert env["RAY_ADDRESS"] == "10.0.0.1:6379"
    assert env["FLWR_TELEMETRY_ENABLED"] == "0"
    assert env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert env["RAY_USAGE_STATS_ENABLED"] == "0"
    assert env["FLWR_HOME"] == str(engine.private / "flwr")
    assert env["TMPDIR"] == str(engine.private)
    assert env["OMP_NUM_THREADS"] == "3"
    assert MARK not in env, "the caller itself is never marked"


@pytest.mark.parametrize("given", [None, "internal.example"])
def test_a_proxy_is_never_asked_for_this_machines_own_ports(job, tmp_path, monkeypatch, given):
    """Behind a company's proxy the SuperLink seemed not to answer."""
    for key in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(key, raising=False)
    if given:
        monkeypatch.setenv("NO_PROXY", given)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")

    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *args):
            pass

    engine = engine_of(job(), tmp_path)
    assert not engine._answers(), "nobody is there yet"
    with http.server.HTTPServer(("127.0.0.1", engine.port), Healthy) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            assert engine._answers()
        finally:
            server.shutdown()
            thread.join()
    env = engine._environment()
    wanted = [*([given] if given else []), "127.0.0.1", "localhost", "::1"]
    assert env["NO_PROXY"] == env["no_proxy"] == ",".join(wanted)


def test_the_app_is_a_folder_that_points_into_this_package(job, tmp_path, monkeypatch):
    the_job = job()
    engine, commands = engine_of(the_job, tmp_path), []

    def flwr(*words):
        commands.append(words)
        return {"success": True, "run-id": 7}

    monkeypatch.setattr(engine, "_flwr", flwr)
    engine.submit()
    (words,) = commands
    assert words[:3] == ("run", str(engine.work / "app"), "engine")
    assert words[words.index("--federation-config") + 1] == engine._resources()
    assert [p.name for p in (engine.work / "app").iterdir()] == ["pyproject.toml"]
    table = tomllib.loads((engine.work / "app" / "pyproject.toml").read_text())
    flower = table["tool"]["flwr"]["app"]
    told = tomllib.loads((engine.work / "told.toml").read_text())
    assert set(flower["config"]) == set(told), "Flower takes declared keys only"
    assert all(isinstance(value, str) for value in told.values())
    folder = str(the_job.folder.path.absolute())
    assert json.loads(told["clients"]) == ["north", "south"]
    assert told["folder"] == folder
    assert told["run"].isalnum(), "a client names a folder after it"
    assert json.loads(told["recipe"])["rounds"] == 1
    assert Path(engine._environment()[RUNS]) / told["run"] == engine.work
    own = json.loads((engine.work / SETTINGS).read_text())
    assert own == {
        "clients": ["north", "south"],
        "folder": folder,
        "base_sha256": "ab" * 32,
        "local": [],
        "members": None,
        "only": None,
        "start": None,
    }
    for component, maker in (("serverapp", "ServerApp"), ("clientapp", "ClientApp")):
        module, name = flower["components"][component].split(":")
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        made = [
            node.value.func.id
            for node in tree.body
            if isinstance(node, ast.Assign)
            and [t.id for t in node.targets if isinstance(t, ast.Name)] == [name]
            and isinstance(node.value, ast.Call)
            and isinstance(node.value.func, ast.Name)
        ]
        assert made == [maker], "Flower reads the file, and refuses anything else"


@pytest.mark.parametrize("answer", [{}, {"success": False, "run-id": 7}, {"success": True}])
def test_a_run_that_flower_does_not_accept_is_an_engine_error(job, tmp_path, monkeypatch, answer):
    engine = engine_of(job(), tmp_path)
    monkeypatch.setattr(engine, "_flwr", lambda *words: answer)
    with pytest.raises(EngineError, match=r"Flower did not accept the run\.[\s\S]*engine\.log"):
        engine.submit()


@pytest.mark.parametrize("said", ["not JSON", "[1, 2]", ""])
def test_what_flwr_says_besides_json_goes_to_the_log(job, tmp_path, monkeypatch, said):
    engine = engine_of(job(), tmp_path)
    program = script(tmp_path, f"import sys; print({said!r}); print('hints', file=sys.stderr)")
    monkeypatch.setattr(engine_command, "program", lambda name: program)
    assert engine._flwr("run") == {}
    assert "hints" in engine.log.read_text()


# --- failures ------------------------------------------------------------------------------------


def script(tmp_path, code) -> str:
    path = tmp_path / f"program-{secrets.token_hex(4)}"
    path.write_text(f"#!{sys.executable} -S\n{code}\n")
    path.chmod(0o700)
    return str(path)


@pytest.fixture
def folders(monkeypatch):
    """The private folders of engines; after the test none is left, and no process in them."""
    made: list[Path] = []
    real = flower_engine.private_folder

    def noted():
        class Noted:
            def __enter__(self):
                self.inner = real()
                made.append(self.inner.__enter__())
                return made[-1]

            def __exit__(self, *error):
                return self.inner.__exit__(*error)

        return Noted()

    monkeypatch.setattr(flower_engine, "private_folder", noted)
    yield made
    for folder in made:
        assert not folder.exists()
        left = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("TMPDIR") == str(folder):
                    left.append(process)
            except (psutil.Error, OSError):
                continue
        assert left == []


def drive(job, monkeypatch, program):
    monkeypatch.setattr(kept_processes, "program", lambda name: program)
    return flower_engine.drive(job)


@pytest.mark.parametrize("runtime", ["flower-simulation", "flower"])
def test_a_superlink_that_ends_at_once_is_named_with_its_log(
    job, tmp_path, monkeypatch, folders, runtime
):
    the_job = job(recipe(runtime))
    program = script(tmp_path, "import sys; sys.exit('the port is taken')")
    with pytest.raises(EngineError) as caught:
        drive(the_job, monkeypatch, program)
    log = the_job.folder.path / "engine.log"
    assert str(caught.value) == (
        f"Flower's superlink ended with exit status 1.\n  See the engine's log: {log}\n"
        "  Finished rounds are kept: resume the run to continue."
    )
    assert "the port is taken" in log.read_text()
    assert len(folders) == 1
    assert the_job.folder.load_state() is not None, "the first adapter is kept"


def test_a_superlink_that_never_answers_is_given_up(job, tmp_path, monkeypatch, folders):
    monkeypatch.setattr(flower_engine, "START_S", 0.3)
    program = script(tmp_path, "import time; print('thinking', flush=True); time.sleep(600)")
    began, the_job = time.monotonic(), job()
    with pytest.raises(EngineError, match=r"SuperLink did not answer within 0\.3 s"):
        drive(the_job, monkeypatch, program)
    assert time.monotonic() - began < 15
    assert "thinking" in (the_job.folder.path / "engine.log").read_text()


def test_a_program_that_is_not_there_is_an_engine_error(job, tmp_path, monkeypatch, folders):
    the_job = job()
    with pytest.raises(EngineError, match="Flower's superlink ended with exit status 127"):
        drive(the_job, monkeypatch, "/no/such/program")
    assert "/no/such/program" in (the_job.folder.path / "engine.log").read_text()


def test_an_interrupt_leaves_nothing_behind(job, tmp_path, monkeypatch, folders):
    program = script(tmp_path, "import time; time.sleep(600)")

    def interrupted(self):
        time.sleep(0.3)  # until the program runs
        raise KeyboardInterrupt

    monkeypatch.setattr(_Engine, "_answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        drive(job(), monkeypatch, program)
    assert len(folders) == 1


def test_a_keeper_that_is_killed_is_named_and_the_users_own_children_live_on(
    job, tmp_path, monkeypatch, folders
):
    """When the run ended the engine in its keeper's place, it used to end all its own children."""
    mine = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    ended = subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(7)"])
    program = script(tmp_path, "import time; time.sleep(600)")

    def kill_the_keeper(self):
        time.sleep(0.3)
        os.kill(self._kept.pid, signal.SIGKILL)
        self._kept._keeper.wait()
        return False

    monkeypatch.setattr(_Engine, "_answers", kill_the_keeper)
    try:
        with pytest.raises(EngineError, match="the keeper of the engine's processes has ended"):
            drive(job(), monkeypatch, program)
        assert mine.poll() is None
        assert ended.wait() == 7
    finally:
        mine.kill()
        mine.wait()


# --- following a server app ----------------------------------------------------------------------

FACTS = {"num_rows": {}, "processes": []}


class Alive:
    """A keeper that reports only that these have ended."""

    mark = "a mark"

    def __init__(self, *ended):
        self.reports = list(ended)

    def ended(self):
        while self.reports:
            yield self.reports.pop(0)


@pytest.fixture
def engine(job, tmp_path):
    made = engine_of(job(), tmp_path)
    made.run_id = 7
    made._kept = Alive()
    made.work.mkdir(parents=True)
    return made


def test_the_last_lines_are_heard_before_the_outcome_counts(engine, monkeypatch):
    """They were lost when they came, with the outcome, between two looks."""
    real = submit.Follower.follow
    looks = []

    def follow(self):
        real(self)
        looks.append(len(looks))
        if len(looks) == 1:  # all that is left happens right after the first look
            progress = FileProgress(engine.work)
            progress.note("the last line")
            progress.end()
            write_outcome(engine.work, FACTS, None)

    monkeypatch.setattr(submit.Follower, "follow", follow)
    assert engine.follow() == {**FACTS, "error": None}
    assert engine.job.progress.notes == ["the last line"]


def test_the_error_that_ended_the_rounds_is_raised_here(engine):
    write_outcome(engine.work, FACTS, QuorumError("round 1: 0 usable updates"))
    with pytest.raises(QuorumError, match="round 1: 0 usable updates"):
        engine.follow()


def test_a_server_app_that_is_gone_without_a_word_is_named(engine, monkeypatch):
    monkeypatch.setattr(engine, "_status", lambda: "finished:failed")
    done = subprocess.Popen([sys.executable, "-S", "-c", "pass"])
    done.wait()
    line = json.dumps({"event": "started", "pid": done.pid, "born": time.time()})
    (engine.work / "progress.jsonl").write_text(line + "\n")
    with pytest.raises(
        EngineError, match=r"ended without a result \(Flower says: finished:failed\)"
    ):
        engine.follow()


def test_a_server_app_that_does_not_begin_is_given_up(engine, monkeypatch):
    monkeypatch.setattr(submit, "SUBMIT_S", 0.2)
    monkeypatch.setattr(engine, "_status", lambda: "pending")
    with pytest.raises(EngineError, match=r"did not start within 0\.2 s \(Flower says: pending\)"):
        engine.follow()


def test_a_client_that_ends_is_a_note_and_a_superlink_that_ends_is_an_error(engine):
    engine._kept = Alive(("client north", -9))
    write_outcome(engine.work, FACTS, None)
    assert engine.follow()["error"] is None
    assert engine.job.progress.notes == ["client north ended with exit status -9"]
    engine._kept = Alive(("superlink", -9))
    with pytest.raises(EngineError, match="Flower's superlink ended with exit status -9"):
        engine.follow()
    engine._kept = Alive((KEEPER, -9))
    with pytest.raises(EngineError, match="the keeper of the engine's processes has ended"):
        engine.follow()


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ({"runs": [{"status": "running"}]}, "running"),
        ({"runs": []}, "unknown"),
        ({"runs": None}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_flowers_word_on_a_run_is_read_or_unknown(engine, monkeypatch, answer, status):
    monkeypatch.setattr(engine, "_flwr", lambda *words: answer)
    assert engine._status() == status


def test_theprivate_folder_is_short_and_for_this_user_alone():
    with private_folder() as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert folder.stat().st_uid == os.getuid()
        assert len(str(folder)) < 40
    assert not folder.exists()
