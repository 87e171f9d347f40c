"""The script that runs inside the sandbox: it sets limits, then runs the program.

sandbox.py starts it. It imports only Python's own library and nothing from silotune, because it
runs without site packages. Arguments: the program's file, CPU seconds, bytes of memory, the exit
code that means "passed". Or, for a program that is not Python: --become, the limits and the root
folder as JSON, and the command.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

NO_WAY_OUT = ("ctypes.", "os.", "pty.", "resource.", "shutil.", "socket.", "subprocess.", "syslog.")
"""Prefixes of audit events that such a program does not need: other processes, creating, moving or
removing files, the network, limits."""
HARMLESS = {"os.listdir", "os.scandir", "os.walk"}
NO_IMPORT = {"_ctypes", "_posixsubprocess"}
"""Modules that bypass the audit events."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def set_limits(*, cpu_s: int, memory_bytes: int) -> None:
    """Set hard kernel limits; nothing later in this process can raise them."""
    for name, limit in (
        ("RLIMIT_CORE", 0),
        ("RLIMIT_CPU", cpu_s),
        ("RLIMIT_FSIZE", 0),  # no file may contain a byte
        ("RLIMIT_NOFILE", 64),
        ("RLIMIT_NPROC", 0),  # no more processes or threads; the kernel exempts root, see `watch`
        ("RLIMIT_AS", memory_bytes),
    ):
        if hasattr(resource, name):
            resource.setrlimit(getattr(resource, name), (limit, limit))


def watch(readable: tuple[str, ...]) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that refuses what limits cannot. It cannot be removed again.

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
    """Run the program; only one that runs to its end exits with the code `passed`."""
    with open(path, encoding="utf-8") as file:
        source = file.read()
    leave = os._exit
    set_limits(cpu_s=cpu_s, memory_bytes=memory_bytes)
    sys.addaudithook(watch((sys.base_prefix, sys.base_exec_prefix)))
    try:
        exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})  # noqa: S102 - its whole purpose
    except BaseException:  # including SystemExit: a program that exits early has not passed
        leave(1)
    leave(passed)


def become(limits: dict[str, int], root: str | None, command: list[str]) -> None:
    """Set kernel limits and become another program, which sees only the folder `root`, if given."""
    if root is not None:
        os.chroot(root)
        os.chdir("/")
    for name, limit in limits.items():
        if hasattr(resource, name):
            resource.setrlimit(getattr(resource, name), (limit, limit))
    os.execve(command[0], command, {"PATH": "/usr/local/bin:/usr/bin:/bin", "TMPDIR": "."})


if __name__ == "__main__" and sys.argv[1] == "--become":
    told: list[Any] = json.loads(sys.argv[2])
    become(told[0], told[1], sys.argv[3:])
elif __name__ == "__main__":
    run(sys.argv[1], *map(int, sys.argv[2:]))
