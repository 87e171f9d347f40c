"""The client's side: its key, its request, its configuration, and `silotune client join`.

north/
  key.pem        made here, and never sent; new-key.pem while it is being replaced
  request.toml   to be sent to the server's operators
  kit.toml       what they sent back
  client.toml    where the rows are, and what this client agrees to; it overrides every recipe
  operators.*    what was done and refused here, signed
  state/         what this client keeps: its memory, its privacy ledger, logs
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from silotune.core.atomic_files import make_folder, write_atomically, write_json
from silotune.core.errors import ConfigError, SilotuneError
from silotune.core.processors import usable_threads
from silotune.data.reading import read_all, usual_columns
from silotune.deployment.client_status import (
    Activity,
    forget_connection_state,
    write_connection_state,
)
from silotune.deployment.consortium.caddy import gate_command
from silotune.deployment.consortium.certificates import (
    fingerprint,
    new_key,
    new_request,
    pem,
    prove,
    public_key,
    read_key,
    write_key,
    write_own_certificate,
    write_ssh_key,
)
from silotune.deployment.consortium.gate import LOOPBACK, client_gate
from silotune.deployment.consortium.kit import (
    Kit,
    Request,
    authority_of,
    certificate_of,
    check_name,
    read_kit,
    write_file,
)
from silotune.deployment.outbound_proxy import proxy_for
from silotune.deployment.supervisor import Note, Supervisor, only_one
from silotune.federation.client_config import ClientConfig, load_client_config
from silotune.federation.operator_log import record, record_new_key
from silotune.federation.outbound_log import OWN
from silotune.runtime.flower.engine import free_port, private_folder
from silotune.runtime.flower.engine_command import engine_environment
from silotune.runtime.flower.submit import NODE

KEY, REQUEST, KIT = "key.pem", "request.toml", "kit.toml"
NEW_KEY = "new-key.pem"
"""Made by `renew`, until the kit for it is there."""
REST_S = 15.0
"""Shortest pause before a SuperNode is restarted. The engine counts one that was killed as present
for up to a minute: two of Flower's heartbeats, 30 s each."""
TELL_S = 30.0
"""Seconds without a connection after which a note says how to find out why."""
TICK_S = 0.5
MOST_NAMES = 50
"""Most columns that a new client.toml lists as not allowed."""
CONNECTED = (b"SuperNode ID", b"Connection successful after")
"""What a SuperNode writes when the server has let it in, again or for the first time."""
LOST = b"Connection attempt failed"
"""What it writes when the server does not answer."""
TEMPLATE = """\
# What this client agrees to. It overrides every recipe: the server can ask, but not exceed it.
name = {name}
state = "state"               # what this client keeps: memory, privacy ledger, logs
{model}
[data]
path = {data}
# What the rows look like, if the recipe says otherwise: prompt, completion, text, label, ...

[limits]                      # a recipe that asks for more is refused, with the key as the reason
{columns}
min_count = 5                 # nothing sent is about fewer rows; not a budget: see epsilon
# tasks = ["instruct"]        # or "text", "prefer", or "classify", whose scores count labels
# max_rounds = 20             # in one run
# max_steps = 200             # forward passes for training in one round
# max_epochs = 3              # passes over the rows in one round
# max_hours = 10              # of training in one run
# max_bytes = 500_000_000     # sent in one run; state/outbound.jsonl lists all that was sent
# algorithms = ["fedavg", "fedprox"]
# models = ["smollm2-135m-instruct"]
# model_sha256 = ["..."]      # the same, by content hash
# versions = ["0.4"]          # of silotune on the server
# epsilon = 3.0               # privacy budget of all runs together; needs delta
# delta = 1e-5

[runs]
# approve = "ask"             # a run waits until you agree: silotune client approve
# approve = "listed"          # only the recipes of the next line
# recipes = ["hospitals"]     # by name, as a file here, or by SHA-256

[runtime]
# device = "cpu"              # auto, cpu, cuda or mps
# threads = 4
# client_processes = 2        # train on two GPUs; without GPUs, on half of the threads each
# idle_s = 900                # seconds without a message until the base model is unloaded

# [secure_sum]                # only sums over several clients can be read, see docs/secure-sums.md
# required = true             # refuse every recipe without them
# min_cohort = 4              # fewest clients in such a sum
# roster = {{ south = "12ab ..." }}  # the others' fingerprints, compared by telephone
"""


@dataclass(frozen=True)
class Joined:
    """A client's folder, whose kit matches its key."""

    folder: Path
    kit: Kit
    own: ClientConfig


def init(name: str, folder: Path) -> tuple[Path, str]:
    """Create a client's key and its request.

    Args:
        name: The client's name in rounds and reports.
        folder: Created if it does not exist.

    Returns:
        The request to send to the server's operators, and the fingerprint of the key.

    Raises:
        ConfigError: A key already exists, or the name is invalid.
    """
    check_name(name)
    make_folder(folder)
    key = new_key()
    write_key(folder / KEY, key)
    request = Request(name=name, request=pem(new_request(name, key)))
    write_file(folder / REQUEST, request)
    shown = fingerprint(key.public_key())
    record(folder, "init", client=name, fingerprint=shown)
    return folder / REQUEST, shown


def renew(folder: Path) -> tuple[Path, str]:
    """Make a new key for a client, and the request to replace the present one.

    The present key stays in use until `take_kit` gets the kit for the new one.

    Returns:
        The request to send to the server's operators, and the fingerprint of the new key.

    Raises:
        ConfigError: The folder is not of a client that has joined.
    """
    if not (folder / KEY).is_file() or not (folder / KIT).is_file():
        raise ConfigError(
            f"{folder} is not the folder of a client that has joined, so it has no key to renew.\n"
            "  Give the folder that `silotune client init` created: --folder DIR"
        )
    old, name = read_key(folder / KEY), read_kit(folder / KIT).client
    (folder / NEW_KEY).unlink(missing_ok=True)  # of a renewal that nobody approved
    key = new_key()
    write_key(folder / NEW_KEY, key)
    text = pem(new_request(name, key))
    write_file(folder / REQUEST, Request(name=name, request=text, proof=prove(old, text)))
    shown = fingerprint(key.public_key())
    record(folder, "new key asked for", client=name, fingerprint=shown)
    return folder / REQUEST, shown


def _use_new_key(folder: Path, kit: Kit) -> None:
    """Replace the key, if the kit is for the new one."""
    if not (folder / NEW_KEY).is_file():
        return
    new = read_key(folder / NEW_KEY)
    if fingerprint(new.public_key()) != fingerprint(public_key(certificate_of(kit))):
        return
    shown = fingerprint(new.public_key())
    record_new_key(folder, new.public_key(), client=kit.client, fingerprint=shown)
    os.replace(folder / NEW_KEY, folder / KEY)


def take_kit(
    kit: Path, folder: Path, *, data: Path | None = None, model: Path | None = None
) -> Joined:
    """Put a kit into a client's folder, and check that everything fits.

    Args:
        kit: What the server's operators sent.
        folder: Holds the key that the request was made with.
        data: The rows; needed the first time, when client.toml is written.
        model: The client's own copy of the base model, if it has one.

    Raises:
        ConfigError: Something does not fit, or client.toml has a mistake.
    """
    found = read_kit(kit)
    if not (folder / KEY).is_file():
        raise ConfigError(
            f"{folder} holds no key, and the kit is useless without it.\n"
            "  Give the folder that `silotune client init` created: --folder DIR"
        )
    _check_authority(folder, found)
    _use_new_key(folder, found)
    key = read_key(folder / KEY)
    own, theirs = fingerprint(key.public_key()), fingerprint(public_key(certificate_of(found)))
    if own != theirs:
        raise ConfigError(
            f"the kit is for another key ({theirs}) than the one in {folder} ({own}).\n"
            "  Send request.toml from this folder again, or use the folder of the kit's client."
        )
    config = folder / OWN
    if not config.is_file():
        if data is None:
            raise ConfigError(
                "the kit does not say where the rows are.\n"
                f"  Name them the first time: --data FILE. The path is then kept in {config}."
            )
        _write_own(config, found.client, data, model)
    loaded = load_client_config(config)
    if loaded.name != found.client:
        raise ConfigError(
            f"{config} calls this client '{loaded.name}', but the kit calls it '{found.client}'.\n"
            f'  Set name = "{found.client}".'
        )
    if data is not None and Path(loaded.data.path).absolute() != data.absolute():
        raise ConfigError(
            f"{config} names other rows: {loaded.data.path}.\n"
            "  Change data.path there, and omit --data."
        )
    write_file(folder / KIT, found)
    return Joined(folder.absolute(), found, loaded)


def _check_authority(folder: Path, kit: Kit) -> None:
    """Refuse a kit of another authority than the one that this client has joined."""
    if not (folder / KIT).is_file():
        return
    try:
        known = server_fingerprint(read_kit(folder / KIT))
    except ConfigError:  # damaged: it is being replaced
        return
    if known != (shown := server_fingerprint(kit)):
        raise ConfigError(
            f"the kit is of another authority ({shown}) than the one that this client has joined "
            f"({known}).\n  If the server's operators have renewed it, compare the new fingerprint "
            f"by telephone, remove {folder / KIT}, and give the new kit again."
        )


def _write_own(path: Path, name: str, data: Path, model: Path | None) -> None:
    if not data.exists():
        raise ConfigError(f"{data} does not exist.\n  Give the file or folder of the rows: --data.")
    line = f"model = {json.dumps(str(model.absolute()))}\n" if model is not None else ""
    text = TEMPLATE.format(
        name=json.dumps(name),
        data=json.dumps(str(data.absolute())),
        model=line,
        columns=_columns_line(data),
    )
    write_atomically(path, text.encode())


def _columns_line(data: Path) -> str:
    """limits.columns with the columns of the format that the rows have, and no others."""
    try:
        found = dict.fromkeys(column for row in read_all(str(data)) for column in row.columns)
    except SilotuneError:  # `doctor` reports it
        return '# columns = ["..."]          # the columns that a recipe may use'
    usual = usual_columns(found)
    others = [column for column in found if column not in usual]
    line = f"columns = {json.dumps(usual)}  # all that a recipe may use"
    if not others:
        return line
    names = json.dumps(others[:MOST_NAMES])  # escaped: a comment cannot hold every character
    return f"{line}\n# not allowed so far: {names}"


def server_fingerprint(kit: Kit) -> str:
    """What the client's people compare by telephone with what the server shows."""
    return fingerprint(public_key(authority_of(kit)))


def stay_joined(joined: Joined, note: Note) -> None:
    """Stay a client of the consortium until a signal: connect, train when asked, reconnect.

    Args:
        joined: See `take_kit`.
        note: Told what happens.

    Raises:
        ConfigError: This client is already running, or the proxy is not installed.
    """
    state = Path(joined.own.state)
    make_folder(state / "logs")
    busy = f"client '{joined.own.name}' has already joined"
    with only_one(state / "join.lock", what=busy), private_folder() as private:
        home = private / "flwr"
        home.mkdir()
        environment = engine_environment(
            home, private=private, runs=private / "runs", threads=usable_threads()
        )
        supervisor = Supervisor(private, logs=state / "logs", environment=environment, note=note)
        try:
            _start(joined, private, supervisor)
            connected = _connections(supervisor.log_of("supernode"))
            silent_until: float | None = time.monotonic() + TELL_S
            activity = Activity(joined.folder, state)
            while True:
                for _ in supervisor.tend():
                    pass
                now = next(connected)
                if now is not None:
                    write_connection_state(state, joined.kit.consortium, connected=now)
                if now:
                    silent_until = None
                    note(f"'{joined.own.name}' is connected to {joined.kit.consortium}")
                elif now is not None and silent_until is None:
                    note("the connection is lost; trying again")
                for text in activity.news():
                    note(text)
                if silent_until is not None and time.monotonic() > silent_until:
                    silent_until = None
                    kit = joined.folder / KIT
                    note(f"not connected yet; to find out why: silotune client doctor {kit}")
                time.sleep(TICK_S)
        finally:
            # first, so that it signs off while the gate is still there
            supervisor.tell("supernode", signal.SIGTERM)
            time.sleep(TICK_S)
            supervisor.close()
            forget_connection_state(state)


def _start(joined: Joined, private: Path, supervisor: Supervisor) -> None:
    folder, kit = joined.folder, joined.kit
    shown = private / "gate"
    trusted = write_own_certificate(shown, LOOPBACK)
    (private / "authority.pem").write_text(kit.authority, encoding="ascii")
    (private / "certificate.pem").write_text(kit.certificate, encoding="ascii")
    write_ssh_key(private / "key", read_key(folder / KEY))
    port = free_port()
    config = client_gate(
        kit,
        port=port,
        own=shown,
        key=folder / KEY,
        certificate=private / "certificate.pem",
        authority=private / "authority.pem",
        proxy=proxy_for(kit.host, kit.port),
    )
    write_json(private / "gate.json", config)
    supervisor.keep("gate", gate_command(private / "gate.json"))
    node = [
        *NODE,
        *("--root-certificates", str(trusted)),
        *("--superlink", f"{LOOPBACK}:{port}"),
        *("--auth-supernode-private-key", str(private / "key")),
        *("--host", LOOPBACK, "--port", str(free_port())),
        *("--node-config", f"client={json.dumps(str(folder / OWN))}"),
    ]
    supervisor.keep("supernode", node, rest_s=REST_S)


def _connections(log: Path) -> Iterator[bool | None]:
    """Whether it is connected now, if the SuperNode has said so since the last look; else None."""
    before = False
    at = log.stat().st_size if log.exists() else 0
    while True:
        new = b""
        if log.exists():
            with log.open("rb") as file:
                file.seek(at)
                new = file.read()
            at += len(new)
        last = max(new.rfind(word) for word in CONNECTED)
        lost = new.rfind(LOST)
        now = before if last == lost else last > lost  # both are -1 if it has said neither
        yield now if now != before or b"SuperNode ID" in new else None
        before = now
