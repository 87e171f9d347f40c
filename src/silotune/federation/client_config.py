"""A client's own configuration: where its rows are, and what it agrees to. It overrides the recipe.

The server sends a recipe; this file decides what a real client does with it. A recipe cannot name
a path or a device on the client's machine, and cannot ask for more than the limits.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import Field, model_validator

from silotune.core.errors import ConfigError, Declined
from silotune.core.toml_file import read_table
from silotune.core.types import Config
from silotune.data.chat_templates import TEMPLATES
from silotune.data.clients import ClientRows, load_client
from silotune.data.reading import DataConfig, TaskRow
from silotune.federation.client_memory import folder_name
from silotune.federation.roster import is_consortium
from silotune.models.quantization import Quantization
from silotune.models.sources import SOURCES, is_hub_id
from silotune.privacy.base import PrivacyConfig
from silotune.recipes.contradictions import contradictions
from silotune.recipes.schema import RunConfig
from silotune.recipes.sections import RuntimeConfig, usable_threads

LOCATIONS = {"path", "eval_path", "eval_split", "name", "split", "revision"}
"""Keys of [data] that say where the rows are. A client never takes them from a recipe."""
CLIP_NORMS = (1e-9, 1e9)
"""Smallest and largest accepted value. float32 rounds much smaller values to zero, and sums of much
larger values are infinite: the norm would then bound nothing."""


class LimitsConfig(Config):
    """What a client agrees to. The client refuses a recipe that asks for more."""

    max_steps: int | None = Field(default=None, ge=1)
    """Maximum number of optimizer steps in one round."""
    max_rounds: int | None = Field(default=None, ge=1)
    """Maximum number of rounds in one run."""
    max_epochs: float | None = Field(default=None, gt=0)
    """Maximum number of passes over the training rows in one round."""
    max_hours: float | None = Field(default=None, gt=0)
    """Maximum hours of training in one run. Once they are used up, no new round begins."""
    max_bytes: int | None = Field(default=None, ge=1)
    """Maximum number of bytes that this client sends in one run. An answer that would exceed it is
    not sent. Everything that was sent is listed in outbound.jsonl in `state`."""
    models: tuple[str, ...] | None = None
    """Base models that this client may train, by the names that recipes use."""
    model_sha256: tuple[str, ...] | None = None
    """Base models that this client may train, by the SHA-256 of their content."""
    algorithms: tuple[str, ...] | None = None
    """Algorithms that this client accepts, by the names that recipes use."""
    epsilon: float | None = Field(default=None, gt=0)
    """Maximum epsilon of all runs on this client's rows together. The client then accepts only
    recipes with noise at the client. If a recipe's target is higher, this client adds more noise,
    and no round begins that would exceed the limit. The ledger is privacy.jsonl in `state`."""
    delta: float | None = Field(default=None, gt=0, lt=1)
    """The delta of that epsilon. It should be well below 1 divided by the number of rows."""

    @model_validator(mode="after")
    def _check_pair(self) -> "LimitsConfig":
        if (self.epsilon is None) != (self.delta is None):
            raise ValueError("epsilon and delta belong together: give both")
        return self


class OwnRuntimeConfig(Config):
    """How this client uses its own machine."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: the first of cuda, mps and cpu that is available."""
    threads: int = Field(default_factory=usable_threads, ge=1, le=1024)
    """Number of CPU threads."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Data type of the base model on this machine. Absent: the recipe's. Updates are always sent as
    float32."""
    quantization: Quantization | None = None
    """Quantization of the base model on this machine; "none" turns it off. Absent: the recipe's."""
    idle_s: float = Field(default=900, gt=0)
    """Seconds without a message after which the resident worker stops and frees its memory."""
    turn: str | None = None
    """Path of a lock file. Clients on one machine that name the same file train one at a time."""


class ClientConfig(Config):
    """One client, as described by the people who run it."""

    name: str = Field(min_length=1)
    """Name of this client in rounds and reports."""
    state: str = "state"
    """Folder in which this client keeps its memory between rounds and the worker's log."""
    model: str | None = None
    """Folder of this client's own copy of the base model."""
    data: DataConfig
    limits: LimitsConfig = LimitsConfig()
    runtime: OwnRuntimeConfig = Field(default_factory=OwnRuntimeConfig)


def load_client_config(path: Path) -> ClientConfig:
    """Read a client's TOML file. Paths in it are relative to its folder.

    Raises:
        ConfigError: Lists all mistakes together.
    """
    own = read_table(path, ClientConfig)
    from_here = {
        key: str(path.parent / value)
        for key in ("path", "eval_path", "template")
        if (value := getattr(own.data, key))
        # a template may be a name or the text itself
        and not (key == "template" and (value in TEMPLATES or "{" in value))
        and (path.parent / value).exists()
    }
    here: dict[str, Any] = {
        "data": own.data.model_copy(update=from_here),
        "state": str(path.parent / Path(own.state).expanduser()),
    }
    if own.model is not None:
        here["model"] = str(path.parent / Path(own.model).expanduser())
    if own.runtime.turn is not None:
        turn = str(path.parent / Path(own.runtime.turn).expanduser())
        here["runtime"] = own.runtime.model_copy(update={"turn": turn})
    return own.model_copy(update=here)


def is_client_folder(place: Path) -> bool:
    """Whether a folder holds client configurations rather than rows."""
    return place.is_dir() and not is_consortium(place) and any(place.glob("*.toml"))


def load_client_configs(folder: Path) -> dict[str, Path]:
    """Find the configurations in a folder, by client name.

    Raises:
        ConfigError: A file has mistakes, or two files give the same name.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.toml")):
        name = load_client_config(path).name
        if name in found:
            raise ConfigError(
                f"{path} and {found[name]} both name their client '{name}'.\n  Rename one of them."
            )
        found[name] = path.absolute()
    return dict(sorted(found.items()))


def own_recipe(run: RunConfig, own: ClientConfig) -> RunConfig:
    """The recipe as this client runs it: on its own rows and machine, within its limits.

    Raises:
        Declined: The recipe asks for something that this client does not allow. Names the keys.
    """
    refused: list[str] = []
    limits = own.limits
    if limits.models is not None and run.model.name not in limits.models:
        refused.append(f"model.name = '{run.model.name}' is not in limits.models")
    if limits.max_rounds is not None and run.rounds > limits.max_rounds:
        refused.append(f"rounds = {run.rounds} is above limits.max_rounds = {limits.max_rounds}")
    algorithm = getattr(run.algorithm, "name", "")
    if limits.algorithms is not None and algorithm not in limits.algorithms:
        refused.append(f"algorithm.name = '{algorithm}' is not in limits.algorithms")
    steps = run.train.local_steps
    if limits.max_steps is not None and steps is not None and steps > limits.max_steps:
        refused.append(f"train.local_steps = {steps} is above limits.max_steps")
    refused += _against_privacy(run, own)
    if own.model is None and not _is_public(run.model.name):
        refused.append("model.name is a path on the server; set model to this client's own copy")
    if run.adapter.kind == "full":
        if own.runtime.quantization not in (None, "none"):
            refused.append(
                f"runtime.quantization = '{own.runtime.quantization}' freezes the weights that "
                "adapter.kind = 'full' trains"
            )
        if own.runtime.dtype in ("float16", "bfloat16"):
            refused.append(
                f"runtime.dtype = '{own.runtime.dtype}' cannot represent the small steps of "
                "adapter.kind = 'full'"
            )
    if refused:
        why = "\n  ".join(refused)
        raise Declined(f"client '{own.name}' does not take part:\n  {why}")
    # nothing from the recipe: how the server waits for clients does not concern this process
    machine = RuntimeConfig(device=own.runtime.device, threads=own.runtime.threads)
    mine = {
        "name": own.model,
        "dtype": own.runtime.dtype,
        "quantization": own.runtime.quantization,
    }
    model = run.model.model_copy(update={k: v for k, v in mine.items() if v is not None})
    return run.model_copy(
        update={
            "model": model,
            "data": own_data(run, own),
            "partition": None,
            "privacy": _own_privacy(run.privacy, limits),
            "runtime": machine,
        }
    )


def _against_privacy(run: RunConfig, own: ClientConfig) -> Iterator[str]:
    """What is wrong with a recipe's privacy for this client. The server may not have checked it."""
    asked = run.privacy
    if asked.unit != "none":
        if asked.noise == "seeded":
            yield "privacy.noise = 'seeded' protects nobody: anyone with the recipe can subtract it"
        else:
            yield from (f"{key}: {why}" for key, why in contradictions(run))
        if not CLIP_NORMS[0] <= asked.clip_norm <= CLIP_NORMS[1]:
            yield (
                f"privacy.clip_norm = {asked.clip_norm:g} is outside the range that float32 can "
                "clip and add"
            )
        if run.data.template not in TEMPLATES and "template" not in own.data.model_fields_set:
            yield (
                "data.template is a program from the server that could reveal what rows say "
                "through their number; name a known template, or set one in this client's [data]"
            )
    if own.limits.epsilon is not None and not asked.is_at_client:
        yield (
            "limits.epsilon requires noise at this client: privacy.unit = 'record', or 'client' "
            "with noise_at = 'client'"
        )


def _own_privacy(asked: PrivacyConfig, limits: LimitsConfig) -> PrivacyConfig:
    """The recipe's privacy, with epsilon and delta lowered to what this client allows."""
    if limits.epsilon is None or limits.delta is None:
        return asked
    delta = limits.delta if asked.delta is None else min(asked.delta, limits.delta)
    target = asked.target_epsilon and min(asked.target_epsilon, limits.epsilon)
    return asked.model_copy(update={"delta": delta, "target_epsilon": target})


def _is_public(name: str) -> bool:
    """Whether a model's name means the same everywhere: a named source or a possible hub id."""
    hub_id = re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name) is not None
    return name in SOURCES or (hub_id and is_hub_id(name))


def check_steps(run: RunConfig, own: ClientConfig, num_train: int) -> None:
    """Refuse more steps or passes over the rows than this client allows.

    Unlike `own_recipe`, this needs the number of rows.

    Raises:
        Declined: Says how many the recipe asks for.
    """
    per_step, given = run.train.batch_size * run.train.accumulation, run.train.local_steps
    steps = given or math.ceil(num_train * (run.train.local_epochs or 1) / per_step)
    limits, refused = own.limits, ""
    if limits.max_steps is not None and steps > limits.max_steps:
        refused = f"{steps} steps in a round are above limits.max_steps = {limits.max_steps}"
    passes = given * per_step / num_train if given else run.train.local_epochs or 1
    if limits.max_epochs is not None and passes > limits.max_epochs:
        asked = f"train.local_steps = {given}" if given else f"train.local_epochs = {passes:g}"
        refused = (
            f"{asked} means more passes over these rows than "
            f"limits.max_epochs = {limits.max_epochs:g}"
        )
    if refused:
        raise Declined(f"client '{own.name}' does not take part:\n  {refused}")


def check_base(own: ClientConfig, sha256: str) -> None:
    """Refuse a base model whose content this client does not allow.

    Raises:
        Declined: Names the hash.
    """
    allowed = own.limits.model_sha256
    if allowed is not None and sha256 not in allowed:
        raise Declined(
            f"client '{own.name}' does not take part:\n"
            f"  the base model's SHA-256, {sha256}, is not in limits.model_sha256"
        )


def check_hours(own: ClientConfig, seconds: float) -> None:
    """Refuse a round once the hours that this client allows for a run are used up.

    Raises:
        Declined: Says how many hours are allowed.
    """
    limit = own.limits.max_hours
    if limit is not None and seconds >= limit * 3600:
        raise Declined(f"client '{own.name}': limits.max_hours = {limit:g} is used up in this run")


def own_data(run: RunConfig, own: ClientConfig) -> DataConfig:
    """This client's [data]: locations only from its own file, the format from it or the recipe."""
    format_ = {k: v for k, v in run.data.model_dump().items() if k not in LOCATIONS}
    if run.task != "classify":
        format_.pop("label")  # only the report of a simulation shows it
    mine = {k: getattr(own.data, k) for k in own.data.model_fields_set}
    if {"eval_path", "eval_split"} & mine.keys():
        format_.pop("eval_fraction")  # its held-out rows are already chosen
    return DataConfig.model_validate({**format_, **mine})


def own_rows(run: RunConfig, own: ClientConfig) -> ClientRows:
    """Read this client's rows and split them as its own configuration says."""
    return load_client(own_data(run, own), own.name, seed=run.seed, task=run.task)


def _line(row: TaskRow) -> str:
    columns = row if isinstance(row, dict) else {"messages": row}
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
    data = {"path": "train.jsonl", "eval_path": "eval.jsonl"}
    if run.data.template not in TEMPLATES:  # template text, which the clients agree to
        data["template"] = run.data.template
    for name, own in sorted(rows.items()):
        place = folder / folder_name(name)
        place.mkdir(parents=True)
        for part, part_rows in (("train", own.train), ("eval", own.evaluation)):
            lines = [_line(row) for row in part_rows]
            (place / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        table: dict[str, Any] = {
            "name": name,
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
        paths[name] = place / "client.toml"
        paths[name].write_text(tomli_w.dumps(table), encoding="utf-8")
    return paths
