"""Simulated clients as real ones: a folder with rows and configuration for each of them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from silotune.core.atomic_files import make_folder, write_atomically
from silotune.data.chat_templates import TEMPLATES
from silotune.data.client_rows import ClientRows
from silotune.data.conversations import TEXT
from silotune.data.reading import TaskRow
from silotune.federation.client_memory import folder_name
from silotune.recipes.schema import RunConfig


def _line(row: TaskRow) -> str:
    columns = row if isinstance(row, dict) else {"messages": row}
    if not isinstance(row, dict) and row[0]["role"] == TEXT:
        columns = {TEXT: row[0]["content"]}
    return json.dumps(columns, ensure_ascii=False) + "\n"


def write_client_configs(
    folder: Path,
    rows: Mapping[str, ClientRows],
    run: RunConfig,
    *,
    model: str | None,
    state: Callable[[str], Path],
) -> dict[str, Path]:
    """Write a folder with rows and configuration for every client of a simulation.

    Args:
        folder: Created, with one folder per client inside.
        rows: All clients' rows.
        run: The recipe; device and threads are copied.
        model: The clients' copy of the base model, if they have one.
        state: The folder in which a client keeps its state, by its name.

    Returns:
        The paths of the configurations, by client name.
    """
    paths: dict[str, Path] = {}
    data: dict[str, Any] = {"path": "train.jsonl", "eval_path": "eval.jsonl"}
    some = next((row for own in rows.values() for row in own.train), ())
    if isinstance(some, dict) and "text_pair" in some:
        data |= {"text": "text", "text_pair": "text_pair"}
    if run.task == "text":
        data |= {"text": TEXT}
    if run.data.validation_fraction > 0:  # the rows that are scored are in the eval file
        data["validation_fraction"] = 0.0
    if run.data.template not in TEMPLATES:  # template text, which the clients agree to
        data["template"] = run.data.template
    for name, own in sorted(rows.items()):
        place = folder / folder_name(name)
        make_folder(place)
        for part, part_rows in (("train", own.train), ("eval", own.scored)):
            lines = [_line(row) for row in part_rows]
            write_atomically(place / f"{part}.jsonl", "".join(lines).encode())
        table: dict[str, Any] = {
            "name": name,
            "named_by_rows": True,
            "state": str(state(name).absolute()),
            "data": data,
            "runtime": {
                "device": run.runtime.device,
                "threads": run.runtime.threads,
                "turn": str(folder / "turn"),
            },
        }
        if model is not None:
            table["model"] = model
        if name in run.adapter.ranks:
            table["limits"] = {"rank": run.adapter.ranks[name]}
        paths[name] = place / "client.toml"
        write_atomically(paths[name], tomli_w.dumps(table).encode())
    return paths
