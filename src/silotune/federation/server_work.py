"""The server's half between two rounds: its rows, its teacher, and what they do to the adapter.

Built where the rounds run, from the server's own recipe. Clients see neither the rows nor the
teacher; of both, only a change of the adapter leaves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from silotune.core.algorithm import Algorithm
from silotune.core.atomic_files import build_folder, write_json
from silotune.core.errors import DataError, ModelError, RunFolderError
from silotune.core.seeds import derive
from silotune.core.tree import add, check_finite, subtract
from silotune.core.types import ServerState
from silotune.core.wording import human_seconds
from silotune.data.clients import load_server_rows
from silotune.data.reading import TaskRow
from silotune.federation.metrics import Row
from silotune.federation.progress import Progress
from silotune.federation.recipe_model import load_for
from silotune.federation.run_folder import RunFolder
from silotune.models.adapters import AdapterConfig
from silotune.models.loading import (
    LoadedModel,
    ModelConfig,
    load_model,
    quiet_libraries,
    read_adapter,
    write_adapter,
)
from silotune.recipes.schema import RunConfig
from silotune.training.scoring import build_eval_batches, evaluate, metrics
from silotune.training.server_training import Lesson, distill, fine_tune
from silotune.training.tasks import build_task

TEACHER = "teacher"
"""Where a run keeps its teacher: the folder that it begins with, and `ServerState.extra` later."""
RECORD = "teacher.json"
"""What tells a pre-trained teacher from any other model folder."""


def server_rows(run: RunConfig) -> tuple[TaskRow, ...]:
    """The rows that the recipe gives the server; none where it gives none."""
    cfg = run.server
    if cfg.data_path is None and cfg.data_fraction == 0:
        return ()
    return load_server_rows(
        run.data, seed=run.seed, task=run.task, fraction=cfg.data_fraction, path=cfg.data_path
    )


def build_lesson(run: RunConfig, rows: Sequence[TaskRow], tokenizer: Any) -> Lesson:
    """The server's rows as tokens.

    Raises:
        DataError: No row has an answer within `train.max_length` tokens.
    """
    task = build_task(run.task, run.data.labels)
    examples = task.prepare(rows, tokenizer, run.train.max_length).examples
    if not examples:
        raise DataError(
            f"the server has no row with an answer within {run.train.max_length} tokens.\n"
            "  Raise train.max_length, or give it other rows: server.data_path."
        )
    return Lesson(examples, task, run.train, run.seed)


# --- the teacher ----------------------------------------------------------------------------------


def load_teacher(run: RunConfig, tokenizer: Any, rows: Sequence[TaskRow]) -> LoadedModel:
    """The teacher with all of its weights to train, in float32.

    Args:
        run: The recipe; its `distill.teacher` is loaded.
        tokenizer: The clients' model's.
        rows: The server's: both tokenizers have to read them alike.

    Raises:
        ModelError: It cannot be loaded, or it has another tokenizer than the clients' model.
    """
    assert run.distill.teacher is not None, "the check of the recipe asks for it"
    teacher = load_model(
        ModelConfig(name=run.distill.teacher, dtype="float32"),
        AdapterConfig(kind="full"),
        seed=derive(run.seed, "teacher"),
        device=run.runtime.device,
        labels=run.data.labels or (),
    )
    teacher.tokenizer.chat_template = tokenizer.chat_template  # the template is the recipe's
    check_same_tokenizer(run, tokenizer, teacher.tokenizer, rows)
    return teacher


def check_same_tokenizer(
    run: RunConfig, mine: Any, its: Any, rows: Sequence[TaskRow], most: int = 100
) -> None:
    """Refuse a teacher that reads texts as other tokens: its predictions would mean others.

    Raises:
        ModelError: The vocabularies differ, or some of the server's rows come out differently.
    """
    why = ""
    if mine.get_vocab() != its.get_vocab():
        why = f"their vocabularies have {len(mine)} and {len(its)} tokens, or name them differently"
    else:
        task, limit = build_task(run.task, run.data.labels), run.train.max_length
        one, other = (task.prepare(rows[:most], t, limit).examples for t in (mine, its))
        if [e.ids.tolist() for e in one] != [e.ids.tolist() for e in other]:
            why = "they cut the server's rows differently"
    if why:
        raise ModelError(
            f"distill.teacher = '{run.distill.teacher}' has another tokenizer than model.name = "
            f"'{run.model.name}': {why}.\n"
            "  Name a teacher of the same family: both have to read a text as the same tokens."
        )


def is_pretrained(name: str) -> bool:
    """Whether a `distill.teacher` is a folder that `pretrain` wrote."""
    return (Path(name).expanduser() / RECORD).is_file()


def pretrain(
    run: RunConfig,
    folder: Path,
    progress: Progress,
    *,
    rows: Sequence[TaskRow],
    tokenizer: Any,
    held_out: Sequence[TaskRow] = (),
) -> dict[str, Any]:
    """Let the teacher learn the task on the server's rows, and save it as a plain model folder.

    Args:
        run: The recipe, with its labels. `distill.pretrain_epochs` says how often the teacher sees
            the rows, `distill.lr`, or else `server.lr`, how fast it learns.
        folder: Created whole; refused when it is there.
        progress: Told what happens.
        rows: The server's.
        tokenizer: The clients' model's.
        held_out: Rows to score the teacher on; not scored without.

    Returns:
        What the folder's teacher.json says: epochs, rows, seed, mean loss, seconds, scores.

    Raises:
        SilotuneError: The folder is there; the teacher or the rows cannot be used.
    """
    if folder.exists():
        raise RunFolderError(f"{folder} is there already.\n  Choose another folder.")
    epochs = run.distill.pretrain_epochs
    teacher = load_teacher(run, tokenizer, rows)
    lesson = build_lesson(run, rows, teacher.tokenizer)
    progress.note(f"the teacher learns from {len(lesson.examples)} rows of the server, {epochs} x")
    lr = run.distill.lr or run.server.lr
    told = fine_tune(teacher, lesson, epochs=epochs, lr=lr, seed_name="pretrain")
    record = {
        "teacher": run.distill.teacher,
        "task": run.task,
        "labels": list(run.data.labels or ()),
        "epochs": epochs,
        "num_rows": len(lesson.examples),
        "seed": run.seed,
        **told,
    }
    if held_out:
        examples = lesson.task.prepare(held_out, teacher.tokenizer, run.train.max_length).examples
        batches = build_eval_batches(examples, lesson.task, run.evaluate.batch_size)
        count = len(examples)
        found = evaluate(teacher, batches, lesson.task, client="held out", num_examples=count)
        record["held_out"] = metrics([found])
    build_folder(folder, lambda part: _save(teacher, part, record))
    return record


def _save(teacher: LoadedModel, folder: Path, record: dict[str, Any]) -> None:
    with quiet_libraries():
        teacher.model.save_pretrained(folder)
        teacher.tokenizer.save_pretrained(folder)
    write_json(folder / RECORD, record)


# --- between two rounds ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ServerWork:
    """Improves the adapter on the server's rows, once after every aggregation."""

    run: RunConfig
    student: LoadedModel
    lesson: Lesson
    teacher: LoadedModel | None
    algorithm: Algorithm

    def improve(self, state: ServerState) -> tuple[ServerState, list[Row]]:
        """What the state becomes, and a row for metrics.jsonl.

        Args:
            state: After the algorithm's step of a round. Not modified.

        Raises:
            UpdateError: The server's own training ended in NaN or infinity.
        """
        cfg, name = self.run.server, f"round {state.round}"
        if cfg.weight == 0:
            return state, []
        write_adapter(self.student, state.adapter)
        rule = self.algorithm.local  # what it holds fast at the clients stays fast here too
        for tensor, parameter in self.student.parameters.items():
            parameter.requires_grad_(rule.trains(tensor, state.round) and not rule.personal(tensor))
        if self.teacher is None:
            told = fine_tune(
                self.student, self.lesson, epochs=cfg.epochs, lr=cfg.lr, seed_name=name
            )
        else:
            told, state = self._distil(self.teacher, state, name)
        trained = read_adapter(self.student)
        moved = subtract(trained, state.adapter)
        check_finite(moved, who=f"the server, {name}")
        adapter = trained if cfg.weight == 1 else add(state.adapter, moved, scale=cfg.weight)
        row: Row = {"event": "server", "round": state.round, "work": cfg.work, **told}
        return replace(state, adapter=adapter), [row]

    def _distil(
        self, teacher: LoadedModel, state: ServerState, name: str
    ) -> tuple[dict[str, float], ServerState]:
        cfg, how = self.run.server, self.run.distill
        if TEACHER in state.extra:
            write_adapter(teacher, state.extra[TEACHER])
        alone: dict[str, float] = {"seconds": 0.0, "num_tokens": 0}
        if how.teacher_epochs:
            alone = fine_tune(
                teacher,
                self.lesson,
                epochs=how.teacher_epochs,
                lr=how.lr or cfg.lr,
                seed_name=f"{name}, teacher",
            )
        told = distill(
            self.student, teacher, self.lesson, how, epochs=cfg.epochs, lr=cfg.lr, seed_name=name
        )
        for key in ("seconds", "num_tokens"):
            told[key] += alone[key]
        extra = {**state.extra, TEACHER: read_adapter(teacher)}
        return told, replace(state, extra=extra)


def open_server_work(
    run: RunConfig,
    folder: RunFolder,
    *,
    algorithm: Algorithm,
    progress: Progress,
    loaded: LoadedModel | None = None,
) -> ServerWork | None:
    """What the recipe has the server do between rounds; None when it does nothing.

    Args:
        run: The server's own recipe.
        folder: Of the run; keeps a teacher that is pre-trained here.
        algorithm: The run's.
        progress: Told what happens.
        loaded: The clients' model, where it is in memory already.

    Raises:
        SilotuneError: The rows or the teacher cannot be used.
    """
    if run.server.work == "none":
        return None
    rows, teacher = server_rows(run), None
    student = loaded or load_for(run)
    if run.server.work == "distill":
        tokenizer = student.tokenizer
        taught = _with_pretrained(run, folder, progress, rows=rows, tokenizer=tokenizer)
        teacher = load_teacher(taught, tokenizer, rows)
    lesson = build_lesson(run, rows, student.tokenizer)
    return ServerWork(run, student, lesson, teacher, algorithm)


def _with_pretrained(
    run: RunConfig,
    folder: RunFolder,
    progress: Progress,
    *,
    rows: Sequence[TaskRow],
    tokenizer: Any,
) -> RunConfig:
    """The recipe with the teacher that the run begins with, pre-trained here if that is asked."""
    name = run.distill.teacher or ""
    if run.distill.pretrain_epochs == 0 or is_pretrained(name):
        return run
    here = folder.path / TEACHER
    if not is_pretrained(str(here)):
        record = pretrain(run, here, progress, rows=rows, tokenizer=tokenizer)
        progress.note(f"the teacher is ready after {human_seconds(record['seconds'])}")
    return run.model_copy(update={"distill": run.distill.model_copy(update={"teacher": str(here)})})
