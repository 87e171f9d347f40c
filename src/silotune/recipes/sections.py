"""Sections of a recipe that configure parts of higher rank than the recipe."""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import Field, field_validator, model_validator

from silotune.core.processors import usable_threads
from silotune.core.types import Config
from silotune.recipes.algorithm import AnyAlgorithmConfig


class BudgetConfig(Config):
    """Limits. The run ends before a round that would exceed one."""

    bytes: int | None = Field(default=None, ge=1)
    """Maximum size of all messages with tensors, in both directions, for all clients that answer.
    The last adapter below the limit is the result."""
    hours: float | None = Field(default=None, gt=0)
    """Maximum wall-clock hours of the entire run up to its last score. A resumed run continues
    counting; the time between its parts does not count. Checked before each round, based on the
    longest one so far, so the first round always runs; a round that has started is not
    interrupted."""


class StopConfig(Config):
    """When a run ends before its last round, because it no longer gets better."""

    patience: int | None = Field(default=None, ge=1)
    """End the run after this many scored rounds in a row without a lower validation loss. Clients'
    scores come with the answers of the next round, so one more round is trained. Needs
    checkpoint.keep = "best", and data.validation_fraction or evaluate.choose_by = "server". A
    comparison ignores it."""
    min_delta: float = Field(default=0.0, ge=0)
    """Smallest difference, in nats, by which a lower loss counts as lower."""


class PlanConfig(Config):
    """What is measured before the first round."""

    measure: bool = False
    """Train one step on the widest batch in a separate process, as `silotune plan` does; the report
    then shows predicted memory and time next to the actual ones. A comparison ignores it."""


class SamplingConfig(Config):
    """How many clients each round asks, and how many must answer."""

    fraction: float | None = Field(default=None, gt=0, le=1)
    """Share of all clients to ask in a round, rounded down, but at least one; all if neither this
    nor num_clients is given."""
    num_clients: int | None = Field(default=None, ge=1)
    """Number of clients to ask in a round, instead of `fraction`."""
    quorum: float = Field(default=0.5, gt=0, le=1)
    """Share of the cohort whose updates must be usable, rounded up; with fewer, the run stops."""
    max_norm_ratio: float = Field(default=100.0, gt=1)
    """An update is refused if the norm of its delta is more than this many times the median of the
    round's updates and larger than the adapter itself. With fewer than three updates: more than
    this many times the adapter's norm. Not used if the server clips ([privacy] unit = "client")."""
    timeout_s: float = Field(default=86400.0, gt=0)
    """Seconds a round may take, by default a day; clients that have not answered by then are
    reported and left out."""

    @model_validator(mode="after")
    def _one_of_both(self) -> "SamplingConfig":
        if self.num_clients is not None and self.fraction is not None:
            raise ValueError("give num_clients or fraction, not both")
        return self


class SweepConfig(Config):
    """What `silotune sweep` changes from run to run. A run ignores it."""

    keys: tuple[str, ...] = ()
    """Keys with the values to try, in all combinations, for example ["train.lr=1e-4,1e-3",
    "adapter.rank=4,8"]. With `search` also ranges: "train.lr=1e-5..1e-3,log"."""
    runs: tuple[str, ...] = ()
    """Instead of all combinations: the runs themselves, each with its keys, for example
    ["train.lr=1e-3 adapter.rank=8", "train.lr=1e-4 adapter.rank=16"]."""
    search: int = Field(default=0, ge=0)
    """Number of runs to train; Optuna chooses the values of each based on the earlier ones."""


class CheckpointConfig(Config):
    """Which rounds are saved and kept."""

    every: int = Field(default=1, ge=1)
    """Rounds between checkpoints; the last round is always saved. A resumed run starts from the
    newest."""
    keep: Literal["last", "best", "all"] = "last"
    """Which checkpoints to keep. best: the one with the lowest held-out loss, which becomes the
    result."""
    keep_updates: bool = False
    """Keep every update of every round in the run folder's updates/, for `silotune contribution`.
    Each is as large as the trained tensors. Simulations only."""


class FinishConfig(Config):
    """What each client does with the result by itself after the last round. Nothing is sent."""

    local_steps: int = Field(default=0, ge=0)
    """Optimizer steps that each client takes from the result, on its own train rows. The adapter
    that follows stays at the client: `ask`, `evaluate` and `export` use it with --client NAME.
    A comparison lets lone clients take as many. 0: none. Simulations only."""
    lr: float | None = Field(default=None, gt=0)
    """Learning rate of these steps; it does not fall. train.lr if absent."""
    interpolate: tuple[float, ...] = ()
    """Shares of the client's own steps, for example [0.0, 0.25, 0.5, 0.75, 1.0]. Each client uses
    the one with the lowest loss on its validation rows: every tensor is (1 - share) * result +
    share * own. Empty: all of the steps count."""

    @field_validator("interpolate")
    @classmethod
    def _are_shares(cls, given: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(given)) < len(given) or not all(0 <= share <= 1 for share in given):
            raise ValueError("should be different numbers from 0 to 1")
        return given


class RuntimeConfig(Config):
    """Where the clients run. What each runtime is for: docs/runtimes.md."""

    name: Literal["in-process", "flower-simulation", "flower"] = "in-process"
    """in-process: one after another in this process, sharing one base model. flower-simulation:
    Flower's engine on Ray, several processes or GPUs. flower: Flower's deployment engine, each
    client in its own processes."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto uses the first of cuda, mps and cpu that is available."""
    threads: int = Field(default_factory=usable_threads, ge=1, le=1024)
    """Processor threads of every process that trains; by default all that this process may use. To
    repeat a run exactly, use the same number."""
    together: Annotated[int, Field(ge=1, le=1024, strict=True)] | Literal["auto"] = 1
    """in-process: how many clients are trained in one batch on the frozen base, each with its own
    adapter and optimizer. Results differ from 1, which trains one after another, in the last bits
    only. auto: as many as pays off where a client's pass has few tokens, by a measured rule, or
    one after another where that cannot be done, with the reason."""
    client_processes: int = Field(default=1, ge=1, le=64)
    """in-process: how many processes train one client, each with a copy of the base and its share
    of every step's rows: one for each GPU. On processors, `threads` are divided among them. The
    result differs from that of one process in the last bits, and with adapter.dropout in the masks.
    A real client sets its own number in its client.toml."""
    client_cpus: int | None = Field(default=None, ge=1)
    """flower-simulation: processors that Ray reserves per running client; `threads` if absent."""
    client_gpus: float | None = Field(default=None, ge=0)
    """flower-simulation: GPUs per running client; 0.25 lets four share one. Absent: none."""
    ray_address: str | None = Field(default=None, min_length=1)
    """flower-simulation: an existing Ray cluster, for example 10.0.0.1:6379. All its machines must
    see the run folder, the data and the base model under the same paths."""
    host: str = "127.0.0.1"
    """flower: the server's address. So far only this machine's loopback addresses are allowed."""
    join_timeout_s: float = Field(default=180.0, gt=0)
    """flower and flower-simulation: seconds that the clients have to report at the start."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Every contradiction, as (key, reason)."""
        mine = {
            "in-process": ("together", "client_processes"),
            "flower-simulation": ("client_cpus", "client_gpus", "ray_address", "join_timeout_s"),
            "flower": ("host", "join_timeout_s"),
        }
        for key in sorted({key for keys in mine.values() for key in keys}):
            moved = getattr(self, key) != RuntimeConfig.model_fields[key].default
            if moved and key not in mine.get(self.name, ()):
                where = " or ".join(f"'{name}'" for name, keys in mine.items() if key in keys)
                yield f"runtime.{key}", f"only has an effect with runtime.name = {where}"
        if self.host not in ("127.0.0.1", "localhost", "::1"):
            yield (
                "runtime.host",
                f"'{self.host}' is refused: outside loopback, the engine's control interface would "
                "be open to everyone who can reach the port, and without TLS and client keys the "
                "adapters could be read and forged. Use 127.0.0.1",
            )
        if self.name == "flower-simulation" and self.device == "mps":
            yield "runtime.device", "'mps' cannot be shared by Ray's processes; use in-process"
        if self.client_gpus and self.device == "cpu":
            yield "runtime.client_gpus", "asks for GPUs that runtime.device = 'cpu' does not use"


class ReportConfig(Config):
    """What a run writes for people, besides its numbers."""

    page: bool = True
    """Write report.html at the end; `silotune report` can also write it later."""
    note: str | None = Field(default=None, min_length=1)
    """A sentence to show next to the figures wherever they appear, for example a limitation of the
    rows."""
    samples: int = Field(default=3, ge=0)
    """Number of held-out questions, one from each of the first clients, that base and result answer
    for the report. Simulations only: the server may not show a real client's rows."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Maximum length of these answers, in tokens."""
    tracker: Literal["none", "tensorboard", "wandb", "mlflow", "trackio"] = "none"
    """Also log every round to this tracker, through its own library, which must be installed."""


class CompareConfig(Config):
    """What `silotune compare` trains in addition to the recipe. A run ignores it."""

    seeds: int = Field(default=3, ge=1, le=1000)
    """Number of seeds with which each arm is trained, counting up from the recipe's. Verdicts need
    three."""
    tune: bool | dict[str, tuple[float, ...]] = True
    """What every arm tries on the validation rows, with a seed that is not used again, before it is
    compared. lr: learning rates, by default the arm's own, a third and three times it. server_lr:
    two server steps of the federated arms, by default the arm's own and a third of it, or three
    times it if it is at most 1. false: every arm is trained as its recipe says."""
    validation_fraction: float = Field(default=0.2, gt=0, lt=1)
    """What data.validation_fraction is in a comparison that tunes, if the recipe sets none."""
    every: int = Field(default=1, ge=1)
    """Rounds between two scores of the validation rows. Of the scored rounds, every arm's best one
    counts. Without validation rows, and with [privacy], it is the last."""
    group: str | None = Field(default=None, min_length=1)
    """A column: held-out rows with the same value, such as a disease, count as one row in the
    intervals."""
    centralized: bool = True
    """Also train on all rows in one place."""
    algorithms: tuple[AnyAlgorithmConfig, ...] = ()
    """More federated arms, by algorithm: names, or tables such as
    [{ name = "fedprox", mu = 0.1 }]."""
    arms: dict[str, dict[str, Any]] = Field(default={})
    """More federated arms by name, each with the sections that differ from the recipe, for example
    [compare.arms."all weights".adapter] kind = "full"."""
    history: bool = False
    """Also score the federated arms in the rounds of evaluate.every, not only at the end."""
    only: tuple[str, ...] = ()
    """Clients whose adapter, trained alone, is scored on all clients' rows, not only on its own."""
    max_new_tokens: int = Field(default=0, ge=0)
    """Answer every held-out question with at most this many tokens, and score the answers by ROUGE.
    0: no answers, only the loss."""

    @field_validator("tune", mode="before")
    @classmethod
    def _a_grid(cls, given: Any) -> Any:
        if isinstance(given, bool):
            return given
        keys = cast(dict[str, Any], given) if isinstance(given, dict) else {"": ()}
        for key, values in keys.items():
            if key not in ("lr", "server_lr"):
                raise ValueError("should be true, false, or lists of numbers for lr and server_lr")
            listed = cast(Sequence[Any], values) if isinstance(values, (list, tuple)) else ()
            numbers = {v for v in listed if type(v) in (int, float) and 0 < v < math.inf}
            if not numbers or len(numbers) < len(listed):
                raise ValueError(f"{key} should be different numbers above 0")
        if len(keys.get("server_lr", (1, 3))) != 2:
            raise ValueError(
                "server_lr should be two numbers: every other arm has two ways to train, and all "
                "arms get the same number of trials"
            )
        return keys or True

    @field_validator("algorithms", mode="before")
    @classmethod
    def _names_alone(cls, given: Any) -> Any:
        if not isinstance(given, (list, tuple)):
            return given
        arms = cast(Sequence[Any], given)
        return [{"name": arm} if isinstance(arm, str) else arm for arm in arms]
