"""What is on disk of a run, for those who only look: which run it is, and how far it got.

Loads no torch, unlike run_folder.py, which knows what the recipe means and what a state is.
"""

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.core.atomic_files import write_atomically
from silotune.core.checksums import FILE as CHECKSUMS
from silotune.core.checksums import check_listed, listed
from silotune.core.errors import RunFolderError
from silotune.core.reading_back import parse_json, read_json, read_text, read_toml

if TYPE_CHECKING:
    from silotune.federation.metrics import Row

EXTENDED = "extended.json"
EXTENDED_FIX = "Restore it from a copy of the folder, or start a new run."


class RunRecord:
    """The readable part of one run on disk."""

    RECIPE = "recipe.toml"
    """The file that marks a folder as a run folder."""
    KIND = "run"
    COMMAND = "silotune run"
    RESULT = "summary.json"
    """The file that marks it as finished."""
    MADE_AGAIN = ("summary.json", "split.json", "samples.json", "adapter/")
    """What a resume writes again from the last checkpoint, if there is no `RESULT`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def recipe_table(cls, path: Path) -> dict[str, Any]:
        """What recipe.toml says, as it was written at the start.

        Raises:
            RunFolderError: It is not a run folder, its recipe has changed since it was written, or
                an earlier version of silotune wrote it.
        """
        recipe = path / cls.RECIPE
        if not recipe.is_file():
            why = f"it has no {cls.RECIPE}" if path.is_dir() else "there is no such folder"
            raise RunFolderError(
                f"{path} is not a {cls.KIND} folder: {why}.\n"
                f"  Give the folder that a {cls.KIND} printed, for example "
                "runs/2026-01-31-120000-demo."
            )
        if cls.RECIPE not in listed(path):
            files = f"{cls.RECIPE} $(ls -d *.json *.jsonl adapter/* 2>/dev/null)"
            raise RunFolderError(
                f"{path} has no SHA-256 of its {cls.RECIPE}: an earlier version of silotune wrote "
                f"it, or {CHECKSUMS} is damaged.\n  Restore {CHECKSUMS} from a copy. If nothing in "
                "a finished folder has changed since, write it:\n"
                f"  cd {path} && sha256sum {files} > {CHECKSUMS}"
            )
        fix = f"Restore it, or start a new {cls.KIND} with the changed recipe."
        check_listed(path, cls.RECIPE, fix=fix)
        return read_toml(recipe, fix=fix)

    def rounds(self) -> int:
        """How many rounds the run has, those that were added later included.

        Raises:
            RunFolderError: As in `recipe_table`, or the list of extensions is damaged.
        """
        written, longer = self.recipe_table(self.path), extensions(self.path)
        return int((longer[-1]["after"] if longer else written)["rounds"])

    def run_id(self) -> str:
        """A unique identifier of this run. A resume does not change it."""
        path = self.path / "run-id"
        if not path.exists():
            write_atomically(path, secrets.token_hex(16).encode())
        return read_text(path, fix="Remove it and resume: the engine then sees a new run.")

    @property
    def _metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    def metrics(self) -> "list[Row]":
        """All rows written so far. A half-written last line is skipped: its round is repeated.

        Raises:
            RunFolderError: The file is damaged.
        """
        path = self._metrics_path
        if (self.path / self.RESULT).exists():  # before, it grows
            self._check("metrics.jsonl")
        if not path.exists():
            return []
        rows: list[Row] = []
        lines = read_text(path, fix=self._fix("metrics.jsonl")).splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                row = parse_json(line)
                _ = int(row["round"]), str(row["event"])
                rows.append(row)
            except (ValueError, LookupError, TypeError) as error:
                if number < len(lines) or line.endswith("\n"):  # not truncated by a kill
                    raise RunFolderError(
                        f"{path}, line {number}: this is not a row of metrics.\n"
                        f"  {self._fix('metrics.jsonl')}"
                    ) from error
        return rows

    def read_json(self, name: str) -> Any:
        """The contents of a JSON file in the folder, or None if it does not exist yet.

        Raises:
            RunFolderError: It is damaged, or it was written and is gone.
        """
        path = self.path / name
        if not path.exists() and (name == self.RESULT or name not in listed(self.path)):
            return None
        self._check(name)
        return read_json(path, fix=self._fix(name))

    def _check(self, name: str) -> None:
        check_listed(self.path, name, fix=self._fix(name))

    def _fix(self, name: str) -> str:
        """How to fix a damaged file."""
        if f"{name}/".startswith(self.MADE_AGAIN):
            result = self.path / self.RESULT
            return f"Remove {result} and resume, to have it written again: " + (
                f"{self.COMMAND} --resume {self.path}"
            )
        return f"Restore it from a copy of the folder, or start a new {self.KIND}."


def extensions(folder: Path) -> list[dict[str, Any]]:
    """The run's extensions, oldest first.

    Returns:
        Of each: `date`; `after_round`, the round that was done last; `before` and `after`, the
        dotted keys that changed and their values.

    Raises:
        RunFolderError: The file is damaged.
    """
    path = folder / EXTENDED
    check_listed(folder, EXTENDED, fix=EXTENDED_FIX)
    if not path.exists():
        return []
    found = read_json(path, fix=EXTENDED_FIX)
    try:
        for one in found:
            _ = str(one["date"]), int(one["after_round"]), int(one["before"]["rounds"])
            _ = [f"{key}={value}" for key, value in one["after"].items()]
    except (TypeError, LookupError, AttributeError, ValueError):
        raise RunFolderError(f"{path} holds no list of extensions.\n  {EXTENDED_FIX}") from None
    return found
