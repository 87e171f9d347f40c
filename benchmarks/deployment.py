"""A consortium of three clients on loopback: what a round costs, and what a large adapter does.

    python benchmarks/deployment.py [--out DIR] [--rounds 12] [--megabytes 500]
        [--only rounds|large]

Real processes, keys, certificates and gates, as `silotune rehearse` starts them. First the engine's
own round (noop_server.py, noop_client.py: messages without content) and, on the same engine, that
of silotune, less the time of its slowest client: the rest is overhead. Then adapters of so many
megabytes for one, two and three clients, with the server's largest memory.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

import silotune
from silotune.deployment.queue import submit
from silotune.deployment.rehearsing import clients_of, consortium_of, follow
from silotune.progress import human_bytes
from silotune.runtime.kept import Kept, program
from silotune.runtime.submission import APP

CLIENTS = 3
SHORT = ["evaluate.every=0", "train.local_steps=1", "train.batch_size=1", "train.max_length=64"]
BYTES_OF_A_RANK = 4 * 30 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
"""SmolLM2-135M: float32, 30 layers, every linear map of each."""
SERVER = {
    "server app": "flwr-serverapp",
    "SuperLink": "flower-superlink",
    "gate": "caddy",
    "run": "run --resume",
}
NOOP = {
    "silotune.runtime.flower_client:app": "noop_client:app",
    "{server}": "noop_server:app",
}


def main() -> None:
    """Start a consortium, measure, print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path)
    options.add_argument("--rounds", type=int, default=12)
    options.add_argument("--megabytes", type=float, default=500)
    options.add_argument("--only", choices=("rounds", "large"))
    args = options.parse_args()
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # of all processes: the apps' own modules
    with tempfile.TemporaryDirectory() as scratch:
        place = (args.out or Path(scratch) / "consortium").absolute()
        run, rows = clients_of("hospitals", ["runtime.threads=1"], CLIENTS)
        with consortium_of(run, rows, place, quiet) as (folder, kept):
            if args.only != "large":
                rounds(folder, kept, args.rounds)
            if args.only != "rounds":
                large(folder, kept, args.megabytes)


def quiet(text: str) -> None:
    """Nothing: only the tables are printed."""


# --- what a round costs


def rounds(folder: Path, kept: Kept, num_rounds: int) -> None:
    """Print the engine's own round, silotune's, and what is between them."""
    engine = engine_rounds(folder, num_rounds)
    made = submit(folder, "hospitals", [*SHORT, f"rounds={num_rounds}", "runtime.threads=1"])
    follow(made, kept, quiet)
    rows = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    ours = {row["round"]: row["seconds"] for row in rows if row["event"] == "round"}
    slowest: dict[int, float] = {}
    for row in rows:
        if row["event"] == "train":
            slowest[row["round"]] = max(slowest.get(row["round"], 0), row["seconds"])
    # the first round loads the base model
    rest = [ours[r] - slowest[r] for r in ours if r > 1]
    floor = statistics.median(engine[1:])
    over = statistics.median(rest) - floor
    print(f"{CLIENTS} clients, {num_rounds} rounds, medians without the first", flush=True)
    print(f"the engine's own round          {floor:.2f} s  ({spread(engine[1:])})")
    print(f"silotune's, less its training   {statistics.median(rest):.2f} s  ({spread(rest)})")
    print(f"overhead                        {over:+.2f} s, ratio {1 + over / floor:.2f}")
    loads = silotune.Run(made).summary["base_model_loads"]
    print(f"base model loads                {loads}: the server's two, and one a client")
    print(f"first round                     {ours[1]:.1f} s, its slowest client {slowest[1]:.1f} s")


def engine_rounds(folder: Path, num_rounds: int) -> list[float]:
    """Seconds of each round of an app that does nothing, on the consortium's own engine."""
    engine = (folder / "engine").absolute()
    app, out = engine / "noop", engine / "noop.json"
    app.mkdir()
    text = APP
    for ours, theirs in NOOP.items():
        text = text.replace(ours, theirs)
    told = f"clients = {CLIENTS}\nrounds = {num_rounds}\nout = {json.dumps(str(out))}\n"
    (app / "pyproject.toml").write_text(text + told, encoding="utf-8")
    environment = {**os.environ, "FLWR_HOME": str(engine / "flwr")}
    words = ["run", str(app), "engine", "--format", "json"]
    subprocess.run([program("flwr"), *words], env=environment, check=True, capture_output=True)
    while not out.exists():
        time.sleep(0.5)
    return json.loads(out.read_text(encoding="utf-8"))


def spread(values: list[float]) -> str:
    """Least and most."""
    return f"{min(values):.2f} to {max(values):.2f}"


# --- large adapters


def large(folder: Path, kept: Kept, megabytes: float) -> None:
    """Print what a round of large adapters takes, and the server's memory, by number of clients."""
    rank = math.ceil(megabytes * 1e6 / BYTES_OF_A_RANK)
    keys = [*SHORT, "rounds=1", "runtime.threads=1", "adapter.targets=all-linear"]
    keys += [f"adapter.rank={rank}", f"adapter.alpha={rank}", "train.optimizer=sgd"]
    keys += ["checkpoint.keep=last", "report.page=false", "report.samples=0"]
    print("\nclients  adapter   round, s  largest memory of the server's processes", flush=True)
    for num_clients in range(1, CLIENTS + 1):
        made = submit(folder, "hospitals", [*keys, f"sampling.num_clients={num_clients}"])
        with server_memory(folder) as peaks:
            follow(made, kept, quiet)
        rows = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
        (round_,) = (row for row in rows if row["event"] == "round")
        size = next(row["bytes_up"] for row in rows if row["event"] == "train")
        memory = ", ".join(f"{name} {human_bytes(own)}" for name, own in peaks.items())
        seconds = round_["seconds"]
        print(f"{num_clients:7}  {human_bytes(size):>8}  {seconds:8.1f}  {memory}", flush=True)


@contextmanager
def server_memory(folder: Path) -> Iterator[Mapping[str, int]]:
    """The largest resident memory of each kind of process below `server up`, while it lasts."""
    peaks = dict.fromkeys(SERVER, 0)
    over = threading.Event()

    def watch() -> None:
        (up,) = (p for p in psutil.process_iter() if is_server(p, folder))
        while not over.wait(0.1):
            for process in up.children(recursive=True):
                try:
                    line, size = " ".join(process.cmdline()), process.memory_info().rss
                except psutil.Error:
                    continue
                for name, words in SERVER.items():
                    if words in line:
                        peaks[name] = max(peaks[name], size)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peaks
    finally:
        over.set()
        watcher.join()


def is_server(process: psutil.Process, folder: Path) -> bool:
    """Whether this is the consortium's `server up`."""
    try:
        line = process.cmdline()
    except psutil.Error:
        return False
    return line[-4:] == ["server", "up", "--folder", str(folder)]


if __name__ == "__main__":
    main()
