"""`silotune server up`: SuperLink, its executor, the gate, and one run at a time.

Everything that must survive is in the consortium's folder: who is in, the engine's state, and the
run folders. So this process may be killed and restarted at any time: clients wait, and the run that
was under way resumes from what it had finished.
"""

import signal
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from silotune.core.atomic_files import write_json
from silotune.core.errors import EngineError
from silotune.core.processors import usable_threads
from silotune.core.reading_back import read_object
from silotune.deployment.consortium.caddy import gate_command
from silotune.deployment.consortium.certificates import (
    fingerprint,
    ssh_public,
    write_own_certificate,
)
from silotune.deployment.consortium.folder import Consortium, Member
from silotune.deployment.consortium.gate import LOOPBACK, server_gate, write_leaves
from silotune.deployment.notice import write_notice
from silotune.deployment.queue import Queue
from silotune.deployment.supervisor import Note, Supervisor, only_one
from silotune.federation.roster import MEMBERS, write_members
from silotune.runtime.flower.engine import START_S, free_port, private_folder, write_connection
from silotune.runtime.flower.engine_command import CONNECTION, engine_environment, flwr

TICK_S = 0.5
"""Seconds between two looks at who has come, gone, or ended."""
NOTICE_S = 5.0
"""Seconds between two looks at whether the notice to clients has to change."""
AGAIN_S = 10.0
"""Seconds before a client that the engine did not accept is registered again."""
NODES = "nodes.json"
"""The engine's number for each client's key; belongs to the engine's own state."""
STATE = "state.db"
GATE, JOB = "gate", "job"


def serve(folder: Path, note: Note) -> None:
    """Keep a consortium's server up, until a signal.

    Args:
        folder: The consortium's folder.
        note: Told what happens.

    Raises:
        ConfigError: It is already up, or something is not installed.
        EngineError: The engine does not start.
    """
    consortium = Consortium.open(folder)
    engine = (folder / MEMBERS).parent.absolute()
    with (
        only_one(engine / "up.lock", what="this server is already up"),
        private_folder() as private,
    ):
        server = _Server(consortium, engine, private, note)
        try:
            server.start()
            while True:
                server.tend()
                time.sleep(TICK_S)
        finally:
            server.close()


class _Server:
    """The programs that `serve` keeps running."""

    def __init__(self, consortium: Consortium, engine: Path, private: Path, note: Note) -> None:
        self.consortium, self.engine, self.private, self.note = consortium, engine, private, note
        self.queue = Queue(consortium.folder, note)
        self.port, self._notice_due = free_port(), 0.0
        self._again: dict[str, float] = {}
        self.environment = engine_environment(
            engine / "flwr", private=private, runs=engine / "runs", threads=usable_threads()
        )
        for place in ("flwr", "runs", "logs"):
            (engine / place).mkdir(mode=0o700, exist_ok=True)
        if not (engine / STATE).exists():
            (engine / NODES).unlink(missing_ok=True)  # its numbers belong to another state
        self.supervisor = Supervisor(
            private, logs=engine / "logs", environment=self.environment, note=note
        )

    def start(self) -> None:
        """Start everything, and wait until the engine answers."""
        trusted = write_own_certificate(self.private / "engine", LOOPBACK)
        address = f"{LOOPBACK}:{self.port}"
        connection = {"address": address, "root-certificates": str(trusted)}
        write_connection(self.engine / "flwr", connection)
        self._superlink(trusted)
        self._wait_for(address, trusted)
        executor = ["--root-certificates", str(trusted), "--runtime-api-address", address]
        self.supervisor.keep("superexec", ["flower-superexec", *executor], rest_s=2)
        write_leaves(self.private / "leaves", self.consortium.members())
        self.consortium.issue_server_certificate()
        config = server_gate(
            self.consortium,
            engine_port=self.port,
            engine_certificate=trusted,
            leaves=self.private / "leaves",
            public=self.private / "public",
        )
        write_json(self.private / "gate.json", config)
        # before the gate listens: a client that asks at once would get HTTP 404
        write_notice(self.private / "public", self.consortium.folder)
        self.supervisor.keep(GATE, gate_command(self.private / "gate.json"))
        about = self.consortium.about
        self.note(f"{about.name}: clients reach it at {about.host}, port {about.port}")
        self.note(f"fingerprint, to be compared by telephone: {self.consortium.fingerprint()}")

    def _superlink(self, trusted: Path) -> None:
        argv = [
            *(sys.executable, "-m", "silotune.runtime.flower.superlink"),
            # server apps are then processes of the executor, so they outlive a SuperLink
            *("--isolation", "process"),
            *("--ssl-ca-certfile", str(trusted)),
            *("--ssl-certfile", str(self.private / "engine" / "certificate.pem")),
            *("--ssl-keyfile", str(self.private / "engine" / "key.pem")),
            "--enable-supernode-auth",
            *("--database", str(self.engine / STATE)),
            "--disable-runtime-dependency-installation",
            *("--host", LOOPBACK, "--port", str(self.port)),
        ]
        self.supervisor.keep("superlink", argv)

    def _wait_for(self, address: str, trusted: Path) -> None:
        context = ssl.create_default_context(cafile=str(trusted))
        direct = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        deadline = time.monotonic() + START_S
        while True:
            try:
                with direct.open(f"https://{address}/health", timeout=2) as page:
                    if page.status == 200:
                        return
            except (OSError, urllib.error.URLError):
                pass
            for _ in self.supervisor.tend():
                pass
            if time.monotonic() > deadline:
                raise EngineError(
                    f"Flower's SuperLink did not answer within {START_S:g} s.\n"
                    f"  See its log: {self.supervisor.log_of('superlink')}"
                )
            time.sleep(0.2)

    def tend(self) -> None:
        """Look at everything once, and act on it."""
        for name, code in self.supervisor.tend():
            assert name == JOB
            self.queue.job_ended(code)
        self._admit()
        if time.monotonic() >= self._notice_due:
            write_notice(self.private / "public", self.consortium.folder)
            self._notice_due = time.monotonic() + NOTICE_S
        self.queue.tend(self.supervisor)

    # --- who is in

    def _admit(self) -> None:
        """Tell the engine and the gate exactly who is in."""
        members = self.consortium.members()
        if write_leaves(self.private / "leaves", members):
            self.supervisor.tell(GATE, signal.SIGUSR1)
        path = self.engine / NODES
        fix = f"Remove {path.parent} and start the server again: all clients are registered again."
        known = read_object(path, fix=fix) if path.is_file() else {}
        wanted = {name: fingerprint(own.key) for name, own in members.items()}
        gone = [name for name, own in known.items() if wanted.get(name) != own["key"]]
        now = time.monotonic()
        new = [n for n in wanted if (n not in known or n in gone) and self._again.get(n, 0) <= now]
        for name in gone:
            self._unregister(known.pop(name)["node"])
            self.note(f"{name} is out")
        for name in new:
            if (node := self._register(members[name])) is not None:
                known[name] = {"key": wanted[name], "node": node}
                self.note(f"{name} is in: {wanted[name]}")
                continue
            # a server that was killed may have registered it without recording it
            self._forget_unknown(known)
            self._again[name] = time.monotonic() + AGAIN_S
        if gone or new:
            write_json(path, known)
        if gone or new or not (self.consortium.folder / MEMBERS).is_file():
            self._write_members(known)

    def _forget_unknown(self, known: Mapping[str, Mapping[str, Any]]) -> None:
        """Have the engine forget nodes that we have no record of."""
        answer = self._flwr("supernode", "list", CONNECTION, "--format", "json")
        ours = {int(own["node"]) for own in known.values()}
        for node in {int(own["node-id"]) for own in answer.get("nodes") or []} - ours:
            self._unregister(node)

    def _unregister(self, node: int) -> None:
        self._flwr("supernode", "unregister", str(node), CONNECTION, "--format", "json")

    def _write_members(self, known: Mapping[str, Mapping[str, Any]]) -> None:
        nodes = {name: int(own["node"]) for name, own in known.items()}
        write_members(self.consortium.folder / MEMBERS, nodes)

    def _register(self, member: Member) -> int | None:
        public = self.private / f"{member.name}.pub"
        public.write_bytes(ssh_public(member.key))
        words = ("supernode", "register", str(public), CONNECTION, "--name", member.name)
        answer = self._flwr(*words, "--format", "json")
        return int(answer["node-id"]) if answer.get("node-id") else None

    def _flwr(self, *words: str) -> dict[str, Any]:
        log = self.supervisor.log_of("flwr")
        return flwr(words, environment=self.environment, log=log)

    def close(self) -> None:
        """End everything; a run that is under way resumes next time."""
        self.supervisor.tell(JOB)
        self.supervisor.close()
