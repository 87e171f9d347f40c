"""What a message costs the server: rounds of many clients that each deliver 1 MB, without a model.

Runs the real loop with a real run folder: every update is checked, spooled, summed, measured and
recorded; only the training is left out. The case `flower` is Flower's own FedAvg in its own
simulation, with tensors of the same sizes. Each line is measured in a separate process, so that the
peak memory belongs to that line. The first memory column is taken before the first round. The case
`floor` writes the same bytes, one file per client, reads them back once and deletes the files.

Seconds are those of the median and of the fastest round. Back-to-back rounds are the hard case for
a disk: ext4 skips inodes that were freed in the last few seconds, so creating the next thousand
files can take longer than filling them.

    python benchmarks/messages.py [--clients 10 100 1000] [--rounds 5] [--cases in-process floor]
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from flower_run import run_app

from silotune.core.tree import sha256, size_bytes
from silotune.core.types import AdapterState, Broadcast, Score, ServerState, Update
from silotune.core.wording import human_bytes
from silotune.data.client_rows import ClientRows
from silotune.federation.progress import Progress
from silotune.federation.rounds import run_rounds
from silotune.federation.run_folder import RunFolder
from silotune.recipes.algorithm import build_algorithm
from silotune.recipes.parse import parse
from silotune.recipes.schema import RunConfig

START = {
    f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{factor}.weight": torch.zeros(s)
    for layer in range(20)
    for factor, s in (("A", (10, 625)), ("B", (625, 10)))
}
"""40 float32 tensors, 1 000 000 bytes in total."""


@dataclass(frozen=True)
class Measured:
    """What one case cost."""

    wall: list[float]
    """Seconds of each round."""
    cpu: list[float]
    """Processor seconds of this process in each round, all threads."""
    before: int
    """Peak bytes before the first round: imports, and what the stand-in holds."""
    peak: int
    """Peak bytes after the last round."""
    result: str = ""
    """Fingerprint of the last adapter: cases that run the same rounds must agree."""


def peak_memory_bytes() -> int:
    """Peak resident size of this process.

    A child starts with its parent's peak, so the parent does nothing but start children.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Deltas:
    """Stands in for clients: each answers at once with its own random numbers.

    A client's delta is a window into one long stretch of noise, so drawing it costs only a copy.
    """

    def __init__(self, num_clients: int) -> None:
        self.num_clients = num_clients
        self.size = sum(t.numel() for t in START.values())
        gen = torch.Generator().manual_seed(0)
        self.noise = torch.randn(self.size + 10_000, generator=gen)

    def names(self) -> Sequence[str]:
        """All clients, sorted."""
        return [f"client-{i:05d}" for i in range(self.num_clients)]

    def num_rows(self) -> Mapping[str, Mapping[str, int]]:
        """Not asked for: nothing is scored."""
        return {}

    def delta(self, client: str, round_: int) -> AdapterState:
        """A client's delta, copied as if from a network: it shares no memory with the next one."""
        at = (int(client.removeprefix("client-")) + 7 * round_) % 10_000
        parts = self.noise[at : at + self.size].split([t.numel() for t in START.values()])
        pairs = zip(START.items(), parts, strict=True)
        return {name: part.clone().view(like.shape) for (name, like), part in pairs}

    def train(self, messages: Mapping[str, Broadcast]) -> Iterator[Update]:
        """Answer for each client of the cohort."""
        for name, broadcast in messages.items():
            delta = self.delta(name, broadcast.round)
            yield Update(
                client=name,
                round=broadcast.round,
                delta=delta,
                num_examples=100 + len(name) + int(name[-2:]),
                metrics={"train_loss": 1.0, "num_tokens": 5, "seconds_training": 0.1, "seconds": 1},
                bytes_down=size_bytes(delta),
                bytes_up=size_bytes(delta),
            )

    def evaluate(self, messages: Mapping[str, Broadcast]) -> Iterator[Score]:
        """Never called: nothing is scored here."""
        raise AssertionError(f"{len(messages)} clients asked for a score")


class RoundClock(Progress):
    """Records when each round begins."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def tick(self) -> None:
        """Read both clocks."""
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def begin_round(self, round_: int, cohort: Sequence[str]) -> None:  # noqa: ARG002 - as Progress
        """Record the start of a round."""
        self.tick()

    def measured(self, before: int, result: str = "") -> Measured:
        """The time of each round, and the peak memory so far."""
        wall, cpu = ([b - a for a, b in pairwise(times)] for times in (self.wall, self.cpu))
        return Measured(wall, cpu, before, peak_memory_bytes(), result)


def recipe(rounds: int, **runtime: Any) -> RunConfig:
    """FedAvg over all clients, a checkpoint after every round, nothing scored."""
    table = {"rounds": rounds, "data": {"path": "medquad_mini"}, "evaluate": {"every": 0}}
    return parse({**table, "runtime": runtime})


# --- the cases: (clients, rounds, scratch folder) -> what it cost -----------------------------


def in_process(num_clients: int, rounds: int, scratch: Path) -> Measured:
    """The server's half of a round in one process, without a network."""
    run, clients, clock = recipe(rounds), Deltas(num_clients), RoundClock()
    torch.set_num_threads(run.runtime.threads)
    algorithm = build_algorithm(run.algorithm)
    before = peak_memory_bytes()
    state = run_rounds(
        run,
        ServerState(0, START, algorithm.init(START, num_clients)),
        algorithm=algorithm,
        clients=clients,
        folder=RunFolder.create(scratch / "run", run),
        progress=clock,
    )
    clock.tick()
    return clock.measured(before, sha256(state.adapter))


def plain_files(num_clients: int, rounds: int, scratch: Path) -> Measured:
    """The floor: the bytes of a round to disk and back, and nothing else."""
    clients, clock, before = Deltas(num_clients), RoundClock(), peak_memory_bytes()
    for r in range(1, rounds + 1):
        clock.tick()
        paths = [scratch / name for name in clients.names()]
        for path in paths:
            delta = clients.delta(path.name, r)
            with path.open("wb", buffering=0) as file:
                for tensor in delta.values():
                    file.write(tensor.numpy().tobytes())
        for path in paths:
            path.read_bytes()
        for path in paths:
            path.unlink()
    clock.tick()
    return clock.measured(before)


def flower_simulation(num_clients: int, rounds: int, scratch: Path) -> Measured:
    """The same loop as a server app of Flower's simulation; the clients are echo_client.py.

    Seconds are those of the rounds, without the engine's start and the clients' reports. Processor
    time and memory are spent in the engine's processes and are not measured here.
    """
    from silotune.runtime.flower import bundle
    from silotune.runtime.flower import engine as flower_engine
    from silotune.runtime.job import Job

    before = peak_memory_bytes()
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    bundle.APP = bundle.APP.replace("silotune.runtime.flower.client:app", "echo_client:app")
    run = recipe(rounds, name="flower-simulation", threads=1, join_timeout_s=600)
    folder = RunFolder.create(scratch / "run", run)
    state = ServerState(0, START, build_algorithm(run.algorithm).init(START, num_clients))
    rows = {name: ClientRows(name, (), ()) for name in Deltas(num_clients).names()}
    flower_engine.drive(Job(run, state, rows, folder, Progress(), base_sha256=""))
    wall = [row["seconds"] for row in folder.metrics() if row["event"] == "round"]
    return Measured(wall, [0.0] * len(wall), before, peak_memory_bytes())


def flower(num_clients: int, rounds: int, scratch: Path) -> Measured:
    """Flower's own FedAvg in Flower's simulation, one processor for a client (flower_echo).

    Seconds are those of the rounds after the first, which starts the engine's workers; memory is
    that of all its processes.
    """
    app, out = Path(__file__).parent / "flower_echo", scratch / "times.json"
    config = {"clients": num_clients, "rounds": rounds + 1, "out": str(out)}
    peak = run_app(app, config, home=scratch / "flwr", nodes=num_clients, cores_each=1)
    if not out.is_file():
        sys.exit((scratch / "flwr" / "log").read_text())
    wall = [b - a for a, b in pairwise(json.loads(out.read_text())[1:])]
    return Measured(wall, [0.0] * len(wall), 0, peak)


CASES: dict[str, Callable[[int, int, Path], Measured]] = {
    "in-process": in_process,
    "floor": plain_files,
    "flower-simulation": flower_simulation,
    "flower": flower,
}

# ----------------------------------------------------------------------------------------------


def in_its_own_process(case: str, num_clients: int, rounds: int) -> Measured:
    """Run this file again for one line of the table."""
    command = [sys.executable, __file__, "--one", case]
    command += ["--clients", str(num_clients), "--rounds", str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def line(case: str, num_clients: int, m: Measured) -> str:
    """One row of the table: the median round."""
    wall, cpu = statistics.median(m.wall), statistics.median(m.cpu)
    return (
        f"{case:<17} {num_clients:>7} {wall:>9.3f} {min(m.wall):>8.3f} {cpu:>8.3f} "
        f"{wall / num_clients * 1e3:>11.2f} {human_bytes(m.before):>10} {human_bytes(m.peak):>10}"
        f"  {m.result[:12]}"
    )


def main() -> None:
    """Measure, and print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory() as scratch:
            measured = CASES[args.one](args.clients[0], args.rounds, Path(scratch))
        print(json.dumps(asdict(measured)))
        return
    size = human_bytes(size_bytes(START))
    print(f"{len(START)} tensors, {size} per message, {args.rounds} rounds")
    print("case              clients   s/round  fastest    cpu s  ms/message     before       peak")
    for case in args.cases:
        for num_clients in args.clients:
            measured = in_its_own_process(case, num_clients, args.rounds)
            print(line(case, num_clients, measured), flush=True)


if __name__ == "__main__":
    main()
