"""What a step of pairs costs beside two instruct steps of the same tokens.

    python benchmarks/pair_step.py [--width 256] [--pairs 4] [--tokens 96] [--repeats 15]

A random model of 2 layers on one thread. Processor time, so that other processes matter less; the
steps alternate, and the median of their ratios is printed with the pass of the reference, which a
run makes once for each row.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig
from silotune.models.loading import load_model
from silotune.training.references import with_references
from silotune.training.tasks import build_task
from silotune.training.tasks.base import Batch, Example, Task


def main() -> None:
    """Measure, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.conftest import build_tiny_model

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        model = build_tiny_model(Path(scratch) / "model", width=args.width)
        config = ModelConfig(name=str(model), dtype="float32")
        adapter = AdapterConfig(rank=8, targets=("q_proj", "v_proj"))
        loaded = load_model(config, adapter, seed=1, device="cpu")
    gen, size = torch.Generator().manual_seed(2), args.tokens
    ids = torch.randint(2, 250, (2 * args.pairs, size), generator=gen)
    learned = torch.arange(size) >= size // 2
    rows = [Example(one, learned) for one in ids]
    pairs = [
        Example(
            ids[n : n + 2].flatten(),
            learned.repeat(2),
            segments=torch.arange(2).repeat_interleave(size),
        )
        for n in range(0, len(ids), 2)
    ]
    prefer, instruct = build_task("prefer"), build_task("instruct")
    began = time.process_time()
    pairs = with_references(pairs, prefer, loaded, batch_size=args.pairs)
    reference = time.process_time() - began
    of_pairs = prefer.collate(pairs)
    halves = [instruct.collate(rows[: args.pairs]), instruct.collate(rows[args.pairs :])]

    def step(task: Task, batches: list[Batch]) -> None:
        for batch in batches:
            (task.loss(loaded, batch).loss_sum / batch.num_terms).backward()
            loaded.model.zero_grad()

    timed = [
        (seconds(lambda: step(prefer, [of_pairs])), seconds(lambda: step(instruct, halves)))
        for _ in range(args.repeats + 2)
    ][2:]
    ratios = [one / other for one, other in timed]
    found = {
        "pairs_s": statistics.median(one for one, _ in timed),
        "two_instruct_s": statistics.median(other for _, other in timed),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4),
        "reference_s": reference,
    }
    sys.stdout.write(json.dumps(found) + "\n")


def seconds(work: Callable[[], None]) -> float:
    """Processor time of a call."""
    began = time.process_time()
    work()
    return time.process_time() - began


if __name__ == "__main__":
    main()
