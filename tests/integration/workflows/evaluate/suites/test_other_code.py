"""MBPP and MultiPL-E: published file formats, prompts, and right and wrong programs that run.

The problems are our own; the data sets are not on this machine.
"""

import json
import shutil

import pytest

from silotune.core.errors import ConfigError, DataError
from silotune.workflows.evaluate.evaluate import Questions, read_questions
from silotune.workflows.evaluate.suites import code, other_languages
from silotune.workflows.evaluate.suites.code import (
    cut,
    load_problems,
    program_of,
    run_code,
    run_one,
)
from silotune.workflows.evaluate.suites.mbpp import MBPP, STOPS
from silotune.workflows.evaluate.suites.multiple import MULTIPLE_CPP, MULTIPLE_JS
from silotune.workflows.evaluate.suites.other_languages import check_language, run_in
from silotune.workflows.evaluate.suites.sandbox import Limits, isolation
from tests.conftest import write_jsonl

TRIPLE = {
    "task_id": 11,
    "text": "Write a function that triples a number.",
    "code": "def triple(x):\r\n    return 3 * x",
    "test_list": ["assert triple(2) == 6", "assert triple(-1) == -3", "assert triple(0) == ZERO"],
    "test_setup_code": "ZERO = 0",
    "challenge_test_list": ["assert triple(10) == 0"],
}
HALF = {
    "source_file": "our own",
    "task_id": 510,
    "prompt": "Write a function that halves a number.",
    "code": "def half(x):\n    return x / 2",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(half(3), 1.5)"],
}
JS = {
    "name": "HumanEval_0_triple",
    "language": "js",
    "prompt": "//Three times a number.\nfunction triple(x){\n",
    "doctests": "transform",
    "original": "",
    "prompt_terminology": "reworded",
    "tests": "const assert = require('node:assert');\n\nfunction test() {\n"
    "  let candidate = triple;\n  assert.deepEqual(candidate(2),6);\n"
    "  assert.deepEqual(candidate(-1),-3);\n}\n\ntest();",
    "stop_tokens": ["\nfunction ", "\n/*", "\n//", "\nconsole.log"],
}
CPP = {
    "name": "HumanEval_0_triple",
    "language": "cpp",
    "prompt": "#include<assert.h>\n#include<bits/stdc++.h>\n// Three times a number.\n"
    "long triple(long x) {\n",
    "tests": "}\nint main() {\n    auto candidate = triple;\n    assert(candidate((2)) == (6));\n"
    "    assert(candidate((-1)) == (-3));\n}\n",
    "stop_tokens": ["\n}"],
}


def only(suite, row, tmp_path):
    (problem,) = load_problems(suite, write_jsonl(tmp_path / "rows.jsonl", [row]))
    return problem


# --- MBPP -----------------------------------------------------------------------------------------


def test_an_mbpp_prompt_is_the_task_and_its_first_test(tmp_path):
    problem = only(MBPP, TRIPLE, tmp_path)
    assert problem.prompt == (
        '"""\nWrite a function that triples a number.\nassert triple(2) == 6\n"""\n'
    )
    assert problem.task_id == "MBPP/11"
    assert "triple(10)" not in program_of(problem, ""), "challenge tests are not run"


def test_both_published_forms_are_read_and_their_solutions_pass(tmp_path):
    (tmp_path / "sanitized.json").write_text(json.dumps([HALF]), "utf-8")
    for row, path in ((TRIPLE, None), (HALF, tmp_path / "sanitized.json")):
        (problem,) = load_problems(MBPP, path or write_jsonl(tmp_path / "mbpp.jsonl", [row]))
        assert run_one(MBPP, problem, problem.solution) == "passed"
        assert run_one(MBPP, problem, "def triple(x):\n    return x\nhalf = triple") == "failed"
        assert run_one(MBPP, problem, "") == "failed"


def test_all_tests_of_a_problem_count(tmp_path):
    problem = only(MBPP, TRIPLE, tmp_path)
    assert run_one(MBPP, problem, "def triple(x):\n    return 6") == "failed"


def test_only_the_published_test_tasks_are_asked(tmp_path):
    rows = [{**TRIPLE, "task_id": n} for n in (1, 10, 11, 510, 511, 974)]
    found = load_problems(MBPP, write_jsonl(tmp_path / "mbpp.jsonl", rows))
    assert [problem.task_id for problem in found] == ["MBPP/11", "MBPP/510"]
    with pytest.raises(DataError, match="none of 1 rows is part of its test"):
        load_problems(MBPP, write_jsonl(tmp_path / "train.jsonl", [{**TRIPLE, "task_id": 700}]))


def test_a_completion_ends_before_the_models_own_tests():
    said = "def triple(x):\n    return 3 * x\n\nassert triple(1) == 3\n"
    assert cut(said, STOPS) == "def triple(x):\n    return 3 * x\n"
    assert cut("x = 1\n<file_sep>y", ("\n<file_sep>",)) == "x = 1"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"test_list": "assert True"}, "column 'test_list' is not a list of texts"),
        ({"test_list": []}, "column 'test_list' is empty"),
        ({"test_list": [1]}, "column 'test_list' is not a list of texts"),
        ({"task_id": "eleven"}, "column 'task_id' is not a number"),
        ({"text": ""}, "column 'text' is empty"),
    ],
)
def test_a_bad_mbpp_row_is_named_without_its_values(tmp_path, change, says):
    with pytest.raises(DataError, match=r"rows\.jsonl:1") as error:
        only(MBPP, {**TRIPLE, **change}, tmp_path)
    assert says in str(error.value)
    assert "eleven" not in str(error.value)


# --- MultiPL-E ------------------------------------------------------------------------------------

RIGHT = "    return 3 * x;"
LANGUAGES = {
    "js": (MULTIPLE_JS, JS, f"{RIGHT}\n}}\n", "    return x;\n}\n"),
    "cpp": (MULTIPLE_CPP, CPP, f"{RIGHT}", "    return x;"),
}


def needs(language):
    tool = other_languages.TOOLS[language][0]
    if shutil.which(tool) is None or not isolation():
        pytest.skip(f"{tool} or the kernel's namespaces are not on this machine")


@pytest.mark.parametrize("language", LANGUAGES)
def test_right_programs_pass_and_wrong_ones_do_not(language, tmp_path):
    needs(language)
    suite, row, right, wrong = LANGUAGES[language]
    problem = only(suite, row, tmp_path)
    assert run_one(suite, problem, right) == "passed"
    assert run_one(suite, problem, wrong) == "failed"
    assert run_one(suite, problem, "    this is no program") == "failed"


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_sandbox_works_for_the_language_or_says_why_not(language):
    needs(language)
    check_language(language, LANGUAGES[language][0].name)


def test_a_program_in_javascript_gets_nowhere(tmp_path):
    needs("js")
    kept = tmp_path / "kept"
    kept.write_text("mine")
    quick = Limits(wall_s=10, cpu_s=2)
    for source in (
        f"require('fs').unlinkSync({str(kept)!r});",
        f"require('fs').writeFileSync({str(tmp_path / 'made')!r}, 'x');",
        "process.exit(0);",
        "while (true) {}",
        "const all = []; while (true) all.push(Buffer.alloc(1 << 26, 1));",
    ):
        assert run_in("js", source, quick) in ("failed", "timeout"), source
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_program_in_cpp_gets_nowhere(tmp_path):
    needs("cpp")
    kept = tmp_path / "kept"
    kept.write_text("mine")
    source = f"""
#include <cstdio>
#include <cstdlib>
#include <unistd.h>
int main() {{
    int done = 0;
    done += std::remove({json.dumps(str(kept))}) == 0;
    done += std::fopen("/etc/passwd", "r") != nullptr;
    std::FILE* made = std::fopen("made", "w");
    done += made && std::fputs("x", made) >= 0 && std::fflush(made) == 0;
    done += std::getenv("HOME") != nullptr;
    done += getpid() > 9;
    return done;
}}
"""
    assert run_in("cpp", source) == "passed", "it returns how many of these things it could do"
    assert kept.read_text() == "mine"
    endless = "int main() { volatile int n = 0; while (true) ++n; }"
    assert run_in("cpp", endless, Limits(wall_s=10, cpu_s=1)) in ("failed", "timeout")


def test_a_language_that_is_not_here_is_one_error_and_no_wrong_answer(monkeypatch, tmp_path):
    monkeypatch.setattr(other_languages.shutil, "which", lambda name: None)
    monkeypatch.setattr(code, "complete", lambda *a, **s: pytest.fail("the model was asked"))
    path = write_jsonl(tmp_path / "rows.jsonl", [CPP])
    asked = Questions(
        suites=("multiple-cpp",), data={"multiple-cpp": path}, allow_code_execution=True
    )
    with pytest.raises(ConfigError, match=r"needs g\+\+ for C\+\+, which is not on this machine"):
        read_questions(asked)
    problems = load_problems(MULTIPLE_CPP, path)
    check_language.cache_clear()
    with pytest.raises(ConfigError, match="Nothing was scored"):
        run_code(None, MULTIPLE_CPP, problems, allow_code_execution=True)  # pyright: ignore[reportArgumentType]


def test_without_namespaces_no_foreign_program_runs(monkeypatch):
    monkeypatch.setattr(other_languages, "isolation", lambda: ())
    monkeypatch.setattr(other_languages.shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(ConfigError, match="only where `unshare --user --net` works"):
        other_languages.check_installed("js", "multiple-js")


def test_the_prompt_of_multipl_e_is_stripped_and_its_stops_are_those_of_the_row(tmp_path):
    problem = only(MULTIPLE_CPP, CPP, tmp_path)
    assert problem.prompt.endswith("long triple(long x) {")
    assert problem.stops == ("\n}", "<file_sep>")
    with pytest.raises(DataError, match="column 'language' is not 'js'"):
        only(MULTIPLE_JS, CPP, tmp_path)
