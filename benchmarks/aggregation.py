"""What aggregating a round costs: time against reading its updates once, and peak memory.

The updates are those of a spool on disk, written and read as in a run. `read` reads each of them
once and is what the others are compared with; `flower` reads the same tensors into Flower's records
and calls Flower's own aggregation, which holds all of them. Every line is measured in a process of
its own. Memory is the peak of the process above what it had before it aggregated, in adapters of
float32: the server's adapter itself is not counted. Seconds are the processor's, so other work on
the machine counts little. The files have just been written, so they are read from the system's
cache as far as it holds them.

    python benchmarks/aggregation.py [--numbers 10000000] [--clients 10 100] [--cases fedavg flora]

1000 clients of ten million numbers are 40 GB of files: give fewer --numbers or more disk.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from silotune.algorithms import ALGORITHMS
from silotune.core.types import AdapterState, ServerState, Update
from silotune.federation.spool import Spool
from silotune.models.devices import peak_memory_bytes

LINEAR = ("fedavg", "fedadam", "ffa_lora")
"""Algorithms that keep one update in memory at a time."""
STACKED = ("flexlora", "hetlora", "flora", "fedex")
"""Algorithms that need each client's product."""


@dataclass(frozen=True)
class Size:
    """One adapter: pairs of factors of square modules."""

    numbers: int
    width: int
    rank: int

    def start(self) -> dict[str, torch.Tensor]:
        """The server's adapter, with values so that nothing is 0."""
        modules = max(1, self.numbers // (2 * self.width * self.rank))
        gen = torch.Generator().manual_seed(1)
        return {
            f"layers.{i}.lora_{factor}.weight": torch.randn(shape, generator=gen)
            for i in range(modules)
            for factor, shape in (("A", (self.rank, self.width)), ("B", (self.width, self.rank)))
        }


@dataclass(frozen=True)
class Measured:
    """What one case cost."""

    seconds: float
    peak: int
    """Bytes above what the process had before."""


def write_updates(size: Size, num_clients: int, folder: Path) -> None:
    """The round's spool: each client's delta, drawn from its number."""
    start, spool = size.start(), Spool(folder)
    for i in range(num_clients):
        gen = torch.Generator().manual_seed(i + 2)
        delta = {n: 0.01 * torch.randn(t.shape, generator=gen) for n, t in start.items()}
        spool.add(Update(f"client {i:05d}", 1, delta, i % 7 + 1, {}))


def read(_: Size, spool: Spool) -> None:
    """Every value of every update once."""
    for update in spool:
        for tensor in update.delta.values():
            tensor.sum()


def flower(_: Size, spool: Spool) -> None:
    """Flower's weighted mean of the same tensors."""
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    records = [
        RecordDict(
            {
                "arrays": ArrayRecord({n: Array(t.numpy()) for n, t in update.delta.items()}),
                "metrics": MetricRecord({"num-examples": update.num_examples}),
            }
        )
        for update in spool
    ]
    aggregate_arrayrecords(records, "num-examples")


def ours(name: str) -> Callable[[Size, Spool], None]:
    """An algorithm of ours: its combine and its step."""

    def aggregate(size: Size, spool: Spool) -> None:
        config, build = ALGORITHMS[name]
        algorithm, start = build(config()), size.start()
        state = ServerState(0, start, algorithm.init(start, len(spool)))
        algorithm.step(state, algorithm.combine(state, Trained(spool, algorithm.local.trains)))

    return aggregate


class Trained:
    """A spool's updates without the tensors that an algorithm does not train in round 1."""

    def __init__(self, spool: Spool, trains: Callable[[str, int], bool]) -> None:
        self._spool, self._trains = spool, trains

    def __len__(self) -> int:
        return len(self._spool)

    def __iter__(self) -> Iterator[Update]:
        for update in self._spool:
            delta: AdapterState = {n: t for n, t in update.delta.items() if self._trains(n, 1)}
            yield Update(update.client, 1, delta, update.num_examples, {})


def case_of(name: str) -> Callable[[Size, Spool], None]:
    """What a line of the table runs."""
    return {"read": read, "flower": flower}.get(name) or ours(name)


def measure(name: str, size: Size, folder: Path) -> Measured:
    """One case in this process."""
    run, spool = case_of(name), Spool(folder)
    if name == "flower":
        import flwr.serverapp.strategy.strategy_utils  # noqa: F401 - not a part of aggregating
    first = next(iter(spool))  # the libraries' first call
    del first
    before, began = peak_memory_bytes(), time.process_time()
    run(size, spool)
    seconds = time.process_time() - began
    return Measured(seconds, peak_memory_bytes() - before)


def main() -> None:
    """Measure, and print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--numbers", type=int, default=10_000_000)
    options.add_argument("--width", type=int, default=2560)
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    options.add_argument("--cases", nargs="+", default=[*LINEAR, *STACKED, "flower"])
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--place", type=Path, help="folder for the updates; a temporary one")
    options.add_argument("--one", help=argparse.SUPPRESS)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    size = Size(args.numbers, args.width, args.rank)
    if args.one:
        print(json.dumps(asdict(measure(args.one, size, args.place))))
        return
    adapter = sum(t.numel() * 4 for t in size.start().values())
    print(f"one adapter: {adapter / 4:,.0f} numbers, {adapter / 1e6:.1f} MB")
    print(f"{'case':<12} {'clients':>7} {'seconds':>8} {'of read':>8} {'peak, adapters':>15}")
    for num_clients in args.clients:
        with tempfile.TemporaryDirectory(dir=args.place) as scratch:
            folder = Path(scratch) / "round-00001"
            write_updates(size, num_clients, folder)
            base = 0.0
            for name in ["read", *args.cases]:
                command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
                command += ["--place", str(folder)]
                found: list[Measured] = []
                for _ in range(args.repeats):
                    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                    found.append(Measured(**json.loads(done.stdout.splitlines()[-1])))
                best = min(found, key=lambda m: m.seconds)
                base = base or best.seconds
                print(
                    f"{name:<12} {num_clients:>7} {best.seconds:>8.2f} "
                    f"{best.seconds / base:>8.2f} {best.peak / adapter:>15.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
