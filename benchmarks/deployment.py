"""A consortium of three clients on loopback: what a round costs, and what a large adapter does.

    python benchmarks/deployment.py [--out DIR] [--rounds 12] [--megabytes 500]
        [--only rounds|large]

Uses real processes, keys, certificates and gates, as `silotune rehearse` starts them. The first
part compares silotune's rounds, with a base model so small that training takes no time, with those
of an app that does nothing on the same engine (noop_server.py, noop_client.py): the difference is
overhead. The second part runs adapters of `--megabytes` MB with one, two and three clients, and
reports the server's peak memory.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from flower_run import environment

from silotune.core.wording import human_bytes
from silotune.deployment.queue import submit
from silotune.deployment.rehearse import clients_of, consortium_of, follow
from silotune.models.base import folder_of_base
from silotune.recipes.parse import load_recipe
from silotune.runtime.flower.bundle import app_of
from silotune.runtime.flower.kept_processes import Kept, program

CLIENTS, TURNS = 3, 2
SHORT = ["evaluate.every=0", "train.local_steps=1", "train.batch_size=1", "train.max_length=64"]
BYTES_OF_A_RANK = 4 * 30 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
"""SmolLM2-135M: float32, 30 layers, every linear map in each layer."""
SERVER = {
    "server app": "flwr-serverapp",
    "SuperLink": "silotune.runtime.flower.superlink",
    "gate": "caddy",
    "run": "run --resume",
}
OURS, NOOP = "silotune.runtime.flower.client:app", "noop_client:app"


def main() -> None:
    """Start a consortium, measure, and print the results."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path)
    options.add_argument("--rounds", type=int, default=12)
    options.add_argument("--megabytes", type=float, default=500)
    options.add_argument("--only", choices=("rounds", "large"))
    args = options.parse_args()
    here = Path(__file__).parent
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # as in `make`
    # so that all find the apps, and start them
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here), str(here / "unchecked"), before])
    with tempfile.TemporaryDirectory() as scratch:
        place = (args.out or Path(scratch)).absolute()
        if args.only != "large":
            base = small_base(Path(scratch) / "base")
            run, rows = clients_of("hospitals", of_small(base), CLIENTS)
            with consortium_of(run, rows, place / "rounds", quiet) as (folder, kept):
                rounds(folder, kept, args.rounds, base)
        if args.only != "rounds":
            run, rows = clients_of("hospitals", ["runtime.threads=1"], CLIENTS)
            with consortium_of(run, rows, place / "large", quiet) as (folder, kept):
                large(folder, kept, args.megabytes)


def quiet(text: str) -> None:
    """Print nothing: only the tables are shown."""


# --- what a round costs


def rounds(folder: Path, kept: Kept, num_rounds: int, base: Path) -> None:
    """Print the engine's own round, silotune's, and the difference; two turns of each."""
    keys = [*SHORT, *of_small(base), f"rounds={num_rounds}"]
    engine: list[float] = []
    ours: list[float] = []
    trained: list[float] = []
    size = 0
    for turn in range(TURNS):
        made = submit(folder, "hospitals", keys)
        with ends_of_rounds(made) as ends:
            follow(made, kept, quiet)
        # from end to end, so that saving counts; the first round loads the base model
        ours += [after - before for before, after in itertools.pairwise(ends)]
        trained += [row["seconds"] for row in rows_of(made, "train") if row["round"] > 1]
        engine += engine_rounds(folder, num_rounds, app=f"noop{turn}")[1:]
        size = rows_of(made, "train")[0]["bytes_up"]
    floor, own = statistics.median(engine), statistics.median(ours)
    print(f"{CLIENTS} clients, {len(ours)} rounds, medians without the first round of each turn")
    print(f"the engine's own, empty messages   {floor:.2f} s  {spread(engine)}")
    print(f"silotune's, {human_bytes(size)} each way     {own:.2f} s  {spread(ours)}")
    print(f"overhead                           {own - floor:+.2f} s, ratio {own / floor:.2f}")
    print(
        f"of that, local training            {statistics.median(trained):.2f} s  {spread(trained)}"
    )


def small_base(folder: Path) -> Path:
    """Make the recipe's base with random weights, and far fewer: training it takes no time."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    of = folder_of_base(load_recipe("hospitals").model)
    narrow = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(of, **narrow, **heads))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(of).save_pretrained(folder)
    return folder


def of_small(base: Path) -> list[str]:
    """Keys that put `base` in place of the recipe's, with an adapter as large as the recipe's."""
    return [f"model.name={base}", "adapter.rank=600", "adapter.alpha=600", "runtime.threads=1"]


def engine_rounds(folder: Path, num_rounds: int, *, app: str) -> list[float]:
    """Seconds of each round of an app that does nothing, on the consortium's engine.

    Args:
        folder: The consortium's folder.
        num_rounds: How many rounds to run.
        app: Name of the folder to create for the app.
    """
    engine = (folder / "engine").absolute()
    place, out = engine / app, engine / f"{app}.json"
    place.mkdir()
    text = app_of("noop_server:app").replace(OURS, NOOP)
    told = f"clients = {CLIENTS}\nrounds = {num_rounds}\nout = {json.dumps(str(out))}\n"
    (place / "pyproject.toml").write_text(text + told, encoding="utf-8")
    words = ["run", str(place), "engine", "--format", "json"]
    own = environment(engine / "flwr")
    subprocess.run([program("flwr"), *words], env=own, check=True, capture_output=True)
    while not out.exists():
        time.sleep(0.5)
    return json.loads(out.read_text(encoding="utf-8"))


@contextmanager
def ends_of_rounds(made: Path) -> Iterator[list[float]]:
    """Collect when each round of a run was recorded, by this machine's clock, inside the block."""
    ends: list[float] = []

    def look() -> None:
        if (made / "metrics.jsonl").exists():
            ends.extend([time.monotonic()] * (len(rows_of(made, "round")) - len(ends)))

    with watching(look, pause_s=0.01):
        yield ends
        look()


def rows_of(made: Path, event: str) -> list[dict[str, Any]]:
    """Rows of one kind in a run's metrics, without a line that is still being written."""
    text = (made / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [row for row in rows if row["event"] == event]


@contextmanager
def watching(look: Callable[[], None], *, pause_s: float) -> Iterator[None]:
    """Call `look` repeatedly while the block runs."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(pause_s):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def spread(values: list[float]) -> str:
    """Minimum and maximum."""
    return f"({min(values):.2f} to {max(values):.2f})"


# --- large adapters


def large(folder: Path, kept: Kept, megabytes: float) -> None:
    """Print the time of a round of large adapters and the server's memory, by number of clients."""
    rank = math.ceil(megabytes * 1e6 / BYTES_OF_A_RANK)
    keys = [*SHORT, "rounds=1", "runtime.threads=1", 'adapter.targets=["all-linear"]']
    keys += [f"adapter.rank={rank}", f"adapter.alpha={rank}", "train.optimizer=sgd"]
    keys += ["checkpoint.keep=last", "report.page=false", "report.samples=0"]
    print("\nclients  adapter   round, s  peak memory of the server's processes", flush=True)
    for num_clients in range(1, CLIENTS + 1):
        asked = ["sampling.fraction=none", f"sampling.num_clients={num_clients}"]
        made = submit(folder, "hospitals", [*keys, *asked])
        with server_memory(folder) as peaks:
            follow(made, kept, quiet)
        (round_,) = rows_of(made, "round")
        size = rows_of(made, "train")[0]["bytes_up"]
        memory = ", ".join(f"{name} {human_bytes(own)}" for name, own in peaks.items())
        seconds = round_["seconds"]
        print(f"{num_clients:7}  {human_bytes(size):>8}  {seconds:8.1f}  {memory}", flush=True)


@contextmanager
def server_memory(folder: Path) -> Iterator[Mapping[str, int]]:
    """Peak resident memory of each kind of process started by `server up`, inside the block."""
    peaks = dict.fromkeys(SERVER, 0)
    (up,) = (p for p in psutil.process_iter() if is_server(p, folder))

    def look() -> None:
        for process in up.children(recursive=True):
            try:
                line, size = " ".join(process.cmdline()), process.memory_info().rss
            except psutil.Error:
                continue
            for name, words in SERVER.items():
                if words in line:
                    peaks[name] = max(peaks[name], size)

    with watching(look, pause_s=0.1):
        yield peaks


def is_server(process: psutil.Process, folder: Path) -> bool:
    """Whether this is the consortium's `server up`."""
    try:
        line = process.cmdline()
    except psutil.Error:
        return False
    return line[-4:] == ["server", "up", "--folder", str(folder)]


if __name__ == "__main__":
    main()
