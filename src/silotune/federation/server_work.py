"""The server's work between two rounds: its rows, its teacher, and what they do to the adapter.

It is built where the rounds run, from the server's own recipe. Clients see neither the rows nor the
teacher, only the change that they make to the adapter.
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
from silotune.core.wording import counted, human_seconds
from silotune.data.reading import TaskRow
from silotune.data.server_rows import load_server_rows
from silotune.data.template_traits import give_traits, traits_of
from silotune.federation.metrics import Row
from silotune.federation.progress import Progress
from silotune.federation.recipe_model import load_for
from silotune.federation.run_folder import RunFolder
from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig, quiet_libraries
from silotune.models.loading import LoadedModel, load_model, read_adapter, write_adapter
from silotune.recipes.schema import RunConfig
from silotune.training.known_tokens import prepare_rows
from silotune.training.scoring import build_eval_batches, evaluate, metrics
from silotune.training.server_training import Lesson, distill, fine_tune
from silotune.training.tasks import build_task

TEACHER = "teacher"
"""Where a run keeps its teacher: the folder of the initial one, and the key in
`ServerState.extra` later."""
RECORD = "teacher.json"
"""The file that distinguishes a pre-trained teacher from any other model folder."""


def server_rows(run: RunConfig) -> tuple[TaskRow, ...]:
    """The rows that the recipe gives the server, if any."""
    cfg = run.server
    if cfg.data_path is None and cfg.data_fraction == 0:
        return ()
    return load_server_rows(
        run.data, seed=run.seed, task=run.task, fraction=cfg.data_fraction, path=cfg.data_path
    )


def build_lesson(run: RunConfig, rows: Sequence[TaskRow], loaded: LoadedModel) -> Lesson:
    """The server's rows as tokens of a model.

    Raises:
        DataError: No row has an answer within `train.max_length` tokens, or a row has a token
            without an embedding.
    """
    task = build_task(run.task, run.data.labels, run.prefer)
    examples = prepare_rows(
        rows, task, loaded, run.train.max_length, whose="the server's "
    ).examples
    if not examples:
        raise DataError(
            f"the server has no row with an answer within "
            f"{counted(run.train.max_length, 'token')}.\n"
            "  Raise train.max_length, or give the server other rows with server.data_path."
        )
    return Lesson(examples, task, run.train, run.seed)


# --- the teacher ----------------------------------------------------------------------------------


def load_teacher(run: RunConfig, tokenizer: Any, rows: Sequence[TaskRow]) -> LoadedModel:
    """Load the teacher in float32, with all of its weights trainable.

    Args:
        run: The recipe; its `distill.teacher` is loaded.
        tokenizer: The tokenizer of the clients' model.
        rows: The server's rows; both tokenizers must turn them into the same tokens.

    Raises:
        ModelError: The teacher cannot be loaded, or its tokenizer differs from that of the clients'
            model.
    """
    assert run.distill.teacher is not None, "the recipe check requires it"
    teacher = load_model(
        ModelConfig(name=run.distill.teacher, dtype="float32"),
        AdapterConfig(kind="full"),
        seed=derive(run.seed, "teacher"),
        device=run.runtime.device,
        labels=run.data.labels or (),
        key="distill.teacher",
    )
    teacher.tokenizer.chat_template = tokenizer.chat_template  # the recipe decides the template
    if run.task != "classify":
        give_traits(teacher.tokenizer, traits_of(tokenizer).date)
    check_same_tokenizer(run, tokenizer, teacher.tokenizer, rows)
    return teacher


def check_same_tokenizer(
    run: RunConfig, mine: Any, its: Any, rows: Sequence[TaskRow], most: int = 100
) -> None:
    """Refuse a teacher that tokenizes differently: its predictions would be about other tokens.

    Raises:
        ModelError: The vocabularies differ, or some of the server's rows become different tokens.
    """
    why = ""
    if mine.get_vocab() != its.get_vocab():
        why = f"their vocabularies differ ({len(mine)} and {len(its)} tokens)"
    else:
        task, limit = build_task(run.task, run.data.labels, run.prefer), run.train.max_length
        one, other = (task.prepare(rows[:most], t, limit).examples for t in (mine, its))
        if [e.ids.tolist() for e in one] != [e.ids.tolist() for e in other]:
            why = "they split the server's rows into different tokens"
    if why:
        raise ModelError(
            f"distill.teacher = '{run.distill.teacher}' has a different tokenizer than "
            f"model.name = '{run.model.name}': {why}.\n"
            "  Choose a teacher of the same family: both must split a text into the same tokens."
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
    """Train the teacher on the server's rows, and save it as a plain model folder.

    Args:
        run: The recipe, with its labels. `distill.pretrain_epochs` is the number of passes over the
            rows; `distill.lr`, or `server.lr` if absent, is the learning rate.
        folder: Created complete or not at all; must not exist.
        progress: Told what happens.
        rows: The server's rows.
        tokenizer: The tokenizer of the clients' model.
        held_out: Rows to score the teacher on; without them, it is not scored.

    Returns:
        The contents of the folder's teacher.json: epochs, rows, seed, mean loss, seconds, scores.

    Raises:
        SilotuneError: The folder exists, or the teacher or the rows cannot be used.
    """
    if folder.exists():
        raise RunFolderError(f"{folder} already exists.\n  Choose another folder.")
    epochs = run.distill.pretrain_epochs
    teacher = load_teacher(run, tokenizer, rows)
    lesson = build_lesson(run, rows, teacher)
    count, passes = counted(len(lesson.examples), "row"), counted(epochs, "epoch")
    progress.note(f"training the teacher on {count} of the server for {passes}")
    lr = run.distill.lr or run.server.lr
    learned = fine_tune(teacher, lesson, epochs=epochs, lr=lr, seed_name="pretrain")
    record = {
        "teacher": run.distill.teacher,
        "task": run.task,
        "labels": list(run.data.labels or ()),
        "epochs": epochs,
        "num_rows": len(lesson.examples),
        "seed": run.seed,
        **learned,
    }
    if held_out:
        examples = prepare_rows(held_out, lesson.task, teacher, run.train.max_length).examples
        batches = build_eval_batches(examples, lesson.task, run.evaluate.batch_size)
        num = len(examples)
        found = evaluate(teacher, batches, lesson.task, client="held out", num_examples=num)
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
        """Return the improved state, and a row for metrics.jsonl.

        Args:
            state: The state after the algorithm's step of a round. Not modified.

        Raises:
            UpdateError: The server's own training ended in NaN or infinity.
        """
        cfg, name = self.run.server, f"round {state.round}"
        if cfg.weight == 0:
            return state, []
        write_adapter(self.student, state.adapter)
        rule = self.algorithm.local  # what it freezes at the clients stays frozen here too
        for tensor, parameter in self.student.parameters.items():
            parameter.requires_grad_(rule.trains(tensor, state.round) and not rule.personal(tensor))
        if self.teacher is None:
            learned = fine_tune(
                self.student, self.lesson, epochs=cfg.epochs, lr=cfg.lr, seed_name=name
            )
        else:
            learned, state = self._distill(self.teacher, state, name)
        trained = read_adapter(self.student)
        moved = subtract(trained, state.adapter)
        check_finite(moved, who=f"the server, {name}")
        adapter = trained if cfg.weight == 1 else add(state.adapter, moved, scale=cfg.weight)
        row: Row = {"event": "server", "round": state.round, "work": cfg.work, **learned}
        return replace(state, adapter=adapter), [row]

    def _distill(
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
        learned = distill(
            self.student, teacher, self.lesson, how, epochs=cfg.epochs, lr=cfg.lr, seed_name=name
        )
        for key in ("seconds", "num_tokens"):
            learned[key] += alone[key]
        extra = {**state.extra, TEACHER: read_adapter(teacher)}
        return learned, replace(state, extra=extra)


def open_server_work(
    run: RunConfig,
    folder: RunFolder,
    *,
    algorithm: Algorithm,
    progress: Progress,
    loaded: LoadedModel | None = None,
) -> ServerWork | None:
    """Prepare the server's work between rounds; None if the recipe gives it none.

    Args:
        run: The server's own recipe.
        folder: The run folder; a teacher that is pre-trained here is saved in it.
        algorithm: The algorithm of the run.
        progress: Told what happens.
        loaded: The clients' model, if it is already in memory.

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
    lesson = build_lesson(run, rows, student)
    return ServerWork(run, student, lesson, teacher, algorithm)


def _with_pretrained(
    run: RunConfig,
    folder: RunFolder,
    progress: Progress,
    *,
    rows: Sequence[TaskRow],
    tokenizer: Any,
) -> RunConfig:
    """The recipe with the run's initial teacher, pre-trained here if the recipe asks for it."""
    name = run.distill.teacher or ""
    if run.distill.pretrain_epochs == 0 or is_pretrained(name):
        return run
    here = folder.path / TEACHER
    if not is_pretrained(str(here)):
        record = pretrain(run, here, progress, rows=rows, tokenizer=tokenizer)
        progress.note(f"the teacher is ready after {human_seconds(record['seconds'])}")
    return run.model_copy(update={"distill": run.distill.model_copy(update={"teacher": str(here)})})
