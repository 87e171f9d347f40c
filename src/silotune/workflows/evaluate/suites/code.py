"""Suites whose answers are programs: the model continues a prompt, and the tests are run.

Greedy, one sample per problem: the share that passes is pass@1. The prompt is the beginning of a
file, which the model continues as text, without a chat template. Programs run in `sandbox.py`, and
only if the caller allows it. A suite whose language is not on this machine is an error, never a
wrong answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from silotune.core.errors import ConfigError, DataError
from silotune.core.stats import Interval, wilson
from silotune.data.files import PlacedRow
from silotune.models.loading import LoadedModel
from silotune.training.generate import complete, encode
from silotune.workflows.evaluate.suites.base import Hub, missing_columns, read_file, read_hub
from silotune.workflows.evaluate.suites.other_languages import check_language, run_in
from silotune.workflows.evaluate.suites.sandbox import (
    Language,
    Limits,
    Outcome,
    check_sandbox,
    network_note,
    run_program,
)


@dataclass(frozen=True)
class Problem:
    """One program to write."""

    task_id: str
    prompt: str
    """What the model continues; the program begins with it."""
    after: str
    """What follows the completion in the program: its tests."""
    stops: tuple[str, ...]
    """Where a completion ends: the text from the first of these on is left out."""
    solution: str = ""
    """A right completion, if the data set has one."""


@dataclass(frozen=True)
class CodeSuite:
    """A benchmark of programs: where its rows are, how to read them, and their language."""

    name: str
    title: str
    hub: Hub
    layouts: tuple[tuple[str, ...], ...]
    """Required columns, the hub's layout first."""
    read: Callable[[PlacedRow], Problem | None]
    """A row as a problem; None if the row is not part of the test. Raises DataError."""
    language: Language = "python"


@dataclass(frozen=True)
class CodeResult:
    """How many programs pass. passed + failed + timeouts = items."""

    suite: str
    num_items: int
    num_passed: int
    num_failed: int
    num_timeouts: int
    pass_at_1: Interval
    note: str
    """What a reader must know about the sandbox; may be empty."""
    rows: Sequence[dict[str, Any]] = ()
    """Every problem with its completion and outcome, for a JSONL file."""

    def summary(self) -> dict[str, Any]:
        """Everything except the rows, as plain data for JSON."""
        held = asdict(self)
        del held["rows"]
        return held


def load_problems(suite: CodeSuite, path: str | Path | None = None) -> list[Problem]:
    """The problems of a suite, from a local file or from the hub.

    Raises:
        DataError: Rows cannot be found, read or understood, or none is part of the test.
    """
    columns = suite.layouts[0]
    rows = (
        read_hub(suite.name, suite.hub, columns)
        if path is None
        else read_file(Path(path).expanduser())
    )
    for row in rows:
        if not any(all(c in row.columns for c in columns) for columns in suite.layouts):
            raise missing_columns(suite.name, suite.layouts, row.columns, row.where)
    found = [problem for row in rows if (problem := suite.read(row)) is not None]
    if not found:
        raise DataError(
            f"suite '{suite.name}': none of {len(rows)} rows is part of its test.\n"
            "  Give the published file."
        )
    return found


def program_of(problem: Problem, completion: str) -> str:
    """The complete program: it ends without an error if the completion is right."""
    return f"{problem.prompt}{completion}{problem.after}"


def cut(completion: str, stops: Sequence[str]) -> str:
    """The completion up to the first of these texts."""
    ends = (completion.find(stop) for stop in stops)
    return completion[: min((end for end in ends if end >= 0), default=None)]


def run_code(
    loaded: LoadedModel,
    suite: CodeSuite,
    problems: Sequence[Problem],
    *,
    allow_code_execution: bool = False,
    max_new_tokens: int = 512,
    batch_size: int = 16,
    limits: Limits | None = None,
) -> CodeResult:
    """Let the model write the programs, and run them.

    Args:
        loaded: The model in its current state.
        suite: The suite.
        problems: At least one of its problems.
        allow_code_execution: Whether programs that the model wrote may run on this machine.
        max_new_tokens: Maximum length of a completion, in tokens.
        batch_size: Prompts in one forward pass; changes only speed and memory.
        limits: What a program may use.

    Raises:
        ConfigError: Running programs was not allowed, or the sandbox does not work here.
    """
    check_allowed(suite, allow_code_execution)
    check_sandbox(limits)
    check_language(suite.language, suite.name)
    # with special tokens: the file starts like any document in the base's training data
    prompts = encode(loaded, [problem.prompt for problem in problems], special=True)
    said = complete(loaded, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    completions = [cut(one.text, p.stops) for one, p in zip(said, problems, strict=True)]
    outcomes: list[Outcome] = [
        run_one(suite, problem, completion, limits)
        for problem, completion in zip(problems, completions, strict=True)
    ]
    return _result(suite, problems, completions, outcomes)


def run_one(
    suite: CodeSuite, problem: Problem, completion: str, limits: Limits | None = None
) -> Outcome:
    """Run one program with its tests."""
    source = program_of(problem, completion)
    if suite.language == "python":
        return run_program(source, limits)
    return run_in(suite.language, source, limits)


def check_allowed(suite: CodeSuite, allow_code_execution: bool) -> None:
    """Refuse to continue if programs may not run.

    Raises:
        ConfigError: Programs may not run.
    """
    if not allow_code_execution:
        raise ConfigError(
            f"suite '{suite.name}' runs programs that the model wrote, which was not allowed.\n"
            "  Pass --allow-code-execution (allow_code_execution=True) on a machine where the "
            "model's mistakes do no harm, such as a container."
        )


def _result(
    suite: CodeSuite,
    problems: Sequence[Problem],
    completions: Sequence[str],
    outcomes: Sequence[Outcome],
) -> CodeResult:
    passed, failed = outcomes.count("passed"), outcomes.count("failed")
    return CodeResult(
        suite=suite.name,
        num_items=len(problems),
        num_passed=passed,
        num_failed=failed,
        num_timeouts=outcomes.count("timeout"),
        pass_at_1=wilson(passed, len(problems)),
        note=network_note(),
        rows=[
            {"suite": suite.name, "id": problem.task_id, "output": completion, "outcome": outcome}
            for problem, completion, outcome in zip(problems, completions, outcomes, strict=True)
        ],
    )
