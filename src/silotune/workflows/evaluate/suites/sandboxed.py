"""What runs inside the sandbox: limits first, then the program. Started by sandbox.py as a script.

It imports only Python's own library, as it runs without site packages, and nothing of silotune.
Arguments: the program's file, CPU seconds, bytes of memory, the exit code that means "passed".
"""

import os
import resource
import sys
from collections.abc import Callable
from typing import Any

NO_WAY_OUT = ("ctypes.", "os.", "pty.", "resource.", "shutil.", "socket.", "subprocess.", "syslog.")
"""Beginnings of audit events that a program of this kind has no use for: other processes, files
that are made, moved or removed, the network, limits."""
HARMLESS = {"os.listdir", "os.scandir", "os.walk"}
NO_IMPORT = {"_ctypes", "_posixsubprocess"}
"""Ways past the audit events."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def set_limits(*, cpu_s: int, memory_bytes: int) -> None:
    """Hard limits of the kernel; nothing later in this process can raise them."""
    for name, limit in (
        ("RLIMIT_CORE", 0),
        ("RLIMIT_CPU", cpu_s),
        ("RLIMIT_FSIZE", 0),  # no file may hold a byte
        ("RLIMIT_NOFILE", 64),
        ("RLIMIT_NPROC", 0),  # no process or thread more; the kernel exempts root, see `watch`
        ("RLIMIT_AS", memory_bytes),
    ):
        if hasattr(resource, name):
            resource.setrlimit(getattr(resource, name), (limit, limit))


def watch(readable: tuple[str, ...]) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that refuses what a limit cannot: it cannot be taken off again.

    Args:
        readable: Folders that may be read: Python's own library, for imports.
    """
    real = os.path.realpath
    inside = tuple(real(folder) + os.sep for folder in readable)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(path, int):
                return
            if flags & WRITES or not real(os.fsdecode(path)).startswith(inside):
                raise PermissionError("the sandbox opens no file")
        elif event == "import" and args[0] in NO_IMPORT:
            raise ImportError("not in the sandbox")
        elif event.startswith(NO_WAY_OUT) and event not in HARMLESS:
            raise PermissionError("not in the sandbox")

    return hook


def run(path: str, cpu_s: int, memory_bytes: int, passed: int) -> None:
    """Run the program; only one that runs through to its end leaves with the code `passed`."""
    with open(path, encoding="utf-8") as file:
        source = file.read()
    leave = os._exit
    set_limits(cpu_s=cpu_s, memory_bytes=memory_bytes)
    sys.addaudithook(watch((sys.base_prefix, sys.base_exec_prefix)))
    try:
        exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})  # noqa: S102 - its whole purpose
    except BaseException:  # SystemExit too: a program that leaves early has not passed
        leave(1)
    leave(passed)


if __name__ == "__main__":
    run(sys.argv[1], *map(int, sys.argv[2:]))
