"""Processes of their own that begin with the libraries loaded: `silotune` commands, and functions.

Importing torch and transformers takes a process seconds before it does anything. Here one process,
which has done nothing but import them, forks for each command. What the command then does is done
as ever: files, signals, exit status, standard streams. That a fresh `python -m silotune` does the
same is tried by test_demo.py and test_bad_input.py.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        *(
            "silotune.cli",
            "silotune.workflows.compare.compare",
            "silotune.workflows.evaluate.evaluate",
            "silotune.workflows.sweep.sweep",
            "silotune.workflows.run",
        ),
        *("transformers.models.llama.modeling_llama", "transformers.tokenization_utils_fast"),
        *("peft", "datasets", "matplotlib.figure"),
    ]
)


def run_forked(target: Callable[..., None], *args: object) -> int:
    """Call a function in such a process: its exit status, or less than 0 for a signal."""
    if str(ROOT) not in sys.path:  # the other process finds `tests` by it; pytest needs it not
        sys.path.append(str(ROOT))
    process = _FORKS.Process(target=target, args=args)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def run_typed(
    words: Sequence[object], *, cwd: Path, input: str = ""
) -> subprocess.CompletedProcess:
    """What `subprocess.run` of `python -m silotune` gives, without the imports."""
    with tempfile.TemporaryDirectory() as scratch:
        streams = [Path(scratch) / name for name in ("in", "out", "err")]
        streams[0].write_text(input, encoding="utf-8")
        argv = [str(word) for word in words]
        code = run_forked(command, argv, str(cwd), [str(path) for path in streams])
        said = [path.read_text(encoding="utf-8") for path in streams[1:]]
    return subprocess.CompletedProcess(argv, code, *said)


def command(argv: list[str], cwd: str, streams: list[str]) -> None:
    os.chdir(cwd)
    for number, (path, how) in enumerate(zip(streams, "rww", strict=True)):
        with Path(path).open(how) as file:
            os.dup2(file.fileno(), number)
    # those of multiprocessing are other files
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, how, buffering=1, encoding="utf-8", closefd=False)
        for number, how in enumerate("rww")
    )
    sys.argv = ["silotune", *argv]
    runpy.run_module("silotune", run_name="__main__", alter_sys=True)
