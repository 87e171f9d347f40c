"""HumanEval: write the body of a function; it is right if it passes the problem's own tests.

Chen et al. 2021, "Evaluating Large Language Models Trained on Code". arXiv:2107.03374

Greedy, one sample per problem: the share that passes is pass@1. The prompt is the beginning of a
Python file, which the model continues as text, without a chat template. Programs run in
`sandbox.py`, and only if the caller allows it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from silotune.core.errors import ConfigError, DataError
from silotune.core.stats import Interval, wilson
from silotune.data.files import PlacedRow
from silotune.models.loading import LoadedModel
from silotune.training.generate import complete, encode
from silotune.workflows.evaluate.suites.base import Hub, missing_columns, read_file, read_hub
from silotune.workflows.evaluate.suites.cells import text_of
from silotune.workflows.evaluate.suites.sandbox import (
    Limits,
    Outcome,
    check_sandbox,
    network_note,
    run_program,
)

NAME = "human_eval"
TITLE = "HumanEval: Python functions, run against their tests"
HUB = Hub("openai/openai_humaneval", None, "test")
COLUMNS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where a completion ends: the paper's list. The text after it is no longer the function."""


@dataclass(frozen=True)
class Problem:
    """One function to write."""

    task_id: str
    prompt: str
    """The file up to the end of the function's docstring."""
    entry_point: str
    canonical_solution: str
    test: str
    """Defines check(candidate)."""


@dataclass(frozen=True)
class CodeResult:
    """How many functions pass. passed + failed + timeouts = items."""

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


def load_problems(path: str | Path | None = None) -> list[Problem]:
    """The problems from a local file or from the hub.

    Raises:
        DataError: Rows cannot be found, read or understood.
    """
    rows = read_hub(NAME, HUB, COLUMNS) if path is None else read_file(Path(path).expanduser())
    return [_problem(row) for row in rows]


def _problem(row: PlacedRow) -> Problem:
    if not all(column in row.columns for column in COLUMNS):
        raise missing_columns(NAME, [COLUMNS], row.columns, row.where)
    problem = Problem(**{column: text_of(row.columns, column, row.where) for column in COLUMNS})
    if not problem.entry_point.isidentifier():
        raise DataError(
            f"{row.where}: column 'entry_point' is not the name of a function.\n"
            "  Fix it, or remove the row."
        )
    return problem


def program_of(problem: Problem, completion: str) -> str:
    """The complete program: it ends without an exception if the completion is right."""
    return f"{problem.prompt}{completion}\n\n{problem.test}\n\ncheck({problem.entry_point})\n"


def cut(completion: str) -> str:
    """The completion up to the end of the function."""
    ends = (completion.find(stop) for stop in STOPS)
    return completion[: min((end for end in ends if end >= 0), default=None)]


def run_code(
    loaded: LoadedModel,
    problems: Sequence[Problem],
    *,
    allow_code_execution: bool = False,
    max_new_tokens: int = 512,
    batch_size: int = 16,
    limits: Limits | None = None,
) -> CodeResult:
    """Let the model write the functions, and run them.

    Args:
        loaded: The model in its current state.
        problems: At least one.
        allow_code_execution: Whether programs that the model wrote may run on this machine.
        max_new_tokens: Maximum length of a completion, in tokens.
        batch_size: Prompts in one forward pass; changes only speed and memory.
        limits: What a program may use.

    Raises:
        ConfigError: Running programs was not allowed, or the sandbox does not work here.
    """
    check_allowed(allow_code_execution)
    check_sandbox(limits)
    # with special tokens: the file starts like any document in the base's training data
    prompts = encode(loaded, [problem.prompt for problem in problems], special=True)
    said = complete(loaded, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    completions = [cut(one.text) for one in said]
    outcomes: list[Outcome] = [
        run_program(program_of(problem, completion), limits)
        for problem, completion in zip(problems, completions, strict=True)
    ]
    return _result(problems, completions, outcomes)


def check_allowed(allow_code_execution: bool) -> None:
    """Refuse to continue if programs may not run.

    Raises:
        ConfigError: Programs may not run.
    """
    if not allow_code_execution:
        raise ConfigError(
            f"suite '{NAME}' runs programs that the model wrote, which was not allowed.\n"
            "  Pass --allow-code-execution (allow_code_execution=True) on a machine where the "
            "model's mistakes do no harm, such as a container."
        )


def _result(
    problems: Sequence[Problem], completions: Sequence[str], outcomes: Sequence[Outcome]
) -> CodeResult:
    passed, failed = outcomes.count("passed"), outcomes.count("failed")
    return CodeResult(
        suite=NAME,
        num_items=len(problems),
        num_passed=passed,
        num_failed=failed,
        num_timeouts=outcomes.count("timeout"),
        pass_at_1=wilson(passed, len(problems)),
        note=network_note(),
        rows=[
            {"suite": NAME, "id": problem.task_id, "output": completion, "outcome": outcome}
            for problem, completion, outcome in zip(problems, completions, outcomes, strict=True)
        ],
    )
