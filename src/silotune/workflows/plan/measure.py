"""Run one real step with a recipe's real shapes in a separate process; measure memory and seconds.

    python -m silotune.workflows.plan.measure < recipe.toml

A fresh process is needed because a process's peak memory never falls, and the caller already has
its own peak. The rows stay in the process: only lengths and seconds come out.
"""

import contextlib
import itertools
import json
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path

import torch

from silotune.core.algorithm import LocalContext, broadcast_extra, keep_local, starting_state
from silotune.core.errors import SilotuneError, first_line
from silotune.core.seeds import generator
from silotune.core.types import Broadcast
from silotune.federation.client import ClientData, Worker, train_round
from silotune.federation.client_data import ScoredTokens, TrainTokens, known_tokens
from silotune.federation.client_memory import ClientMemory
from silotune.federation.client_privacy import Protection
from silotune.federation.recipe_model import load_for, local_tensors
from silotune.federation.sampling import cohort_size
from silotune.models.allocator import release_memory
from silotune.models.devices import peak_memory_bytes
from silotune.models.loading import LoadedModel, read_adapter, write_adapter
from silotune.models.sources import SOURCES, is_ready, resolve
from silotune.recipes.parse import parse, to_toml
from silotune.recipes.schema import RunConfig
from silotune.runtime.flower.strategy import algorithm_of
from silotune.runtime.groups import plan_groups
from silotune.training.local_step import OwnTraining
from silotune.training.loop import num_rows, plan_steps, stream
from silotune.training.own_functions import own_loss
from silotune.training.references import with_references
from silotune.training.tasks import build_task
from silotune.training.tasks.base import Batch, Example, Task
from silotune.training.together import train_together
from silotune.workflows.plan.measured_rows import cohorts, measured_clients
from silotune.workflows.plan.memory import BatchShape

TIMED = (0.25, 0.75)
"""Which forward batches are timed: positions among all batches, sorted by their tokens."""

KEPT_SHAPES = 75
"""For how many batch shapes oneDNN keeps its kernels. It keeps 1024 kernels, and each shape needs
about 14 for a Llama's layers with LoRA. Seen with SmolLM2-135M in bfloat16: growth ended here."""

TIMEOUT_S = 3600.0
"""How long the process may take, including loading the base."""


@dataclass(frozen=True)
class Measurement:
    """How much memory a process needed for a recipe's widest batch, and how fast it was."""

    device: str
    real_rows: bool
    """Whether the rows were the clients' own; otherwise made-up rows of the maximum length."""
    batch: BatchShape
    """The widest batch of the run."""
    peak_bytes: int
    """Largest resident size of a process that trains the entire run: that of this process, plus
    `bytes_per_shape` for every shape that it did not meet, up to `KEPT_SHAPES`. On CUDA, the
    largest allocation."""
    bytes_per_shape: int
    """Memory that every new batch shape takes and keeps: kernels that oneDNN builds for it."""
    num_shapes: int
    """Number of batch shapes that the run will train on."""
    seconds_start: float
    """Time until the first step: importing libraries, loading the model, tokenizing rows, and of
    pairs, what the reference says about them."""
    seconds_per_token: float
    """Training time on known shapes, per token including padding."""
    seconds_building: float
    """Time that the entire run spends building kernels for new shapes."""
    seconds_per_scored_token: float
    """Time to score held-out rows, per token including padding."""
    train_tokens: tuple[int, ...]
    """Tokens of all clients' steps for each round, including padding."""
    scored_tokens: Mapping[str, int]
    """Tokens of each client's held-out rows, including padding."""
    surprises: tuple[str, ...] = ()
    """What the chat template does to the rows that may be surprising."""


def is_at_hand(run: RunConfig) -> bool:
    """Whether the base's weights are on this machine, so that nothing has to be downloaded."""
    if run.model.name in SOURCES:
        return is_ready(run.model.name)
    place = resolve(run.model.name)
    if isinstance(place, Path):
        return any(place.glob("*.safetensors"))
    from huggingface_hub import try_to_load_from_cache

    files = ("model.safetensors", "model.safetensors.index.json")
    found = (try_to_load_from_cache(place, file, revision=run.model.revision) for file in files)
    return any(isinstance(path, str) for path in found)


def measure(run: RunConfig) -> Measurement | str:
    """Run one step in a fresh process, or say in one line why that failed.

    Args:
        run: A recipe without mistakes, whose base is on this machine.
    """
    command = [sys.executable, "-m", "silotune.workflows.plan.measure"]
    try:
        done = subprocess.run(
            command,
            input=to_toml(run),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"the steps took longer than {TIMEOUT_S:.0f} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        killed = "it was killed, probably because memory ran out"
        return lines[-1].strip() if lines and done.returncode > 0 else killed
    table = json.loads(done.stdout.splitlines()[-1])
    table["batch"] = BatchShape(**table["batch"])
    tuples = {key: tuple(table[key]) for key in ("train_tokens", "surprises")}
    return Measurement(**{**table, **tuples})


# --- in the separate process ----------------------------------------------------------------------


def main() -> None:
    """Read a recipe from stdin, measure, and write one line of JSON to stdout."""
    began = time.perf_counter()
    run = parse(tomllib.loads(sys.stdin.read()), name="plan")
    with contextlib.redirect_stdout(sys.stderr):  # libraries may print
        try:
            found = _measure(run, began)
        except SilotuneError as error:  # the caller passes this line on
            sys.exit(f"{type(error).__name__}: {first_line(str(error))}")
    sys.stdout.write(json.dumps(asdict(found)) + "\n")


def _measure(run: RunConfig, began: float) -> Measurement:
    loaded = load_for(run)
    task = build_task(run.task, run.data.labels, run.prefer)
    algorithm = keep_local(algorithm_of(run.algorithm), local_tensors(run, loaded))
    worker = Worker(loaded, _with_a_quick_reference(task), run, algorithm)
    clients, surprises = measured_clients(run, worker)
    start = time.perf_counter() - began + _seconds_of_references(task, loaded, clients, run)
    rounds = [list(_batches(run, clients, r)) for r in _positions(run, clients)]
    ordered = sorted(
        (batch for own in rounds for batch in own), key=lambda batch: _num_tokens(batch, run)
    )
    scored = [batch for own in clients.values() for batch in own.scored.batches]
    costs = _measure_steps(_Probe(worker, clients), ordered, scored)
    return Measurement(
        device=str(loaded.device),
        real_rows=surprises is not None,
        batch=_shape(ordered[-1], task, run),
        seconds_start=start,
        **asdict(costs),
        train_tokens=tuple(sum(_num_tokens(b, run) for b in own) for own in rounds),
        scored_tokens={
            name: sum(batch.ids.numel() for batch in own.scored.batches)
            for name, own in clients.items()
        },
        surprises=surprises or (),
    )


def _with_a_quick_reference(task: Task) -> Task:
    """The same task; what the reference says about a pair, a pass over every row, is made up."""
    if task.reference is None:
        return task
    return replace(task, reference=lambda _, batch: torch.zeros(batch.num_terms, 2))


def _seconds_of_references(
    task: Task, loaded: LoadedModel, clients: Mapping[str, ClientData], run: RunConfig
) -> float:
    """How long the reference's passes over all pairs will take, by one over pairs of middle length.

    Clients that are never asked have no pass over their train pairs.

    Args:
        task: With its own reference.
        loaded: The base.
        clients: Their rows as tokens.
        run: The recipe.
    """
    if task.reference is None:
        return 0.0
    asked = {name for cohort in cohorts(run, list(clients)) for name in cohort}
    every = sorted(
        (e for name in asked for e in clients[name].examples), key=attrgetter("num_positions")
    )
    middle, size = len(every) // 2, run.train.batch_size
    some = every[max(0, middle - size // 2) :][:size]
    with_references(some, task, loaded, batch_size=size)  # chooses kernels
    began = time.perf_counter()
    with_references(some, task, loaded, batch_size=size)
    took = time.perf_counter() - began
    scored = (batch for own in clients.values() for batch in own.scored.batches)
    num = sum(e.num_positions for e in every) + sum(batch.ids.numel() for batch in scored)
    return took * num / sum(e.num_positions for e in some)


class _Probe:
    """Trains on one batch and scores another, as the first client does in its first round."""

    def __init__(self, worker: Worker, clients: Mapping[str, ClientData]) -> None:
        algorithm = worker.algorithm
        state = starting_state(algorithm, read_adapter(worker.loaded), len(clients))
        self.worker, self.run = worker, worker.run
        self.name = next(iter(clients))
        groups = plan_groups(worker, clients)
        num_asked = cohort_size(self.run.sampling, len(clients))
        self._groups = replace(groups, size=min(groups.size, num_asked))
        self._broadcast = Broadcast(
            1,
            state.adapter,
            broadcast_extra(state, algorithm),
            score=self.run.evaluate.every > 0,
        )

    def take_step(self, examples: Sequence[Example], *, score: Batch) -> Mapping[str, float]:
        """Train on these examples; score the other batch if the recipe scores. Returns metrics."""
        num = len(examples)
        data = known_tokens(self.name, TrainTokens(tuple(examples)), ScoredTokens((score,), 1))
        protection = Protection.of(
            self.run, client=self.name, round_=1, num_examples=num, count=num
        )
        update, _ = train_round(
            self.worker, data, self._broadcast, ClientMemory(), protection, count=num
        )
        return update.metrics

    def step_together(self, examples: Sequence[Example]) -> None:
        """A step on these examples for each client of a group, if the run forms groups."""
        if self._groups.size == 1:
            return
        run, loaded = self.run, self.worker.loaded
        write_adapter(loaded, self._broadcast.adapter)
        steps, group = [[self.worker.task.collate(examples)]], list[OwnTraining]()
        for seed in range(self._groups.size):
            received = {name: p.detach().clone() for name, p in loaded.parameters.items()}
            context = LocalContext(received, self._broadcast.extra, {})
            group.append(OwnTraining(steps=steps, context=context, lr=run.train.lr, seed=seed))
        train_together(
            loaded,
            group,
            own_loss(run.train.loss, self.worker.task),
            run.train,
            self.worker.algorithm.local,
            round_=1,
            most_tokens=self._groups.most_tokens,
        )


@dataclass(frozen=True)
class _StepCosts:
    """The fields of `Measurement` that follow from the steps."""

    peak_bytes: int
    bytes_per_shape: int
    num_shapes: int
    seconds_per_token: float
    seconds_building: float
    seconds_per_scored_token: float


def _measure_steps(
    probe: _Probe, ordered: Sequence[list[Example]], scored: Sequence[Batch]
) -> _StepCosts:
    """Step on a few batches, first with new shapes and then with known ones.

    Args:
        probe: Takes the steps.
        ordered: All forward batches of the run, sorted by their tokens.
        scored: All held-out batches.
    """
    run, step = probe.run, probe.take_step
    longest = max(scored, key=lambda batch: batch.ids.numel())
    median = sorted(scored, key=lambda batch: batch.ids.numel())[len(scored) // 2]
    first, picked = ordered[len(ordered) // 2], [ordered[int(x * len(ordered))] for x in TIMED]
    step(first, score=longest)  # slower than the others: it allocates memory and chooses kernels
    step(first, score=median)
    before = _held()
    new = [step(batch, score=median) for batch in picked]
    timed = [step(batch, score=median) for batch in picked]
    built = sum(m["seconds_training"] for m in new) - sum(m["seconds_training"] for m in timed)
    num_new = len(_shapes([first, *picked], run)) - 1
    per_shape = max(0, _held() - before) // num_new if num_new else 0
    # the widest comes last, as it may at a client: the gaps that shorter ones freed are too small
    step(ordered[-1], score=longest)
    probe.step_together(ordered[-1])
    num_shapes = len(_shapes(ordered, run))
    num_met = len(_shapes([first, *picked, ordered[-1]], run))
    num_unmet = max(0, min(num_shapes, KEPT_SHAPES) - num_met)
    num_built = num_shapes if num_shapes <= KEPT_SHAPES else len(ordered)
    num_tokens = sum(m["num_padded_tokens"] for m in timed)
    other = sum(m["seconds"] - m["seconds_training"] for m in timed) / len(timed)
    return _StepCosts(
        peak_bytes=_peak() + per_shape * num_unmet,
        bytes_per_shape=per_shape,
        num_shapes=num_shapes,
        seconds_per_token=sum(m["seconds_training"] for m in timed) / num_tokens,
        seconds_building=max(0.0, built) / num_new * num_built if num_new else 0.0,
        # apart from its steps and the score, a message costs far less than they do
        seconds_per_scored_token=other / median.ids.numel() if run.evaluate.every > 0 else 0.0,
    )


def _positions(run: RunConfig, clients: Mapping[str, ClientData]) -> Iterator[dict[str, int]]:
    """For each round, who takes part, and how many rows each has trained on before."""
    taken = dict.fromkeys(clients, 0)
    again = "same-samples" in run.train.compat
    for cohort in cohorts(run, list(clients)):
        yield {name: 0 if again else taken[name] for name in cohort}
        for name in cohort:
            taken[name] += num_rows(run.train, clients[name].num_train)


def _batches(
    run: RunConfig, clients: Mapping[str, ClientData], cohort: Mapping[str, int]
) -> Iterator[list[Example]]:
    """The forward batches of a round, as its clients will form them, in any order."""
    for name, start in cohort.items():
        own = clients[name].examples
        flow = stream(len(own), run.seed, name, start=start)
        rows = list(itertools.islice(flow, num_rows(run.train, len(own))))
        order = generator(run.seed, "order", name)
        for step in plan_steps(rows, [e.num_positions for e in own], run.train, order):
            yield from ([own[row] for row in batch] for batch in step)


def _num_tokens(examples: Sequence[Example], run: RunConfig) -> int:
    lengths = [e.num_positions for e in examples]
    return sum(lengths) if run.train.packing else max(lengths) * len(lengths)


def _shapes(batches: Sequence[Sequence[Example]], run: RunConfig) -> set[tuple[int, int]]:
    """Number of rows and length of each batch; a packed batch is a single row."""
    return {(1 if run.train.packing else len(batch), _num_tokens(batch, run)) for batch in batches}


def _shape(examples: Sequence[Example], task: Task, run: RunConfig) -> BatchShape:
    join = task.pack if run.train.packing and task.pack is not None else task.collate
    batch = join(examples)
    num_rows, length = batch.ids.shape
    return BatchShape(num_rows, length, batch.num_trained)


def _peak() -> int:
    """This process's peak. On Linux, a child process inherits `ru_maxrss` from its parent."""
    found = None if torch.cuda.is_available() else _status("VmHWM")
    return peak_memory_bytes() if found is None else found


def _held() -> int:
    """What the process holds now, without freed memory; 0 if unknown."""
    release_memory()
    return 0 if torch.cuda.is_available() else _status("VmRSS") or 0


def _status(key: str) -> int | None:
    """Bytes from a line of Linux's /proc/self/status; None on other systems."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next(x for x in status.read_text("utf-8").splitlines() if x.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
