"""`make bench`: the demo's training through silotune, against a plain loop over the same batches.

Measures tokens per second from the first to the last round. Loading the base, tokenising and
scoring are left out; everything else counts (adapter swaps, optimizer, updates to disk,
aggregation, checkpoints). The two alternate in one process, so that a drift of the machine affects
both. Runs alternate between giving memory back as shipped (after a round, and between clients if
the process has grown) and after every client; ratio, time outside the steps and peak are shown for
both. The last line is the ratio as shipped.

    python benchmarks/floor.py [--pairs 3] [key=value ...]
"""

import argparse
import contextlib
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import plain_loop
import torch

import silotune
from silotune.core.types import ServerState
from silotune.core.wording import human_bytes
from silotune.data.chat_templates import set_template
from silotune.federation import client
from silotune.federation.client import Worker
from silotune.federation.progress import Progress
from silotune.federation.rounds import run_rounds
from silotune.federation.run_folder import RunFolder
from silotune.models.allocator import release_if_grown, release_memory
from silotune.models.devices import peak_memory_bytes
from silotune.models.loading import load_model, num_base_loads, read_adapter, write_adapter
from silotune.models.sources import resolve
from silotune.recipes.algorithm import build_algorithm
from silotune.runtime.inprocess import InProcessClients, prepare_clients
from silotune.training.tasks.instruct import INSTRUCT

WAYS = {"as shipped": release_if_grown, "after every client": release_memory}
"""When memory is given back: what a client does at the end of its half of a round."""


def reset_peak() -> None:
    """Let Linux count this process's peak memory from now on."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "ascii")


def peak_bytes() -> int:
    """Peak since `reset_peak`, or of the whole process where the system cannot reset it."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return peak_memory_bytes()
    (line,) = (x for x in status.read_text("utf-8").splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--pairs", type=int, default=3)
    options.add_argument("--recipe", default="hospitals")
    options.add_argument("overrides", nargs="*", metavar="key=value")
    args = options.parse_args()
    checked = silotune.check(args.recipe, [*args.overrides, "evaluate.every=0"])
    run = checked.run
    torch.set_num_threads(run.runtime.threads)
    loaded = load_model(run.model, run.adapter, seed=run.seed, device="cpu")
    set_template(loaded.tokenizer, checked.run.data.template)
    start = read_adapter(loaded)
    recorded: list[plain_loop.PaddedBatch] = []

    def collate(examples):
        batch = INSTRUCT.collate(examples)
        recorded.append(plain_loop.PaddedBatch(batch.ids, batch.positions, batch.targets))
        return batch

    task = replace(INSTRUCT, collate=collate)
    worker = Worker(loaded, task, run, build_algorithm(run.algorithm))

    def ours(place: Path, way: str) -> tuple[float, list[dict]]:
        folder = RunFolder.create(place, run)
        clients = InProcessClients(
            worker, prepare_clients(checked.rows, worker), folder, Progress()
        )
        write_adapter(loaded, start)
        state = ServerState(0, start, worker.algorithm.init(start, len(clients.names())))
        recorded.clear()
        client.release_if_grown = WAYS[way]
        release_memory()
        reset_peak()
        began = time.perf_counter()
        run_rounds(
            run,
            state,
            algorithm=worker.algorithm,
            clients=clients,
            folder=folder,
            progress=Progress(),
        )
        return time.perf_counter() - began, folder.metrics()

    # the first steps of a process touch memory for the first time, so they count for neither side
    rows = next(iter(checked.rows.values())).train[: run.train.batch_size]
    warm = task.collate(INSTRUCT.prepare(rows, loaded.tokenizer, run.train.max_length).examples)
    task.loss(loaded, warm).loss_sum.backward()

    print(f"machine: {platform.processor() or platform.machine()}, {run.runtime.threads} threads, ")
    print(f"torch {torch.__version__}, base {run.model.name} in {loaded.dtype}")
    floor_model = None
    ratios: dict[str, list[float]] = {way: [] for way in WAYS}
    peaks: dict[str, list[int]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        turns = [(pair, way) for pair in range(args.pairs) for way in WAYS]
        for pair, way in turns:
            seconds, rows = ours(Path(scratch) / f"{pair}-{way}", way)
            peaks[way].append(peak_bytes())
            trained = [row for row in rows if row["event"] == "train"]
            tokens = sum(row["num_tokens"] for row in trained)
            if floor_model is None:
                num_bytes = sum(r["bytes_up"] + r["bytes_down"] for r in trained) / run.rounds
                print(
                    f"base-model loads {num_base_loads()}, bytes per round {human_bytes(num_bytes)}"
                )
                floor_model = plain_loop.build(
                    str(resolve(run.model.name)),
                    loaded.dtype,
                    rank=run.adapter.rank,
                    alpha=int(run.adapter.alpha),
                    dropout=run.adapter.dropout,
                    targets=list(run.adapter.targets or ()),
                )
                plain_loop.train(floor_model, [recorded[:1]], [1e-3])
            at, parts = 0, []
            for row in trained:
                steps = int(row["num_steps"])
                parts.append(recorded[at : at + steps])
                at += steps
            assert at == len(recorded), "the floor must get every batch"
            floor_seconds = plain_loop.train(floor_model, parts, [row["lr"] for row in trained])
            ratios[way].append(floor_seconds / seconds)
            inside = sum(row["seconds_training"] for row in trained)
            outside = (seconds - inside) / len(trained)
            print(
                f"  {way}: {outside:.3f} s per client and round outside the steps, "
                f"peak {human_bytes(peaks[way][-1])}"
            )
            print(
                f"pair {pair + 1}: {tokens} tokens, silotune {tokens / seconds:.1f} tokens/s, "
                f"floor {tokens / floor_seconds:.1f} tokens/s, ratio {ratios[way][-1]:.3f}",
                flush=True,
            )
    for way in reversed(WAYS):
        peak = human_bytes(max(peaks[way]))
        print(f"memory given back {way}: ratio {statistics.median(ratios[way]):.2f}, peak {peak}")
    print(f"floor ratio {statistics.median(ratios['as shipped']):.2f}")


if __name__ == "__main__":
    main()
