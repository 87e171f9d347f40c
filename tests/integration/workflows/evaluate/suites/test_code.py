"""Programs in the sandbox: correct ones pass, harmful ones fail fast and leave nothing behind."""

import json
import sys
import time
from pathlib import Path

import pytest

from silotune.core.errors import ConfigError, DataError
from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig
from silotune.models.loading import load_model
from silotune.workflows.evaluate.suites import code, sandbox
from silotune.workflows.evaluate.suites.code import cut, load_problems, program_of, run_code
from silotune.workflows.evaluate.suites.human_eval import HUMAN_EVAL, STOPS
from silotune.workflows.evaluate.suites.sandbox import Limits, isolation, network_note, run_program
from tests.conftest import write_jsonl

DATA = Path(__file__).parents[6] / "shared" / "data" / "human_eval" / "problems_part.jsonl"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the sandbox needs POSIX")

QUICK = Limits(wall_s=1.5, cpu_s=1, memory_bytes=1 << 29)
PROBLEM = {
    "task_id": "Tiny/0",
    "prompt": "def double(x):\n",
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(3) == 6\n",
}


@pytest.fixture(params=["isolated", "bare"])
def either_way(request, monkeypatch):
    """With the namespaces that this machine has, and without any."""
    if request.param == "bare":
        monkeypatch.setattr(sandbox, "isolation", lambda: ())


@pytest.mark.skipif(not DATA.is_file(), reason=f"{DATA} is not there")
def test_canonical_solutions_pass_and_empty_ones_do_not():
    problems = load_problems(HUMAN_EVAL, DATA)
    assert len(problems) == 81
    for problem in problems[::20]:
        assert run_program(program_of(problem, problem.solution)) == "passed"
        assert run_program(program_of(problem, "    pass\n")) == "failed"


HARMFUL = {
    "endless loop": "while True:\n    pass",
    "long sleep": "import time\ntime.sleep(60)",
    "memory hog": "held = []\nwhile True:\n    held.append(bytearray(1 << 26))",
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "a process": "import subprocess\nsubprocess.run(['true'])",
    "the network": "import socket\nsocket.create_connection(('127.0.0.1', 9))",
    "a way past": "import ctypes",
    "early exit": "import sys\nsys.exit(0)",
    "hard exit": "import os\nos._exit(0)",
    "kill": "import os, signal\nos.kill(os.getppid(), signal.SIGTERM)",
    "reading a file": "open('/etc/passwd').read()",
    "broken": "def f(:\n",
}


@pytest.mark.parametrize("source", HARMFUL.values(), ids=HARMFUL)
def test_a_harmful_program_fails_quickly(source, either_way):
    start = time.monotonic()
    assert run_program(source, QUICK) in ("failed", "timeout")
    assert time.monotonic() - start < 10


def test_a_program_that_passes_the_deadline_is_a_timeout():
    assert run_program(HARMFUL["long sleep"], QUICK) == "timeout"


def test_files_are_neither_made_nor_removed(tmp_path, either_way):
    kept, made = tmp_path / "kept", tmp_path / "made"
    kept.write_text("mine")
    for line in (f"open({str(made)!r}, 'w')", f"os.remove({str(kept)!r})", "open('here', 'w')"):
        assert run_program(f"import os\n{line}", QUICK) == "failed"
    assert run_program(f"import os\nos.open({str(made)!r}, os.O_CREAT)", QUICK) == "failed"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_no_secret_of_the_environment_is_there(monkeypatch, either_way):
    monkeypatch.setenv("SILOTUNE_SECRET", "s3cret")
    look = "import os\nassert not any('SECRET' in name for name in os.environ)"
    assert run_program(look, QUICK) == "passed"
    of_parent = "import os\nopen(f'/proc/{os.getppid()}/environ', 'rb').read()"
    assert run_program(of_parent, QUICK) == "failed"


def test_a_process_that_left_the_group_does_not_keep_running():
    """The audit hook forbids it; the namespace must hold without the hook, too."""
    if "--pid" not in isolation():
        pytest.skip("no process namespace on this machine")
    done = sandbox.subprocess.run(
        [*isolation(), "--", sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "1"


def test_the_result_says_if_the_network_could_not_be_cut_off(monkeypatch):
    monkeypatch.setattr(sandbox, "isolation", lambda: ())
    assert "only an audit hook kept the programs from using the network" in network_note()
    monkeypatch.setattr(sandbox, "isolation", lambda: ("unshare",))
    assert network_note() == ""


def test_a_machine_without_unshare_is_detected(monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    assert isolation.__wrapped__() == ()
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: "/bin/false")
    assert isolation.__wrapped__() == ()


def test_a_sandbox_that_fails_everything_is_an_error_not_a_score():
    with pytest.raises(ConfigError, match=r"does not work on this machine.*\n.*\n?  Run the suite"):
        sandbox.check_sandbox(Limits(memory_bytes=1 << 20))
    sandbox.check_sandbox(QUICK)


@pytest.mark.parametrize(
    ("completion", "kept"),
    [
        ("    return 1\n\ndef other():\n    pass", "    return 1\n"),
        ("    return 1\nprint(2)", "    return 1"),
        ("    if x:\n        return 1\n", "    if x:\n        return 1\n"),
        ("", ""),
    ],
)
def test_a_completion_ends_where_the_function_ends(completion, kept):
    assert cut(completion, STOPS) == kept


def test_nothing_runs_before_it_was_allowed(monkeypatch, tmp_path):
    monkeypatch.setattr(code, "complete", lambda *a, **s: pytest.fail("the model was asked"))
    problems = load_problems(HUMAN_EVAL, write_jsonl(tmp_path / "p.jsonl", [PROBLEM]))
    with pytest.raises(ConfigError, match=r"was not allowed\.\n  Pass --allow-code-execution"):
        run_code(None, HUMAN_EVAL, problems)  # pyright: ignore[reportArgumentType]


def test_what_a_model_writes_is_run_and_counted(tiny_model, tmp_path, monkeypatch):
    loaded = load_model(
        ModelConfig(name=str(tiny_model)), AdapterConfig(rank=2), seed=0, device="cpu"
    )
    rows = [{**PROBLEM, "task_id": f"Tiny/{n}"} for n in range(3)]
    problems = load_problems(HUMAN_EVAL, write_jsonl(tmp_path / "p.jsonl", rows))
    given = {"allow_code_execution": True, "max_new_tokens": 3}
    found = run_code(loaded, HUMAN_EVAL, problems, **given, limits=QUICK)
    assert found.num_passed + found.num_failed + found.num_timeouts == found.num_items == 3
    monkeypatch.setattr(code, "cut", lambda text, stops: PROBLEM["canonical_solution"])
    found = run_code(loaded, HUMAN_EVAL, problems, **given)
    assert (found.num_passed, found.pass_at_1.mean) == (3, 1.0)
    assert found.rows[0]["outcome"] == "passed"
    assert json.dumps([found.summary(), *found.rows])


def test_a_missing_column_and_a_bad_name_are_named(tmp_path):
    row = {**PROBLEM, "tests": ""}
    del row["test"]
    with pytest.raises(
        DataError, match=r"p\.jsonl:1: .* needs column 'test'.*Did you mean 'tests'"
    ):
        load_problems(HUMAN_EVAL, write_jsonl(tmp_path / "p.jsonl", [row]))
    with pytest.raises(DataError, match="'entry_point' is not the name of a function"):
        load_problems(
            HUMAN_EVAL, write_jsonl(tmp_path / "p.jsonl", [{**PROBLEM, "entry_point": "a b"}])
        )
