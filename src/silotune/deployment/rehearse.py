"""`silotune rehearse`: a complete consortium on one machine, with the commands that real ones use.

A server, and clients that each have their own folder, key, certificate, gate, rows and processes.
Only what people do by hand (sending files, comparing fingerprints) is left out.
"""

import contextlib
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from silotune.core.atomic_files import make_folder
from silotune.core.errors import ConfigError, EngineError
from silotune.core.wording import counted
from silotune.data.client_rows import ClientRows
from silotune.data.reading import DataConfig
from silotune.deployment.consortium.caddy import find_caddy
from silotune.deployment.consortium.folder import Consortium
from silotune.deployment.consortium.gate import LOOPBACK
from silotune.deployment.join import init
from silotune.deployment.orders import DONE, FAILED, STOPPED, state_of
from silotune.deployment.queue import LOG, submit
from silotune.deployment.supervisor import Note
from silotune.federation.progress import Progress
from silotune.federation.roster import NAME
from silotune.federation.simulated_clients import write_client_configs
from silotune.models.sources import resolve
from silotune.recipes.parse import load_recipe
from silotune.recipes.schema import RunConfig
from silotune.results.run import Run
from silotune.runtime.flower.engine import free_port, private_folder
from silotune.runtime.flower.engine_command import engine_environment
from silotune.runtime.flower.kept_processes import Kept
from silotune.runtime.identity import add_roster
from silotune.workflows.check import check
from silotune.workflows.folders import place_for

START_S, CLIENT_S = 120.0, 60.0
"""Seconds the clients have to connect, and how many more each adds: all start at once, and three
processes of each import Flower, which can take 6 s of a processor."""
TICK_S = 0.3
SERVER = "server up"
"""No client can have this name."""


def rehearse(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    num_clients: int = 3,
    out: Path | None = None,
    progress: Progress | None = None,
) -> Run:
    """Run a recipe as a consortium on this machine.

    Args:
        recipe: A shipped name or a TOML file, with rows to split as in a simulation.
        overrides: Dotted `key=value` texts on top of it.
        num_clients: How many of its clients take part.
        out: Folder to create; by default runs/<time>-<recipe>-rehearsal.
        progress: Told what happens; silent by default.

    Returns:
        The finished run. It is in the rehearsal's folder, with everything that the consortium and
        its clients left: keys, kits, logs.

    Raises:
        SilotuneError: The recipe has a mistake, or something did not start; all is stopped then.
    """
    progress = progress or Progress()
    progress.doing("reading the rows")
    run, rows = clients_of(recipe, overrides, num_clients)
    place = place_for(recipe, out, "-rehearsal").absolute()
    progress.doing(f"starting a server and {counted(len(rows), 'client')}")
    with consortium_of(run, rows, place, progress.note) as (folder, kept):
        progress.doing("waiting for the run to start")
        made = submit(folder, run)
        progress.doing("running the recipe")
        follow(made, kept, progress.note)
        progress.doing("stopping the server and the clients")
    return Run(made)


@contextlib.contextmanager
def consortium_of(
    run: RunConfig, rows: Mapping[str, ClientRows], place: Path, note: Note
) -> Iterator[tuple[Path, Kept]]:
    """Run a server and clients on this machine, all connected; they end with the block.

    Args:
        run: Says what the clients' rows look like, which base they have, and their threads.
        rows: Each client's rows, by a name that a certificate can have.
        place: Folder to create, for everything that they leave.
        note: Told what happens.

    Yields:
        The consortium's folder, and the keeper of the processes.
    """
    find_caddy()
    if place.exists():
        raise ConfigError(f"{place} already exists.\n  Choose another --out.")
    make_folder(place)
    note(f"rehearsal: {place}")
    folder = place / "consortium"
    address = f"{LOOPBACK}:{free_port()}"
    Consortium.create(folder, name="rehearsal", address=address, listen=address)
    consortium = Consortium.open(folder)
    base = resolve(run.model.name)
    copy = str(base.absolute()) if isinstance(base, Path) else None
    configs = write_client_configs(
        place / "clients",
        rows,
        run,
        model=copy,
        state=lambda name: place / "clients" / name / "state",
    )
    commands: dict[str, list[str]] = {SERVER: ["server", "up", "--folder", str(folder)]}
    roster: dict[str, str] = {}
    for name, config in configs.items():
        request, roster[name] = init(name, config.parent)
        kit, _ = consortium.approve(request)
        commands[name] = ["client", "join", str(kit), "--folder", str(config.parent)]
    if run.secure_sum.is_on:
        add_roster(configs, roster)
    with private_folder() as private:
        environment = engine_environment(
            place, private=private, runs=place, threads=run.runtime.threads
        )
        kept = Kept(private, log=place / "keeper.log", environment=environment)
        try:
            for name, words in commands.items():
                log = place / f"{name}.log"
                kept.start(name, [sys.executable, "-m", "silotune", *words], log=log)
            _wait_for_clients(place, configs, kept, note)
            yield folder, kept
        finally:
            kept.close()


def clients_of(
    recipe: str | Path, overrides: Sequence[str], num_clients: int
) -> tuple[RunConfig, Mapping[str, ClientRows]]:
    """The recipe, and that many clients' rows, by names that a certificate can have."""
    keys = list(overrides)
    cut = load_recipe(recipe, keys).partition
    if cut is not None and cut.num_clients is not None:
        keys.append(f"partition.num_clients={num_clients}")
    checked = check(recipe, [*keys, "runtime.name=in-process"])
    if len(checked.rows) < num_clients:
        raise ConfigError(
            f"the recipe's rows make {counted(len(checked.rows), 'client')}, but {num_clients} "
            f"were requested.\n  Use --clients {len(checked.rows)}, or provide more rows."
        )
    rows: dict[str, ClientRows] = {}
    for n, (name, own) in enumerate(sorted(checked.rows.items())[:num_clients], start=1):
        rows[name if re.fullmatch(NAME, name) else f"client-{n}"] = own
    data = checked.run.data
    # the clients' files hold rows that are already converted and split
    kept = DataConfig(
        path=data.path, system=data.system, template=data.template, labels=data.labels
    )
    return checked.run.model_copy(update={"data": kept}), rows


def _wait_for_clients(place: Path, configs: Mapping[str, Path], kept: Kept, note: Note) -> None:
    patience_s = START_S + CLIENT_S * len(configs)
    deadline = time.monotonic() + patience_s
    missing = set(configs)
    while missing:
        _check_alive(place, kept)
        for name in sorted(missing):
            if "is connected to" in _output_of(place, name):
                note(f"{name} is connected")
                missing.discard(name)
        if missing and time.monotonic() > deadline:
            raise EngineError(
                f"{', '.join(sorted(missing))}: not connected within {patience_s:g} s.\n"
                f"  See their logs in {place}"
            )
        time.sleep(TICK_S)


def follow(made: Path, kept: Kept, note: Note) -> None:
    """Pass on a run's output until it is over.

    Raises:
        EngineError: It failed or was stopped, or a process of the consortium has ended.
    """
    log, at = made / LOG, 0
    while True:
        _check_alive(made.parents[2], kept)
        state = state_of(made)
        if log.exists():
            with log.open(encoding="utf-8", errors="replace") as file:
                file.seek(at)
                text = file.read()
                at = file.tell()
            for line in text.splitlines():
                note(line)
        if state["state"] == DONE:
            return
        if state["state"] in (FAILED, STOPPED):
            raise EngineError(f"the run is {state['state']}: {state['why']}.")
        time.sleep(TICK_S)


def _check_alive(place: Path, kept: Kept) -> None:
    for name, code in kept.ended():
        raise EngineError(
            f"the rehearsal's {name} ended with exit status {code}.\n"
            f"  {_output_of(place, name)[-1000:].strip()}"
        )


def _output_of(place: Path, name: str) -> str:
    log = place / f"{name}.log"
    return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
