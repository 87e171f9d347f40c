"""What protecting rows costs: `python benchmarks/private_step.py [key=value]`.

Runs the demo's steps (SmolLM2-135M-Instruct, its batches and adapter), plain and with every row's
gradient clipped and noised, alternating in one process, and measures the peak memory of each in a
separate process. A lot has the rows of the plain batch, so that both do the same forward passes.
"""

import statistics
import subprocess
import sys
import time

from silotune.core.algorithm import LocalContext, LocalRule
from silotune.core.seeds import generator
from silotune.core.wording import human_bytes
from silotune.federation.client import Worker
from silotune.federation.prepared_rows import prepare_client
from silotune.federation.recipe_model import load_for
from silotune.models.devices import peak_memory_bytes
from silotune.models.loading import read_adapter, write_adapter
from silotune.privacy.noise import secure_noise, secure_seeds
from silotune.privacy.record_level import RowGuard
from silotune.runtime.flower.strategy import algorithm_of
from silotune.training.loop import build_batches, plan_steps, train
from silotune.training.tasks import build_task
from silotune.workflows.check import check

STEPS, TURNS = 6, 5
KINDS = ("plain", "guarded")


class Case:
    """The demo's first client, with its base in memory."""

    def __init__(self, overrides: list[str]) -> None:
        checked = check("hospitals", overrides)
        self.run = checked.run
        loaded, task = load_for(self.run), build_task(self.run.task)
        self.worker = Worker(loaded, task, self.run, algorithm_of(self.run.algorithm))
        self.data = prepare_client(next(iter(checked.rows.values())), self.worker)
        self.first = read_adapter(loaded)

    def seconds(self, kind: str) -> float:
        """Seconds to train the same rows from the same adapter."""
        loaded, cfg = self.worker.loaded, self.run.train
        size = cfg.batch_size * cfg.accumulation
        lengths = [example.ids.numel() for example in self.data.examples]
        rows = [n % len(lengths) for n in range(STEPS * size)]
        steps = plan_steps(rows, lengths, cfg, generator(1, "order"))
        write_adapter(loaded, self.first)
        guard = RowGuard(
            clip_norm=1.0,
            noise_multiplier=1.0,
            lot_size=size,
            noise=secure_noise,
            seeds=secure_seeds,
        )
        began = time.perf_counter()
        train(
            loaded,
            build_batches(steps, self.data.examples, self.worker.task),
            self.worker.task,
            cfg,
            LocalRule(),
            LocalContext(self.first, {}, {}),
            round_=1,
            lr=1e-4,
            seed=1,
            guard=guard if kind == "guarded" else None,
        )
        return time.perf_counter() - began


def main() -> None:
    """Measure, and print seconds and ratios."""
    asked = sys.argv[1:]
    if asked and asked[0] in KINDS:
        case = Case(asked[1:])
        case.seconds(asked[0])
        print(peak_memory_bytes())
        return
    case = Case(asked)
    for kind in KINDS:
        case.seconds(kind)  # the first run of each kind builds what later ones reuse
    taken = {kind: [0.0] * TURNS for kind in KINDS}
    for turn in range(TURNS):
        for kind in KINDS if turn % 2 else KINDS[::-1]:
            taken[kind][turn] = case.seconds(kind)
    plain, guarded = (statistics.median(taken[kind]) / STEPS for kind in KINDS)
    ratios = [own / other for own, other in zip(taken["guarded"], taken["plain"], strict=True)]
    print(f"plain step:   {plain:.3f} s")
    print(f"guarded step: {guarded:.3f} s, {statistics.median(ratios):.2f} times the plain step")
    print(f"ratio per turn: {min(ratios):.2f} to {max(ratios):.2f}")
    numbers = sum(tensor.numel() for tensor in case.first.values())
    expected = 4 * numbers * case.run.train.batch_size
    peaks = {kind: int(_alone(kind, asked)) for kind in KINDS}
    grown = peaks["guarded"] - peaks["plain"]
    print(f"peak memory: plain {human_bytes(peaks['plain'])}, guarded {human_bytes(grown)} more;")
    print(f"  gradients of {case.run.train.batch_size} rows are {human_bytes(expected)}")


def _alone(kind: str, overrides: list[str]) -> str:
    command = [sys.executable, __file__, kind, *overrides]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]


if __name__ == "__main__":
    main()
