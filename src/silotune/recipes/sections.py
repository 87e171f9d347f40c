"""Sections of a recipe whose parts are above the recipe."""

import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

from pydantic import Field, field_validator, model_validator

from silotune.core.types import Config
from silotune.recipes.algorithm import AnyAlgorithmConfig


class BudgetConfig(Config):
    """Ceilings. The run ends before the round that would go beyond one."""

    bytes: int | None = Field(default=None, ge=1)
    """Of all messages with tensors, both ways, of all clients that answer. The last adapter below
    the ceiling is the result."""
    hours: float | None = Field(default=None, gt=0)
    """Of the whole run until its last score, by the clock of its machine; a resumed run goes on
    counting, and the time between its parts does not count. Judged before each round by the longest
    one so far, so the first is always done; a round that has begun is not cut."""


class PlanConfig(Config):
    """What is found out before the first round."""

    measure: bool = False
    """Train one step on the widest batch in a process of its own, as `silotune plan` does; the
    report then shows predicted memory and time beside the actual ones. Runs only: a comparison
    takes no notice of it."""


class SamplingConfig(Config):
    """How many clients each round asks, and how many must deliver."""

    fraction: float | None = Field(default=None, gt=0, le=1)
    """Share of all clients that is asked in a round, rounded down, at least one; all when neither
    this nor num_clients is given."""
    num_clients: int | None = Field(default=None, ge=1)
    """Number of clients that is asked in a round, instead of `fraction`."""
    quorum: float = Field(default=0.5, gt=0, le=1)
    """Share of the cohort whose updates must be usable, rounded up; with fewer the run stops."""
    timeout_s: float = Field(default=86400.0, gt=0)
    """Seconds a round may take, by default a day; clients that have not delivered by then are named
    and left out."""

    @model_validator(mode="after")
    def _one_of_both(self) -> "SamplingConfig":
        if self.num_clients is not None and self.fraction is not None:
            raise ValueError("give num_clients or fraction, not both")
        return self


class SweepConfig(Config):
    """What `silotune sweep` changes from run to run. A run takes no notice of it."""

    keys: tuple[str, ...] = ()
    """Keys with their values, as in ["train.lr=1e-4,1e-3", "adapter.rank=4,8"]: all combinations.
    With `search` also ranges: "train.lr=1e-5..1e-3,log"."""
    runs: tuple[str, ...] = ()
    """Instead of all combinations the runs themselves, each with its keys, as in
    ["train.lr=1e-3 adapter.rank=8", "train.lr=1e-4 adapter.rank=16"]."""
    search: int = Field(default=0, ge=0)
    """Train so many runs, and let Optuna choose the values of each by what came before."""


class CheckpointConfig(Config):
    """What is kept of the rounds."""

    every: int = Field(default=1, ge=1)
    """Rounds between checkpoints; the last round always is one. A resumed run starts at the
    newest."""
    keep: Literal["last", "best", "all"] = "last"
    """Which checkpoints stay. best: the one with the lowest held-out loss, which becomes the
    result."""


def usable_threads() -> int:
    """Processors that this process may use, also where a container gives it fewer."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class RuntimeConfig(Config):
    """Where the clients run. What each runtime is for: docs/runtimes.md."""

    name: Literal["in-process", "flower-simulation", "flower"] = "in-process"
    """in-process: one after the other in this process, sharing one base model. flower-simulation:
    Flower's engine on Ray, several processes or GPUs. flower: Flower's deployment engine, each
    client in processes of its own."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes the first of cuda, mps and cpu that is there."""
    threads: int = Field(default_factory=usable_threads, ge=1)
    """Processor threads of every process that trains; by default all that this process may use.
    Part of what makes a run repeatable."""
    client_cpus: int | None = Field(default=None, ge=1)
    """flower-simulation: processors that Ray sets aside for one client at a time; `threads` when
    absent."""
    client_gpus: float | None = Field(default=None, ge=0)
    """flower-simulation: GPUs for one client at a time; 0.25 lets four share one. Absent: none."""
    ray_address: str | None = Field(default=None, min_length=1)
    """flower-simulation: an existing Ray cluster, for instance 10.0.0.1:6379. All its machines must
    see the run folder, the data and the base model under the same paths."""
    host: str = "127.0.0.1"
    """flower: where the server listens. Only this machine's loopback addresses yet."""
    join_timeout_s: float = Field(default=180.0, gt=0)
    """flower and flower-simulation: seconds in which the clients have to report at the start."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Every pair (key, why it cannot be)."""
        mine = {
            "flower-simulation": ("client_cpus", "client_gpus", "ray_address", "join_timeout_s"),
            "flower": ("host", "join_timeout_s"),
        }
        for key in ("client_cpus", "client_gpus", "ray_address", "host", "join_timeout_s"):
            moved = getattr(self, key) != RuntimeConfig.model_fields[key].default
            if moved and key not in mine.get(self.name, ()):
                where = " or ".join(f"'{name}'" for name, keys in mine.items() if key in keys)
                yield f"runtime.{key}", f"has an effect with runtime.name = {where} only"
        if self.host not in ("127.0.0.1", "localhost", "::1"):
            yield (
                "runtime.host",
                f"'{self.host}' is refused: beyond loopback the engine's control interface would "
                "be open to everyone who reaches the port, and without TLS and client keys the "
                "adapters could be read and forged. Use 127.0.0.1",
            )
        if self.name == "flower-simulation" and self.device == "mps":
            yield "runtime.device", "'mps' cannot be shared by Ray's processes; use in-process"
        if self.client_gpus and self.device == "cpu":
            yield "runtime.client_gpus", "asks for GPUs that runtime.device = 'cpu' does not use"


class ReportConfig(Config):
    """What a run writes for people, beside its numbers."""

    page: bool = True
    """Write report.html at the end; `silotune report` writes it later too."""
    note: str | None = Field(default=None, min_length=1)
    """A sentence that stands beside the figures wherever they are shown, for instance what the rows
    are not."""
    samples: int = Field(default=3, ge=0)
    """Held-out questions, one of each of the first clients, that base and result answer for the
    report. Simulations only: a real client's rows are not the server's to show."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Where these answers are cut."""
    tracker: Literal["none", "tensorboard", "wandb", "mlflow", "trackio"] = "none"
    """Also log every round to this tracker, through its own library, which has to be installed."""


class CompareConfig(Config):
    """What `silotune compare` trains beside the recipe. A run takes no notice of it."""

    seeds: int = Field(default=3, ge=1)
    """Each arm is trained with so many seeds, counted up from the recipe's."""
    algorithms: tuple[AnyAlgorithmConfig, ...] = ()
    """More federated arms beside the recipe's own: names, or as in
    [{ name = "fedprox", mu = 0.1 }]."""
    arms: dict[str, dict[str, Any]] = Field(default={})
    """Further federated arms by name, each with the sections that differ from the recipe, as in
    [compare.arms."all weights".adapter] kind = "full"."""
    history: bool = False
    """Score the federated arms in the rounds of evaluate.every too, not at the end alone."""
    only: tuple[str, ...] = ()
    """Clients whose lone adapter is scored on every client's rows, not on its own alone."""
    max_new_tokens: int = Field(default=0, ge=0)
    """Answer every held-out question and score the answers by ROUGE, cut at so many tokens. 0: no
    answers, the loss only."""

    @field_validator("algorithms", mode="before")
    @classmethod
    def _names_alone(cls, given: Any) -> Any:
        if not isinstance(given, (list, tuple)):
            return given
        arms = cast(Sequence[Any], given)
        return [{"name": arm} if isinstance(arm, str) else arm for arm in arms]
