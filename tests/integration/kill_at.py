"""Runs a recipe and kills its own process with SIGKILL at a named point; for test_resume.py."""

import os
import shutil
import signal
from pathlib import Path

import safetensors.torch

import silotune
from silotune.federation import client, rounds, run_folder


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(owner, name, number, *, after=False):
    """Die at the `number`-th call of a function, before it begins or after it ends."""
    real, calls = getattr(owner, name), iter(range(1, 1000))

    def wrapper(*args, **kwargs):
        if next(calls) != number:
            return real(*args, **kwargs)
        if after:
            real(*args, **kwargs)
        return die()

    setattr(owner, name, wrapper)


def half_written(number):
    """Die with half of the `number`-th safetensors file on disk."""
    real, calls = safetensors.torch.save_file, iter(range(1, 1000))

    def wrapper(tensors, path, **kwargs):
        real(tensors, path, **kwargs)
        if next(calls) == number:
            data = Path(path).read_bytes()
            Path(path).write_bytes(data[: len(data) // 2])
            die()

    safetensors.torch.save_file = wrapper  # imported where it is used


def half_removed(name):
    """Die when half of a checkpoint is removed."""
    real = shutil.rmtree

    def rmtree(path, *args, **kwargs):
        files = sorted(Path(path).glob("*.safetensors")) if name in str(path) else []
        if files and Path(path).parent.name == "checkpoints":
            files[0].unlink()
            die()
        return real(path, *args, **kwargs)

    shutil.rmtree = rmtree


# 3 clients, 3 rounds: a round writes a memory and an update per client, then adapter and extra of
# its checkpoint: 8 files
POINTS = {
    "before the first client": lambda: on_call(client, "train", 1),
    "in the first round": lambda: on_call(client, "train", 2),
    "after training, before the memory": lambda: on_call(client, "save_memory", 5),
    "after the memory, before the spool": lambda: on_call(client, "save_memory", 5, after=True),
    "half of a memory": lambda: half_written(8 + 3),
    "half of an update": lambda: half_written(8 + 4),
    "before aggregation": lambda: on_call(rounds, "round_rows", 2),
    "half of a checkpoint": lambda: half_written(8 + 7),
    "between the files of a checkpoint": lambda: on_call(run_folder, "save_tensors", 4),
    "before a checkpoint is renamed": lambda: on_call(Path, "rename", 3),
    "before old spools are dropped": lambda: on_call(run_folder.RunFolder, "_prune", 2),
    "before the last spool is dropped": lambda: on_call(run_folder.RunFolder, "_prune", 3),
    "while the last old checkpoint is removed": lambda: half_removed("round-00002"),
    "while the last adapter is scored": lambda: on_call(rounds, "score_rows", 1),
    "before the summary": lambda: on_call(silotune.workflows.write_results, "summarise", 1),
}


def run_and_die(point: str, recipe: str, out: str) -> None:
    """In a process of its own."""
    import silotune.workflows.run

    POINTS[point]()
    silotune.run(recipe, out=out)
