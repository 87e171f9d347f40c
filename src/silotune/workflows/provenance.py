"""What a run depends on: base, rows, device and versions, recorded once, compared on resume."""

import hashlib
import importlib.metadata
import importlib.util
import json
import platform
from pathlib import Path
from typing import Any

from silotune.core.errors import RunFolderError
from silotune.data.clients import fingerprint
from silotune.data.files import locate
from silotune.data.row_draws import RULE as HELD_OUT_RULE
from silotune.federation.recipe_origin import origin_of
from silotune.federation.roster import is_consortium
from silotune.federation.run_folder import RunFolder
from silotune.federation.server_scores import server_test_rows
from silotune.models.base import folder_of_base
from silotune.models.base_files import commit_of, public_name
from silotune.models.loading import LoadedModel
from silotune.models.sources import SOURCES, content_hash
from silotune.models.start import hash_of_start
from silotune.recipes.schema import RunConfig
from silotune.workflows.check import Checked

LIBRARIES = ("silotune", "torch", "transformers", "peft", "tokenizers", "safetensors", "datasets")


def provenance_of(folder: RunFolder, checked: Checked, loaded: LoadedModel) -> dict[str, Any]:
    """Record what the run depends on; a resumed run must depend on the same."""
    run = checked.run
    source = SOURCES.get(run.model.name)
    text = (folder.path / folder.RECIPE).read_text(encoding="utf-8")
    recipe, day = origin_of(text) or (None, None)
    now = {
        "run": str(folder.path),
        "recipe": recipe,
        "date": day,
        "base": {
            "name": run.model.name,
            "description": source.what if source else public_name(run.model.name),
            "sha256": content_hash(folder_of_base(run.model)),
            "revision": run.model.revision,
            "commit": commit_of(run.model.name, run.model.revision),
        },
        "data": {
            "path": run.data.path,
            "sha256": _fingerprint(checked),
            "held_out": HELD_OUT_RULE,
        },
        **({"start": _of_the_start(run.adapter.start)} if run.adapter.start else {}),
        **_of_the_servers_test(run),
        **({"algorithm": checked.chosen} if checked.chosen else {}),
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "quantization": loaded.quantization,
        "threads": run.runtime.threads,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": {name: importlib.metadata.version(name) for name in _libraries(run)},
    }
    before = folder.read_json("provenance.json")
    if before is None:
        folder.write_json("provenance.json", now)
        return now
    check_same_rows(folder, checked)
    if before.get("server_test") != now.get("server_test"):
        raise RunFolderError(
            f"{folder.path}: the server's test set has changed since the run began, so its scores "
            "would not be comparable.\n"
            f"  Restore it ({run.evaluate.server_path}), or start a new run."
        )
    if before.get("start", {}).get("sha256") != now.get("start", {}).get("sha256"):
        raise RunFolderError(
            f"{folder.path}: the adapter that the run started from has changed since.\n"
            f"  Restore it ({run.adapter.start}), or start a new run."
        )
    if before["base"]["sha256"] != now["base"]["sha256"]:
        raise RunFolderError(
            f"{folder.path}: the base has changed since the run began.\n"
            f"  Restore it ({run.model.name}), or start a new run."
        )
    return before


def _of_the_start(start: str) -> dict[str, str]:
    """Where the first adapter is from, and its content."""
    return {"path": str(Path(start).expanduser().absolute()), "sha256": hash_of_start(start)}


def _of_the_servers_test(run: RunConfig) -> dict[str, Any]:
    """The hash of its rows; empty if there is none."""
    if not (rows := server_test_rows(run)):
        return {}
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    return {"server_test": {"num_rows": len(rows), "sha256": digest}}


def check_same_rows(folder: RunFolder, checked: Checked) -> None:
    """Refuse rows that are not split into train and held-out rows as when the run began.

    Raises:
        RunFolderError: They are not, because the data or the way of splitting has changed.
    """
    before = folder.read_json("provenance.json")["data"]
    if before["sha256"] == _fingerprint(checked):
        return
    if before.get("held_out") != HELD_OUT_RULE:
        raise RunFolderError(
            f"{folder.path}: the run began with another version of silotune, which chose the "
            "held-out rows in another way: they would mix with the train rows.\n"
            "  Use the version that the run began with, or start a new run."
        )
    raise RunFolderError(
        f"{folder.path}: the data has changed since the run began, so it is unknown which rows it "
        f"was trained on.\n  Restore it ({checked.run.data.path}), or start a new run."
    )


def _fingerprint(checked: Checked) -> str | None:
    """Of all rows; None in a consortium, whose members change and keep their rows."""
    place = locate(checked.run.data.path)
    return None if place and is_consortium(place) else fingerprint(checked.rows)


def _libraries(run: RunConfig) -> list[str]:
    """The libraries that the result may depend on."""
    quantised = run.model.quantization != "none" or "bit" in run.train.optimizer
    there = importlib.util.find_spec("bitsandbytes") is not None
    return [*LIBRARIES, *(["bitsandbytes"] if quantised and there else [])]


def file_sha256(adapter: Path) -> str:
    """SHA-256 over a result's safetensors files in name order; of one file as by `sha256sum`."""
    digest = hashlib.sha256()
    for path in sorted(adapter.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
