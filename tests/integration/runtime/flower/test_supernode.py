"""A server that sends something else to run: five bundles that run without our SuperNode's check.

Flower's own functions do everything here; only the network is left out, except in the last test.
"""

import contextlib
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.superexec.dependency_installer import _get_project_dependencies
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import start_client_internal as loop
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from silotune.core.errors import EngineError
from silotune.deployment.client_status import Activity
from silotune.deployment.join import init
from silotune.federation.operator_log import BUNDLE_REFUSED, entries, verify
from silotune.runtime.flower import supernode
from silotune.runtime.flower.bundle import FAB_ID, FAB_VERSION, PROJECT, TOLD, project_file
from silotune.runtime.flower.engine import free_port, write_connection
from silotune.runtime.flower.engine_command import CONNECTION, engine_environment
from silotune.runtime.flower.kept_processes import program
from silotune.runtime.flower.submit import NODE
from tests.unit.runtime.flower.test_bundle import other_component, table, zipped

MARKS = 'from pathlib import Path\nimport os\nPath(os.environ["MARK"]).write_text("it ran")\n'
"""What a hostile module does: it leaves a mark."""
APP = "from flwr.clientapp import ClientApp\napp = ClientApp()\n"
OURS = {PROJECT: table()}
BUNDLES = {
    "other module": {PROJECT: other_component(), "evil.py": (MARKS + APP).encode()},
    "extra file": {**OURS, "silotune/__init__.py": MARKS.encode()},
    "extra dependency": {PROJECT: table(dependencies=["evil"])},
    "changed name": {PROJECT: table(name="silotune-runs")},
    "path trick": {**OURS, "./torch.py": MARKS.encode()},
}
RUNS_CODE = ("other module", "extra file")
"""These two leave their mark as soon as the client app is loaded."""


def run_of(content: bytes, **changes) -> Run:
    made = replace(
        Run.create_empty(7),
        fab_id=FAB_ID,
        fab_version=FAB_VERSION,
        fab_hash=hashlib.sha256(content).hexdigest(),
        override_config=dict.fromkeys(TOLD, "x"),
        series_id=7,
    )
    return replace(made, **changes)


def attack(name: str) -> tuple[bytes, Run]:
    content = zipped(BUNDLES[name])
    changes = {"fab_id": "silotune/silotune-runs"} if name == "changed name" else {}
    return content, run_of(content, **changes)


@pytest.fixture(autouse=True)
def _identity(monkeypatch):
    """Flower asks for it whenever it makes a message."""
    for name in ("run_id", "node_id", "task_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 7)


class Node:
    """A SuperNode's state, and one message of a run that it does not know."""

    def __init__(self, content: bytes, run: Run, folder: Path) -> None:
        objects = ObjectStoreFactory()
        self.state = NodeStateFactory(objectstore_factory=objects).state()
        self.state.set_node_id(5)
        self.content, self.run, self.folder = content, run, folder
        self.store = objects.store()

    def pull(self) -> int | None:
        message = Message(RecordDict(), dst_node_id=5, message_type="query")
        message.metadata.__dict__.update(_run_id=self.run.run_id, _src_node_id=1)
        message.metadata.__dict__["_message_id"] = message.object_id
        fab = Fab(self.run.fab_hash, self.content, {})
        return loop._pull_and_store_message(
            state=self.state,
            object_store=self.store,
            node_config={"client": str(self.folder / "client.toml")},
            receive=lambda: (message, get_object_tree(message)),
            get_run=lambda run_id: self.run,
            get_fab=lambda fab_hash, run_id: fab,
            pull_object=lambda run_id, name: get_all_nested_objects(message)[name].deflate(),
            confirm_message_received=lambda run_id, name: None,
            trusted_entities=None,
        )

    def kept(self) -> bool:
        """Whether a client app could now get this bundle."""
        return self.state.get_fab(self.run.fab_hash) is not None

    def replies(self) -> list[int]:
        """The codes of the errors that the server gets."""
        return [m.error.code for m in self.state.get_messages_legacy(is_reply=True)]


@pytest.fixture
def pinned(monkeypatch, tmp_path):
    """Our check in this process, with Flower's functions back in place afterwards."""
    for place, name in ((loop, supernode.PULL), (InMemoryNodeState, supernode.STORE)):
        monkeypatch.setattr(place, name, getattr(place, name))
    supernode.pin(supernode.tell_operators)
    init("north", tmp_path / "north")
    return tmp_path / "north"


LOADED_AS_FLOWER_DOES = """
import sys
from pathlib import Path
from flwr.cli.install import install_from_fab
from flwr.clientapp.utils import get_load_client_app_fn
fab, fab_id, version, fab_hash = sys.argv[1:]
install_from_fab(Path(fab).read_bytes(), skip_prompt=True)
get_load_client_app_fn("", None, True)(fab_id, version, fab_hash)
import torch
"""
"""The two calls of Flower's `run_clientapp` that come between a bundle and its first message; and
an import as the client's own code does it."""


def load(content: bytes, run: Run, home: Path) -> tuple[bool, bool, Path]:
    """Whether a client app's process loads a bundle, whether that leaves a mark, and its folder."""
    (home / "bundle").write_bytes(content)
    environment = {**os.environ, "FLWR_HOME": str(home), "MARK": str(home / "mark")}
    words = [str(home / "bundle"), run.fab_id, run.fab_version, run.fab_hash]
    done = subprocess.run(
        [sys.executable, "-c", LOADED_AS_FLOWER_DOES, *words],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
    )
    marked = (home / "mark").is_file()
    assert marked or done.returncode == 0, done.stderr
    return done.returncode == 0, marked, next((home / "apps").iterdir())


@pytest.mark.parametrize("name", BUNDLES)
def test_without_the_check_every_one_of_these_bundles_reaches_a_process_and_is_loaded(
    name, tmp_path
):
    content, run = attack(name)
    node = Node(content, run, tmp_path)
    assert node.pull() == run.run_id
    assert node.kept()
    assert node.replies() == []
    loads, marked, app = load(content, run, tmp_path)
    if name == "extra dependency":  # Flower installs it where that is allowed
        assert _get_project_dependencies(app) == ["evil"]
    assert marked == (name not in ("extra dependency", "changed name"))
    assert loads or marked


@pytest.mark.parametrize("name", BUNDLES)
def test_with_the_check_nothing_of_it_is_kept_and_both_sides_are_told(name, pinned):
    content, run = attack(name)
    node = Node(content, run, pinned)
    activity = Activity(pinned, pinned / "state")
    assert node.pull() == run.run_id
    assert not node.kept()
    assert node.state.get_run(run.run_id) is None
    assert node.replies() == [ErrorCode.INVALID_FAB]
    (line,) = entries(pinned, BUNDLE_REFUSED)
    assert line["why"].startswith("the bundle") or line["why"].startswith("the run is of the app")
    assert verify(pinned).lines == 2
    (told,) = activity.news()
    assert told.startswith("REFUSED 1 time: the server sent something to run")


def test_our_own_bundle_is_kept(pinned):
    content = zipped(OURS)
    node = Node(content, run_of(content), pinned)
    assert node.pull() == 7
    assert node.kept()
    assert entries(pinned, BUNDLE_REFUSED) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        # Flower makes a path of them: with this version, that of a folder that came another way
        ({"fab_version": "0.0.0/../../../rows"}, "the run is of the app"),
        ({"fab_id": "other/silotune-run"}, "the run is of the app"),
        ({"fab_hash": "0" * 64}, "the bundle does not have the hash"),
        ({"primary_task_type": TaskType.AGENT_APP}, "the run is of the kind 'flwr-agentapp'"),
        ({"override_config": {"evil": "x"}}, "the run's config has ['evil']"),
        ({"override_config": {"recipe": 1}}, "the run's config has"),
    ],
)
def test_our_bundle_under_another_name_kind_hash_or_config_is_refused(pinned, changes, says):
    content = zipped(OURS)
    node = Node(content, run_of(content, **changes), pinned)
    node.pull()
    assert not node.kept()
    assert node.replies() == [ErrorCode.INVALID_FAB]
    assert entries(pinned, BUNDLE_REFUSED)[0]["why"].startswith(says)


def test_a_bundle_that_reaches_the_state_another_way_is_refused_there(pinned):
    content, run = attack("other module")
    node = Node(content, run, pinned)
    with pytest.raises(EngineError, match="the bundle holds"):
        node.state.store_fab(Fab(run.fab_hash, content, {}))
    assert not node.kept()


# --- a Flower that is not the one that was read --------------------------------------------------


def as_it_is() -> types.SimpleNamespace:
    return types.SimpleNamespace(**vars(loop))


def renamed(module) -> None:
    module._pull_message = module.__dict__.pop(supernode.PULL)


def other_arguments(module) -> None:
    setattr(module, supernode.PULL, lambda state, connection: None)


def no_function(module) -> None:
    setattr(module, supernode.INSERT, print)


@pytest.mark.parametrize(
    ("change", "version", "says"),
    [
        (lambda module: None, "1.43.0", "it is version 1.43.0"),
        (lambda module: None, "1.410.0", "it is version 1.410.0"),
        (renamed, "1.41.0", "it has no function _pull_and_store_message"),
        (other_arguments, "1.41.0", "its function _pull_and_store_message takes other arguments"),
        (no_function, "1.41.0", "it has no function _insert_message"),
    ],
)
def test_a_flower_that_was_not_read_is_not_started(change, version, says):
    module = as_it_is()
    change(module)
    with pytest.raises(EngineError, match=re.escape(says)):
        supernode.pin(supernode.tell_operators, module=module, version=version)
    assert loop._pull_and_store_message.__module__ == loop.__name__, "nothing was replaced"


def test_a_state_without_the_function_is_not_started():
    with pytest.raises(EngineError, match="it has no function store_fab"):
        supernode.pin(supernode.tell_operators, state=type("State", (), {}))


def test_the_program_ends_with_the_reason(tmp_path):
    code = (
        "import flwr.supernode.start_client_internal as loop; del loop._pull_and_store_message; "
        "from silotune.runtime.flower.supernode import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "this client cannot check what Flower would run here" in done.stderr
    assert "make env EXTRAS=deploy" in done.stderr


# --- with a real server ---------------------------------------------------------------------------

SERVER_APP = """
import json, os, time
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    while len(nodes := list(grid.get_node_ids())) < 2:
        time.sleep(0.2)
    asked = [Message(RecordDict(), dst_node_id=node, message_type="query") for node in nodes]
    said = grid.send_and_receive(asked, timeout=100)
    codes = sorted(m.error.code if m.has_error() else -1 for m in said)
    Path(os.environ["CODES"]).write_text(json.dumps(codes))
"""
CLIENT_APP = (
    MARKS
    + APP
    + (
        "from flwr.app import Message, RecordDict\n"
        "@app.query()\n"
        "def query(message, context):\n"
        "    return Message(RecordDict(), reply_to=message)\n"
    )
)


@pytest.mark.engine
@pytest.mark.timeout(240)
def test_a_real_server_runs_its_code_on_a_plain_supernode_and_not_on_ours(tmp_path):
    """One hostile app, one server, two SuperNodes: Flower's and ours."""
    app, port = tmp_path / "app", free_port()
    app.mkdir()
    hostile = project_file(TOLD).replace("silotune.runtime.flower.server", "evil_server")
    hostile = hostile.replace("silotune.runtime.flower.client", "evil_client")
    (app / PROJECT).write_text(hostile)
    (app / "evil_server.py").write_text(SERVER_APP)
    (app / "evil_client.py").write_text(CLIENT_APP)
    init("north", tmp_path / "north")
    address = f"127.0.0.1:{port}"

    def environment(name: str, **own: str) -> dict[str, str]:
        home = tmp_path / name
        home.mkdir()
        write_connection(home, {"address": address, "insecure": True})
        made = engine_environment(home, private=home, runs=home, threads=1)
        return {**made, "PYTHONPATH": os.pathsep.join(sys.path), **own}

    def node(words: tuple[str, ...], name: str) -> subprocess.Popen:
        argv = [
            *(*words, "--insecure", "--superlink", address, "--port", str(free_port())),
            *("--node-config", f"client={json.dumps(str(tmp_path / 'north' / 'client.toml'))}"),
        ]
        own = environment(name, MARK=str(tmp_path / f"{name}-mark"))
        with (tmp_path / f"{name}.log").open("wb") as log:
            return subprocess.Popen(argv, env=own, stdout=log, stderr=log)

    server = environment("server", CODES=str(tmp_path / "codes.json"))
    with contextlib.ExitStack() as ended:
        link = subprocess.Popen(
            [
                *(program("flower-superlink"), "--insecure", "--port", str(port)),
                *("--database", ":flwr-in-memory:", "--disable-runtime-dependency-installation"),
            ],
            env=server,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        ended.callback(_end, link)
        for words, name in (((program("flower-supernode"),), "plain"), (NODE, "ours")):
            ended.callback(_end, node(words, name))
        for _ in range(60):
            done = subprocess.run(
                [program("flwr"), "run", str(app), CONNECTION, "--format", "json"],
                env=server,
                capture_output=True,
                text=True,
            )
            if '"success": true' in done.stdout:
                break
            time.sleep(1)
        else:
            pytest.fail(done.stdout + done.stderr)
        deadline = time.monotonic() + 120
        while not (tmp_path / "codes.json").is_file():
            assert time.monotonic() < deadline, (tmp_path / "ours.log").read_text()
            time.sleep(0.5)
    assert json.loads((tmp_path / "codes.json").read_text()) == [-1, ErrorCode.INVALID_FAB]
    assert (tmp_path / "plain-mark").read_text() == "it ran"
    assert not (tmp_path / "ours-mark").exists()
    assert "refused: the bundle holds" in (tmp_path / "ours.log").read_text()
    assert entries(tmp_path / "north", BUNDLE_REFUSED)[0]["why"].startswith("the bundle holds")


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# --- patience ------------------------------------------------------------------------------------


class Slow(http.server.BaseHTTPRequestHandler):
    """Answers two seconds after it has read a request, as a slow link makes it seem."""

    def do_POST(self) -> None:
        """Read all of it, wait, answer with an empty message."""
        self.rfile.read(int(self.headers["content-length"]))
        time.sleep(2)
        with contextlib.suppress(BrokenPipeError):
            self.send_response(200)
            self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class OwnClient(FleetHttpClient):
    """Flower's connection, so that what is changed here stays in this test."""


def test_a_client_waits_for_an_answer_in_proportion_to_the_request(monkeypatch):
    monkeypatch.setattr(supernode, "LEAST_S", 1.0)
    supernode.be_patient(OwnClient)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        client = OwnClient(f"http://127.0.0.1:{server.server_port}")
        large = PushObjectRequest(object_content=bytes(10 * supernode.SLOWEST))
        assert client.PushObject(large) == PushObjectResponse()
        with pytest.raises(httpx.ReadTimeout):
            client.PushObject(PushObjectRequest(object_content=b"small"))
    finally:
        server.shutdown()
        server.server_close()
