"""Ask a finished run questions with known answers: its held-out rows, suites, leaderboards.

Base and result get the same questions, in the template of training. Every answer is saved verbatim
in a new folder inside the run folder.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from silotune.core.atomic_files import free_place, make_folder, write_json, write_rows
from silotune.core.checksums import check_listed, list_files
from silotune.core.errors import ConfigError
from silotune.core.public_call import as_path, public
from silotune.core.reading_back import read_object
from silotune.core.seeds import generator
from silotune.core.stats import Labelled, label_scores, wilson
from silotune.core.wording import did_you_mean
from silotune.data.client_rows import ClientRows
from silotune.federation.metrics import Row
from silotune.federation.progress import Progress
from silotune.federation.run_folder import RunFolder
from silotune.models.loading import LoadedModel, base_only
from silotune.recipes.schema import RunConfig
from silotune.results.run import Run
from silotune.training.generate import answers
from silotune.training.known_tokens import prepare_rows
from silotune.training.scoring import score_each
from silotune.training.tasks import build_task
from silotune.workflows.check import check
from silotune.workflows.evaluate.pairs import score_pairs
from silotune.workflows.evaluate.suites import CODE_SUITES, SUITES
from silotune.workflows.evaluate.suites.base import Item, load_items
from silotune.workflows.evaluate.suites.code import check_allowed, load_problems, run_code
from silotune.workflows.evaluate.suites.leaderboard import run_finance, run_medical
from silotune.workflows.evaluate.suites.lm_eval_tasks import check_lm_eval, run_lm_eval
from silotune.workflows.evaluate.suites.other_languages import check_installed
from silotune.workflows.evaluate.suites.results import Answered, Way, summarise
from silotune.workflows.evaluate.suites.scoring import score_generation, score_likelihood
from silotune.workflows.evaluate.text_scores import Quality, judge, question_of
from silotune.workflows.evaluate.text_scores import mean as mean_quality
from silotune.workflows.in_memory import keep_rows
from silotune.workflows.provenance import check_same_rows

LM_EVAL = "lm-eval:"
"""Prefix of the name of an lm-eval task."""
OF_A_CLIENT = "own"
"""The name of the model as a client has it."""
HELD_OUT = "held-out"
"""The run's own held-out questions."""


@dataclass(frozen=True)
class Questions:
    """What to ask a finished run, and how."""

    suites: Sequence[str] = ()
    """Names of suites, or "lm-eval:<task>"; if empty, the run's own held-out questions."""
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Suite -> a local file with its columns, or such rows in memory, which are written beside the
    run folder; the others are read from the hub."""
    max_new_tokens: int = 128
    """Maximum length of a generated answer, in tokens."""
    batch_size: int = 16
    """Prompts in one forward pass; changes only speed and memory. --leaderboard ignores it."""
    limit: int | None = None
    """At most this many questions of each suite, drawn with the run's seed."""
    leaderboard: bool = False
    """Also use the protocols of FlowerTune's leaderboards, if they have the suite."""
    instructions: Mapping[str, str] = field(default_factory=dict[str, str])
    """Suite -> the leaderboard's own instruction sentence, to replace ours."""
    base: bool = True
    """Ask the untouched base too."""
    allow_code_execution: bool = False
    """Allow programs that the model wrote to run on this machine."""
    client: str | None = None
    """Ask the model as this client has it, see `Run.load`; of the run's own questions, only its."""


def read_questions(cfg: Questions) -> dict[str, list[Any]]:
    """Read all questions before a model is loaded.

    Returns:
        Suite -> its items, or its problems for code; without the tasks of lm-eval.

    Raises:
        ConfigError: An unknown suite, a file for a suite that is not asked, or code execution that
            is not allowed or not possible.
        DataError: The questions cannot be read.
    """
    known = [*SUITES, *CODE_SUITES]
    for name in cfg.suites:
        if not name.startswith(LM_EVAL) and name not in known:
            raise ConfigError(
                f"there is no suite '{name}'.{did_you_mean(name, known)}\n"
                f"  Choose from: {', '.join(known)}; or {LM_EVAL}<task> for a task of lm-eval."
            )
    for name in (*cfg.data, *cfg.instructions):
        if name not in cfg.suites:
            raise ConfigError(
                f"a file or an instruction is given for suite '{name}', which is not selected."
                f"{did_you_mean(name, cfg.suites)}\n  Add --suite {name}, or leave it out."
            )
    if any(name.startswith(LM_EVAL) for name in cfg.suites):
        check_lm_eval([n.removeprefix(LM_EVAL) for n in cfg.suites if n.startswith(LM_EVAL)])
    for suite in (CODE_SUITES[name] for name in cfg.suites if name in CODE_SUITES):
        check_allowed(suite, cfg.allow_code_execution)
        check_installed(suite.language, suite.name)
    found: dict[str, list[Any]] = {}
    for name in cfg.suites:
        if name in CODE_SUITES:
            found[name] = list(load_problems(CODE_SUITES[name], cfg.data.get(name)))
        elif not name.startswith(LM_EVAL):
            found[name] = load_items(SUITES[name], cfg.data.get(name))
    return found


@dataclass(frozen=True)
class Evaluation:
    """The answers of a finished run and its base, in one folder inside the run folder."""

    path: Path
    """Holds scores.json, and every answer verbatim as JSONL."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", as_path(self.path, "Evaluation"))

    @property
    def scores(self) -> dict[str, Any]:
        """scores.json: the settings, and for each model its scores by suite."""
        return _read_scores(self.path)


@public
def evaluate(
    run: Run | Path | str, questions: Questions | None = None, *, progress: Progress | None = None
) -> Evaluation:
    """Ask a finished run questions with known answers, and record its answers.

    Args:
        run: A finished run, or its folder.
        questions: What to ask; by default the run's own held-out questions.
        progress: Receives progress messages; silent by default.

    Returns:
        The scores and answers, in a new folder inside the run folder.

    Raises:
        RunFolderError: The rows are not those that the run began with.
        SilotuneError: See `read_questions` and `Run.load`.
    """
    run = run if isinstance(run, Run) else Run(Path(run))
    cfg, progress = _on_disk(questions or Questions(), run), progress or Progress()
    asked = read_questions(cfg)
    config = run.config
    if config.task == "classify" and cfg.suites:
        raise ConfigError(
            "suites consist of questions, and this run is a classifier.\n"
            "  Leave out --suite to score its own held-out rows."
        )
    own = None if cfg.suites else _rows_of(run)
    progress.doing(f"loading {config.model.name}")
    loaded = run.load(client=cfg.client)
    if own is not None and cfg.client is not None:
        own = {cfg.client: own[cfg.client]}
    place = free_place(run.path / "evaluations" / time.strftime("%Y-%m-%d-%H%M%S"))
    make_folder(place)
    scores: dict[str, Any] = {"run": run.path.name, "settings": _plain(cfg), "models": {}}
    for model, activated in _models(loaded, cfg):
        with activated():
            found: dict[str, Any] = {}
            if own is not None:
                tell = partial(progress.doing, f"held-out questions to the {model} model")
                rows, found[HELD_OUT] = _held_out(loaded, config, own, cfg, tell)
                write_rows(place / f"held-out-{model}.jsonl", rows)
            for name in cfg.suites:
                progress.doing(f"{name} to the {model} model")
                rows, found[name] = _suite(loaded, name, asked, cfg, config)
                if rows:
                    write_rows(place / f"{name}-{model}.jsonl", rows)
        scores["models"][model] = found
    write_json(place / "scores.json", scores)
    list_files(place, [path.name for path in place.glob("*.json*")])
    return Evaluation(place)


def _on_disk(cfg: Questions, run: Run) -> Questions:
    """The same questions, with those that are in memory in a file beside the run folder."""
    beside = run.path.parent
    files = {
        name: Path(given) if isinstance(given, str | Path) else keep_rows(given, beside)
        for name, given in cfg.data.items()
    }
    return replace(cfg, data=files)


def _models(
    loaded: LoadedModel, cfg: Questions
) -> Iterator[tuple[str, Callable[[], contextlib.AbstractContextManager[None]]]]:
    """The models to ask, each with a context that activates it. After full training, no base."""
    if cfg.base and loaded.has_adapter:
        yield "base", lambda: base_only(loaded)
    yield "federated" if cfg.client is None else OF_A_CLIENT, contextlib.nullcontext


def _plain(cfg: Questions) -> dict[str, Any]:
    return {**asdict(cfg), "data": {name: str(path) for name, path in cfg.data.items()}}


# --- the run's own questions ----------------------------------------------------------------------


def _rows_of(run: Run) -> Mapping[str, ClientRows]:
    checked = check(run.config)
    check_same_rows(RunFolder.open(run.path), checked)
    return checked.rows


def _held_out(
    loaded: LoadedModel,
    config: Any,
    rows: Mapping[str, Any],
    cfg: Questions,
    tell: Callable[[int, int], None],
) -> tuple[list[Row], dict[str, Any]]:
    if config.task == "classify":
        return _held_out_labels(loaded, config, rows, cfg)
    asked_of = {
        client: _drawn(own.evaluation, cfg.limit, config.seed, client)
        for client, own in sorted(rows.items())
    }
    if config.task == "prefer":
        return score_pairs(loaded, config, asked_of)
    task = build_task(config.task)
    kept: list[Row] = []
    scores: dict[str, Any] = {}
    before, total = 0, sum(map(len, asked_of.values()))
    tell(0, total)
    for client, talks in asked_of.items():
        prepared = prepare_rows(talks, task, loaded, config.train.max_length)
        each = score_each(loaded, prepared.examples, task, batch_size=config.evaluate.batch_size)
        scores[client] = {
            "num_items": len(talks),
            "loss": sum(s.loss_sum for s in each) / max(1, sum(s.num_tokens for s in each)),
        }
        if not task.is_asked:
            before += len(talks)
            tell(before, total)
            kept += [
                {"client": client, "loss_sum": s.loss_sum, "num_tokens": s.num_tokens} for s in each
            ]
            continue
        asked = [question_of(talk) for talk in talks]
        said = answers(
            loaded,
            [talk for talk, _ in asked],
            max_new_tokens=cfg.max_new_tokens,
            batch_size=cfg.batch_size,
            tell=lambda done, before=before: tell(before + done, total),
        )
        before += len(asked)
        judged = judge(said, [reference for _, reference in asked])
        scores[client] |= mean_quality(judged)
        for (talk, reference), one, quality in zip(asked, said, judged, strict=True):
            row = {"client": client, "question": talk[-1]["content"], "reference": reference}
            kept.append({**row, "answer": one.text, **asdict(quality)})
    keys = ["loss", *(Quality.__dataclass_fields__ if task.is_asked else ())]
    mean = {key: sum(own[key] for own in scores.values()) / len(scores) for key in keys}
    return kept, {"clients": scores, "mean over clients": mean}


def _held_out_labels(
    loaded: LoadedModel, config: RunConfig, rows: Mapping[str, ClientRows], cfg: Questions
) -> tuple[list[Row], dict[str, Any]]:
    """Every held-out row's true and predicted label; scores for each client and overall."""
    task, labels = (
        build_task(config.task, config.data.labels, config.prefer),
        config.data.labels or (),
    )
    kept: list[Row] = []
    for client, own in sorted(rows.items()):
        texts = _drawn(own.evaluation, cfg.limit, config.seed, client)
        examples = prepare_rows(texts, task, loaded, config.train.max_length).examples
        each = score_each(loaded, examples, task, batch_size=cfg.batch_size)
        for text, one in zip(texts, each, strict=True):
            found = {"label": labels[one.true], "given": labels[one.given], "loss": one.loss_sum}
            kept.append({"client": client, **text, **found})
    scores = {
        client: _label_scores([row for row in kept if row["client"] == client], labels)
        for client in sorted(rows)
    }
    return kept, {"clients": scores, "overall": _label_scores(kept, labels)}


def _label_scores(rows: Sequence[Row], labels: Sequence[str]) -> dict[str, Any]:
    place = {label: n for n, label in enumerate(labels)}
    given, true = (np.array([place[row[key]] for row in rows]) for key in ("given", "label"))
    counts = Labelled("", given[None], true, len(labels)).counts().sum(axis=(0, 1))
    return {
        "num_items": len(rows),
        "loss": sum(row["loss"] for row in rows) / len(rows),
        **label_scores(counts),
        "accuracy": asdict(wilson(int((given == true).sum()), len(rows))),
    }


def _drawn(items: Sequence[Any], limit: int | None, seed: int, *labels: str) -> list[Any]:
    """All items, or `limit` drawn at random (files are often sorted), in their order."""
    import torch

    if limit is None or limit >= len(items):
        return list(items)
    gen = generator(seed, "exam", *labels)
    return [items[i] for i in sorted(torch.randperm(len(items), generator=gen).tolist()[:limit])]


# --- suites ---------------------------------------------------------------------------------------


def _suite(
    loaded: LoadedModel,
    name: str,
    questions: Mapping[str, list[Any]],
    cfg: Questions,
    config: Any,
) -> tuple[list[Mapping[str, Any]], dict[str, Any]]:
    """Rows to save, and scores by way of answering."""
    if name.startswith(LM_EVAL):
        return [], run_lm_eval(loaded, [name.removeprefix(LM_EVAL)], cfg.limit)
    items = _drawn(questions[name], cfg.limit, config.seed, name)
    if name in CODE_SUITES:
        found = run_code(
            loaded,
            CODE_SUITES[name],
            items,
            allow_code_execution=cfg.allow_code_execution,
            max_new_tokens=cfg.max_new_tokens,
            batch_size=cfg.batch_size,
        )
        return list(found.rows), {"pass@1": found.summary()}
    results = [
        summarise(name, SUITES[name].kind, way, answered)
        for way, answered in _ways(loaded, name, items, cfg, config.data.system)
    ]
    rows = [row for result in results for row in result.rows]
    return rows, {result.way: result.summary() for result in results}


def _ways(
    loaded: LoadedModel, name: str, items: Sequence[Item], cfg: Questions, system: str | None
) -> Iterator[tuple[Way, list[Answered]]]:
    size = cfg.batch_size
    yield "likelihood", score_likelihood(loaded, items, system=system, batch_size=size)
    said = score_generation(
        loaded, items, system=system, max_new_tokens=cfg.max_new_tokens, batch_size=size
    )
    yield "generation", said
    if not cfg.leaderboard or not all(item.leaderboard for item in items):
        return
    worded = cfg.instructions.get(name)
    if SUITES[name].kind == "sentiment":
        yield "leaderboard", run_finance(loaded, items, instruction=worded)
    else:
        yield "leaderboard", run_medical(loaded, items, suite=name, instruction=worded)


def latest(run: Path) -> dict[str, Any] | None:
    """The scores of a run's latest evaluation; None if there is none."""
    folder = RunFolder.open(run)
    places = sorted((folder.path / "evaluations").glob("*/scores.json"))
    return _read_scores(places[-1].parent) if places else None


def _read_scores(place: Path) -> dict[str, Any]:
    fix = f"Remove {place}, and evaluate the run again."
    check_listed(place, "scores.json", fix=fix)
    return read_object(place / "scores.json", fix=fix)
