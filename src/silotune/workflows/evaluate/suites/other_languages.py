"""Run JavaScript and C++ programs in the sandbox: with node and g++, if this machine has them.

Python's audit hook does not see these programs, so the kernel has to keep them in: without
`unshare`, they do not run at all. node also gets its own permission model, which refuses other
files, processes and threads. A C++ program is linked statically and sees an empty folder as its
root. As for Python, this is against accidents, not against code that is written to break out.
"""

import functools
import json
import shutil
import tempfile
from pathlib import Path

from silotune.core.errors import ConfigError
from silotune.workflows.evaluate.suites.sandbox import (
    PASSED,
    Language,
    Limits,
    Outcome,
    in_child,
    isolation,
)

TOOLS: dict[Language, tuple[str, str]] = {"js": ("node", "JavaScript"), "cpp": ("g++", "C++")}
"""What runs or compiles a language."""
PERMISSIONS = ("--permission", "--experimental-permission")
"""node's permission model, from version 23.5 on and from version 20 on."""
COMPILING = {"RLIMIT_CORE": 0, "RLIMIT_CPU": 60, "RLIMIT_FSIZE": 1 << 28, "RLIMIT_AS": 4 << 30}
COMPILING_S = 300.0
"""Seconds on a busy machine; processor time has a limit of its own."""

HARMLESS: dict[Language, str] = {
    "js": "const assert = require('node:assert');\n"
    "assert.throws(() => require('fs').readFileSync('/etc/passwd'));\n"
    "assert.throws(() => require('child_process').execSync('true'));\n",
    "cpp": "#include <assert.h>\n#include <bits/stdc++.h>\n"
    'int main() { assert(!std::ifstream("/etc/passwd").good()); }\n',
}
"""A program that passes if the sandbox works, and only if it keeps files out of reach."""


@functools.cache
def check_language(language: Language, suite: str) -> None:
    """Check that programs in a language can run, and that the sandbox holds them.

    Raises:
        ConfigError: Something is missing; otherwise every program would seem to fail.
    """
    if language == "python":
        return
    check_installed(language, suite)
    if run_in(language, HARMLESS[language]) != "passed":
        tool, name = TOOLS[language]
        more = {
            "js": "node must have the permission model (version 20 or newer)",
            "cpp": "g++ must be able to link statically (on some systems: install glibc-static)",
        }[language]
        raise ConfigError(
            f"suite '{suite}': a harmless program in {name} does not pass in the sandbox of this "
            f"machine, so none is scored.\n  Check {tool}: {more}; or leave the suite out."
        )


def check_installed(language: Language, suite: str) -> None:
    """Check, without running anything, that a language is on this machine.

    Raises:
        ConfigError: It is not, or the kernel cannot isolate its programs.
    """
    if language == "python":
        return
    tool, name = TOOLS[language]
    if shutil.which(tool) is None:
        raise ConfigError(
            f"suite '{suite}' needs {tool} for {name}, which is not on this machine. Nothing was "
            f"scored.\n  Install {tool}, or leave the suite out."
        )
    if not isolation():
        raise ConfigError(
            f"suite '{suite}': programs in {name} run only where `unshare --user --net` works, "
            "because nothing else would keep them from files and the network.\n"
            "  Use another machine or container, or leave the suite out."
        )


def run_in(language: Language, source: str, limits: Limits | None = None) -> Outcome:
    """Run a program in JavaScript or C++; outcomes as in `run_program`.

    Args:
        language: Its language, whose tool is on this machine.
        source: Its text.
        limits: What it may use.
    """
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="silotune-sandbox-") as folder:
        return (_run_js if language == "js" else _run_cpp)(Path(folder), source, limits)


def _run_js(folder: Path, source: str, limits: Limits) -> Outcome:
    program = folder / "program.js"
    # only a program that runs to its end has passed; one that leaves early has another code
    program.write_text(f"{source}\nprocess.exit({PASSED});\n", "utf-8", errors="replace")
    heap = f"--max-old-space-size={limits.memory_bytes >> 21}"
    reads = f"--allow-fs-read={program}"
    bounds = {
        "RLIMIT_CORE": 0,
        "RLIMIT_CPU": limits.cpu_s,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_DATA": limits.memory_bytes,  # of addresses, node reserves far more than it uses
    }
    command = [str(shutil.which("node")), heap, _permission(), reads, str(program)]
    return _become(bounds, command, folder, wall_s=limits.wall_s, passed=PASSED)


def _run_cpp(folder: Path, source: str, limits: Limits) -> Outcome:
    (folder / "program.cpp").write_text(source, "utf-8", errors="replace")
    root = folder / "root"
    root.mkdir()
    built = ["-std=c++17", "-static", "program.cpp", "-o", "root/program"]
    compiler = [str(shutil.which("g++")), *built]
    done = _become(COMPILING, compiler, folder, wall_s=COMPILING_S)
    if done != "passed":
        return done
    bounds = {
        "RLIMIT_CORE": 0,
        "RLIMIT_CPU": limits.cpu_s,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": 0,
        "RLIMIT_AS": limits.memory_bytes,
    }
    options = ("--map-root-user",)  # chroot needs it
    return _become(
        bounds, ["/program"], folder, wall_s=limits.wall_s, root=str(root), options=options
    )


def _become(
    bounds: dict[str, int],
    command: list[str],
    folder: Path,
    *,
    wall_s: float,
    passed: int = 0,
    root: str | None = None,
    options: tuple[str, ...] = (),
) -> Outcome:
    told = ["--become", json.dumps([bounds, root]), *command]
    return in_child(told, folder, wall_s=wall_s, passed=passed, options=options)


@functools.cache
def _permission() -> str:
    """The option of this machine's node that turns on its permission model."""
    with tempfile.TemporaryDirectory(prefix="silotune-sandbox-") as place:
        folder = Path(place)
        (folder / "empty.js").write_text("", "utf-8")
        for option in PERMISSIONS:
            reads = f"--allow-fs-read={folder / 'empty.js'}"
            command = [str(shutil.which("node")), option, reads, str(folder / "empty.js")]
            if _become({"RLIMIT_CPU": 20}, command, folder, wall_s=60) == "passed":
                return option
    return PERMISSIONS[-1]
