"""A client's own configuration: where its rows are, and what it agrees to.

`client_recipe.py` says what that makes of a recipe.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from silotune.core.errors import ConfigError
from silotune.core.processors import usable_threads
from silotune.core.toml_file import read_table
from silotune.core.types import Config
from silotune.data.chat_templates import TEMPLATES
from silotune.data.config import DataConfig
from silotune.federation.own_sums import OwnSumsConfig
from silotune.federation.roster import check_client_name, is_consortium
from silotune.models.quantization import Quantization


class LimitsConfig(Config):
    """What a client agrees to. The client refuses a recipe that asks for more."""

    columns: tuple[str, ...] | None = None
    """Columns of the rows that a recipe may use. Nothing else is read from the rows, and a recipe
    that names another column is refused. Columns that this client's own [data] names need not be
    listed. Absent: all."""
    tasks: tuple[Literal["instruct", "classify", "text", "prefer"], ...] | None = None
    """Tasks that this client accepts."""
    min_count: int | None = Field(default=None, ge=1)
    """Smallest number of rows that anything sent may be about. A client with fewer training rows
    takes no part, and a score that is about fewer rows, or counts fewer of one kind, is not sent.
    Rows are then counted before anything looks into them, and errors do not say what is wrong with
    them. It guards against small counts in honest reports; only epsilon limits what a server can
    work out from sums over many rows."""
    max_steps: int | None = Field(default=None, ge=1)
    """Maximum number of forward passes for training in one round: optimizer steps times
    train.accumulation. A batch with more rows than this client has counts as several."""
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
    rank: int | None = Field(default=None, ge=1)
    """Highest rank of LoRA factors that this client trains. With an algorithm that accepts mixed
    ranks (hetlora, flexlora, flora) it then trains at this rank; other recipes of a higher rank are
    refused. Memory for what such an algorithm keeps beside the adapter comes on top."""
    functions: tuple[str, ...] = ()
    """Functions that a recipe may name as train.loss and evaluate.metric, such as
    "python:my_package.my_module:my_loss". They are code of the server's choice, and a metric can
    return anything that it works out from a row's loss. Absent: none."""
    versions: tuple[str, ...] | None = None
    """Versions of silotune that the server may have, such as "0.4.1", or "0.4" for all that begin
    with it. A server can lie about it: this guards against mistakes only."""
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


class RunsConfig(Config):
    """Which runs of the server this client takes part in, within its limits."""

    approve: Literal["all", "ask", "listed"] = "all"
    """all: every run. ask: a run waits until `silotune client approve` has shown what it asks for
    and somebody agreed; a changed recipe asks again. listed: only runs of the recipes in
    runs.recipes."""
    recipes: tuple[str, ...] = ()
    """With approve = "listed": shipped recipes by name, TOML files relative to this one, or the
    SHA-256 that `silotune server submit` and `silotune client approve` show. A recipe counts as
    this client knows it: the server cannot give another one the same name."""

    @model_validator(mode="after")
    def _check_pair(self) -> "RunsConfig":
        if (self.approve == "listed") != bool(self.recipes):
            raise ValueError('approve = "listed" and recipes belong together: give both')
        return self


class OwnRuntimeConfig(Config):
    """How this client uses its own machine."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: the first of cuda, mps and cpu that is available."""
    threads: int = Field(default_factory=usable_threads, ge=1, le=1024)
    """Number of CPU threads."""
    client_processes: int = Field(default=1, ge=1, le=64)
    """How many processes train, each with a copy of the base and its share of every step's rows:
    one for each GPU. On processors, `threads` are divided among them. Not with privacy.unit =
    "record"."""
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

    named_by_rows: bool = False
    """The name comes from a column of the rows, so it can be any text. Set for the clients of a
    simulation; people who write a name have no use for it."""
    name: str = Field(min_length=1)
    """Name of this client in rounds and reports: printable, without blanks at its ends, and with at
    least one letter or digit."""
    state: str = "state"
    """Folder in which this client keeps its memory between rounds and the worker's log."""
    model: str | None = None
    """Folder of this client's own copy of the base model."""
    data: DataConfig
    limits: LimitsConfig = LimitsConfig()
    secure_sum: OwnSumsConfig = OwnSumsConfig()
    runs: RunsConfig = RunsConfig()
    runtime: OwnRuntimeConfig = Field(default_factory=OwnRuntimeConfig)

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str, info: ValidationInfo) -> str:
        return name if info.data.get("named_by_rows") else check_client_name(name)


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
