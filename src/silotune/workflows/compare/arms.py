"""Train and score the arms of a comparison, all on one base in memory.

Each arm writes its parts into the comparison's folder. A finished part (it has a `part.json`) is
never trained again; an interrupted part resumes after its last round. This file does not know what
the scores mean.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.core.atomic_files import make_folder, write_json, write_rows
from silotune.core.checksums import list_files
from silotune.core.types import AdapterState
from silotune.core.wording import human_seconds
from silotune.data.conversations import Conversation
from silotune.federation.client import ClientData, Worker
from silotune.federation.client_memory import load_memory
from silotune.federation.metrics import Row
from silotune.federation.progress import Progress
from silotune.federation.run_folder import RunFolder
from silotune.federation.server_work import build_lesson, is_pretrained, pretrain, server_rows
from silotune.models.loading import LoadedModel, save_adapter, untrained, write_adapter
from silotune.recipes.arms import federated_arms
from silotune.recipes.schema import RunConfig
from silotune.recipes.sections import CompareConfig
from silotune.results.run import Run
from silotune.runtime.inprocess import prepare_clients
from silotune.training.generate import answers
from silotune.training.scoring import score_each
from silotune.training.tasks import build_task
from silotune.training.tasks.base import Example
from silotune.workflows.check import Checked
from silotune.workflows.compare.folder import ComparisonFolder, place_alone, place_of
from silotune.workflows.compare.local_training import (
    Cost,
    cost_of_run,
    rows_trained,
    train_alone,
)
from silotune.workflows.compare.statistics import Scores
from silotune.workflows.evaluate.text_scores import judge, question_of
from silotune.workflows.provenance import provenance_of
from silotune.workflows.run import run_in
from silotune.workflows.shared_base import SharedBase


@dataclass(frozen=True)
class HeldOut:
    """A client's held-out rows."""

    examples: tuple[Example, ...]
    talks: tuple[Conversation, ...]
    """The same rows as conversations."""


class Arms:
    """Trains and scores arms: one base in memory, the clients' tokens, and the folder of parts."""

    def __init__(self, folder: ComparisonFolder, checked: Checked, progress: Progress) -> None:
        self.folder, self.checked, self.progress = folder, checked, progress
        self.run = run = checked.run
        self.task = build_task(run.task, run.data.labels)
        progress.note(f"comparison folder: {folder.path}")
        progress.note(f"loading {run.model.name}")
        self.base_model = SharedBase(run, progress)
        provenance_of(folder, checked, self.loaded)
        self.data = prepare_clients(checked.rows, self._worker(run))
        everything = tuple(e for own in self.data.values() for e in own.examples)
        self.server_rows = server_rows(run)
        if self.server_rows:  # the centralized arm trains on them, too
            everything += build_lesson(run, self.server_rows, self.loaded).examples
        self.pool = ClientData("centralized", everything, (), num_eval=0, num_cut=0, num_dropped=0)
        self.held = {name: self._held_out(checked.rows[name].evaluation) for name in self.data}
        arms = 1 + len(self.data) + len(federated_arms(run))
        self.num_parts, self.num_done = 1 + arms * run.compare.seeds, 0

    @property
    def loaded(self) -> LoadedModel:
        """The base with its current adapter."""
        return self.base_model.loaded

    def _worker(self, run: RunConfig) -> Worker:
        """A worker without a federation: whatever it learns is the result."""
        return Worker(self.loaded, self.task, run, fedavg(FedAvgConfig()))

    def _held_out(self, talks: Sequence[Conversation]) -> HeldOut:
        tokenizer, limit = self.loaded.tokenizer, self.run.train.max_length
        prepared = self.task.prepare(talks, tokenizer, limit)
        return HeldOut(prepared.examples, tuple(talks[row] for row in prepared.rows))

    # --- arms

    def base(self) -> None:
        """Score the untrained base."""
        first = self.base_model.dress(self._recipe(self.run, self.run.seed))
        with untrained(self.loaded):
            self._part("base", "the base", lambda _: (first, Cost()), self.data)

    def federated(self, arm: str, recipe: RunConfig, seed: int) -> Run:
        """Run an arm's recipe with this seed, as `silotune run` would."""
        place = place_of(arm, seed)
        run = self._recipe(recipe, seed)
        path = self.folder.path / place / "run"

        def train(_: Path) -> tuple[AdapterState, Cost]:
            taught = self._with_teacher(run)
            opened = RunFolder.open(path) if path.exists() else RunFolder.create(path, taught)
            self.base_model.dress(run)  # before `self.loaded` is read: this may replace it
            with opened.locked():
                done = run_in(
                    opened,
                    replace(self.checked, run=taught),
                    self.progress,
                    began=time.perf_counter(),
                    loaded=self.loaded,
                    data=self.data,
                )
            plan = rows_trained(done.metrics, self.data, run)
            trained = {n: t for n, t in done.adapter().items() if n in self.loaded.parameters}
            return trained, cost_of_run(done.metrics, plan, done.summary)

        self._part(place, f"seed {seed}, {arm}", train, self.data, memory=path)
        return Run(path)

    def alone(self, client: str, seed: int, plan: Mapping[int, int]) -> None:
        """One client without the others: the same rows, steps and learning rates."""
        place = place_alone(client, seed)
        scored = self.data if client in self.run.compare.only else [client]
        train = self._alone(self.data[client], seed, plan)
        self._part(place, f"seed {seed}, {client} alone", train, scored)

    def centralized(self, seed: int, plan: Mapping[int, int]) -> None:
        """All rows in one place."""
        train = self._alone(self.pool, seed, plan)
        self._part(place_of("centralized", seed), f"seed {seed}, centralized", train, self.data)

    def _alone(
        self, data: ClientData, seed: int, plan: Mapping[int, int]
    ) -> Callable[[Path], tuple[AdapterState, Cost]]:
        run = self._recipe(self.run, seed)

        def train(place: Path) -> tuple[AdapterState, Cost]:
            first = self.base_model.dress(run)  # first, because the worker keeps `self.loaded`
            adapter, cost = train_alone(self._worker(run), data, plan, first, place / "state")
            if self.loaded.has_adapter:
                write_adapter(self.loaded, adapter)
                save_adapter(self.loaded, place / "adapter", base=self.run.model)
            return adapter, cost

        return train

    def _recipe(self, recipe: RunConfig, seed: int) -> RunConfig:
        """An arm's recipe with a seed, on the rows of the first seed."""
        run = self.run
        fixed = run.data.split_seed if run.data.split_seed is not None else run.seed
        # without a history, only the comparison scores the end; keep = "best" needs every score
        scored = run.compare.history or run.checkpoint.keep == "best"
        return recipe.model_copy(
            update={
                "seed": seed,
                "data": run.data.model_copy(update={"split_seed": fixed}),
                "evaluate": run.evaluate
                if scored
                else run.evaluate.model_copy(update={"every": 0}),
                "report": run.report.model_copy(update={"page": False, "samples": 0}),
                "compare": CompareConfig(),
            }
        )

    def _with_teacher(self, run: RunConfig) -> RunConfig:
        """The recipe with a trained teacher, trained once for all arms of a seed that share it."""
        how = run.distill
        asked = run.server.work == "distill" and how.pretrain_epochs > 0
        if not asked or is_pretrained(how.teacher or ""):
            return run
        rate = how.lr or run.server.lr
        about = [how.teacher, how.pretrain_epochs, rate, run.train.model_dump()]
        mark = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]
        place = self.folder.path / f"seed-{run.seed}" / f"teacher-{mark}"
        if not place.exists():
            pretrain(
                run,
                place,
                self.progress,
                rows=self.server_rows,
                tokenizer=self.loaded.tokenizer,
            )
        taught = how.model_copy(update={"teacher": str(place)})
        return run.model_copy(update={"distill": taught})

    # --- parts

    def _part(
        self,
        place: str,
        title: str,
        train: Callable[[Path], tuple[AdapterState, Cost]],
        clients: Sequence[str] | Mapping[str, Any],
        memory: Path | None = None,
    ) -> None:
        """Train and score a part, unless it is finished.

        Args:
            place: Its folder, inside the comparison's folder.
            title: Its name in progress messages.
            train: Takes the folder and returns the adapter and its cost.
            clients: The clients whose held-out rows it is scored on.
            memory: The run folder where clients keep personal tensors.
        """
        self.num_done += 1
        folder = self.folder.path / place
        if (folder / "part.json").is_file():
            return
        self.progress.note(f"[{self.num_done}/{self.num_parts}] {title}")
        make_folder(folder)
        adapter, cost = train(folder)
        rows = [
            {"client": client, **row}
            for client in clients
            for row in self._score(client, {**adapter, **_personal(memory, client)})
        ]
        write_rows(folder / "scores.jsonl", rows)
        write_json(folder / "part.json", asdict(cost))
        list_files(folder, ["scores.jsonl", "part.json"])
        if cost.tokens:
            words = f"{cost.steps} steps, {cost.tokens} tokens in {human_seconds(cost.seconds)}"
            self.progress.note(f"  {words}")

    def _score(self, client: str, adapter: AdapterState) -> list[Row]:
        """One row per held-out row of the client, in the same order."""
        write_adapter(self.loaded, adapter)
        held, run = self.held[client], self.run
        each = score_each(self.loaded, held.examples, self.task, batch_size=run.evaluate.batch_size)
        rows: list[Row] = [asdict(score) for score in each]
        if not self.task.is_asked:
            return rows  # neither a classifier nor a text gives answers
        limit = run.compare.max_new_tokens
        shown = range(len(rows)) if limit else self._sampled(client)
        asked = [question_of(held.talks[i]) for i in shown]
        limit = limit or run.report.max_new_tokens
        said = answers(self.loaded, [talk for talk, _ in asked], max_new_tokens=limit)
        for i, one in zip(shown, said, strict=True):
            rows[i]["answer"] = one.text
        if run.compare.max_new_tokens:
            for row, quality in zip(rows, judge(said, [ref for _, ref in asked]), strict=True):
                row.update(asdict(quality))
        return rows

    def _sampled(self, client: str) -> Sequence[int]:
        """Which held-out rows are answered for the report: the first row of some clients."""
        return range(min(1, list(self.data).index(client) < self.run.report.samples))

    # --- for the report

    def samples(self, scores: Scores) -> list[dict[str, Any]]:
        """Some held-out questions, and how the first seed's arms answer them."""
        found: list[dict[str, Any]] = []
        shown = self.run.report.samples if self.task.is_asked else 0
        for client in list(self.data)[:shown]:
            talk, reference = question_of(self.held[client].talks[0])
            said = {
                arm: rows[client][0]["answer"].strip()
                for arm, by_seed in scores.items()
                if client in (rows := next(iter(by_seed.values()))) and "answer" in rows[client][0]
            }
            question = talk[-1]["content"]
            found.append(
                {"client": client, "question": question, "reference": reference, "answers": said}
            )
        return found


def _personal(run: Path | None, client: str) -> AdapterState:
    """The tensors that a client of a finished run keeps to itself, if the algorithm has any."""
    if run is None:
        return {}
    opened = RunFolder.open(run)
    memory = load_memory(opened.client_folder(client), opened.run.rounds + 1)
    return memory.tensors.get("personal", {})
