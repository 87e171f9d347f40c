"""The recipe: RunConfig, gathered from the configs of the parts; TOML in and out.

A field is the only home of its default, its help text and its range. This file loads no model and
no data.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from importlib import resources
from pathlib import Path
from typing import Any, Literal, cast

import tomli_w
from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    field_validator,
)

from silotune.adapters import PROMPT_KINDS, AdapterConfig
from silotune.algorithm_config import (
    ALGORITHM_CONFIGS,
    FLOWER,
    FLOWER_EXAMPLE,
    AnyAlgorithmConfig,
    FlowerStrategyConfig,
    chosen_algorithm,
)
from silotune.algorithms import ALGORITHMS
from silotune.algorithms.base import AlgorithmConfig
from silotune.budget import BudgetConfig, PlanConfig
from silotune.errors import ConfigError
from silotune.evaluate import EvaluateConfig
from silotune.grid import SweepConfig
from silotune.models import ModelConfig
from silotune.partition import PartitionConfig
from silotune.privacy.base import PrivacyConfig
from silotune.reading import DataConfig
from silotune.rows import did_you_mean
from silotune.sampling import SamplingConfig
from silotune.server import DistillConfig, ServerConfig
from silotune.templates import TEMPLATES
from silotune.tracks import TrackName
from silotune.train import TrainConfig
from silotune.types import Config


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


class RunConfig(Config):
    """A recipe: everything that decides what a run computes."""

    seed: int = Field(default=17, ge=0)
    """Every random draw of a run derives from it, by name."""
    rounds: int = Field(ge=1)
    """Rounds of training and aggregation."""
    task: Literal["instruct", "classify"] = "instruct"
    """instruct: answer as the rows do. classify: give a text one of several labels."""
    track: TrackName | None = None
    """Keep to the rules of this track of the FlowerTune LLM leaderboard: its data set, its number
    of clients, its ceiling for communication."""
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig
    partition: PartitionConfig | None = None
    sampling: SamplingConfig = SamplingConfig()
    train: TrainConfig = TrainConfig()
    algorithm: AnyAlgorithmConfig = Field(default_factory=lambda: ALGORITHM_CONFIGS["fedavg"]())
    privacy: PrivacyConfig = PrivacyConfig()
    server: ServerConfig = ServerConfig()
    distill: DistillConfig = DistillConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)
    budget: BudgetConfig = BudgetConfig()
    plan: PlanConfig = PlanConfig()
    report: ReportConfig = ReportConfig()
    compare: CompareConfig = CompareConfig()
    sweep: SweepConfig = SweepConfig()

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Every pair (key, why it cannot be) that no single section can see."""
        if self.checkpoint.keep == "best" and self.evaluate.every == 0:
            yield "checkpoint.keep", "'best' needs held-out losses, but evaluate.every is 0"
        yield from self.runtime.contradictions()
        if self.plan.measure and self.runtime.name == "flower":
            yield (
                "plan.measure",
                "cannot be used with runtime.name = 'flower': the server has no rows to take a "
                "step on, and the clients' machines are not its own",
            )
        yield from self._of_the_task()
        yield from self._of_the_server()
        if "no-end-token" in self.train.compat and TEMPLATES.get(self.data.template) is None:
            own = ", ".join(name for name, text in TEMPLATES.items() if text is not None)
            yield "train.compat", f"'no-end-token' needs data.template to be one of: {own}"
        arms = [self.algorithm, *self.compare.algorithms]
        if any(arm in arms[:i] for i, arm in enumerate(arms)):
            yield "compare.algorithms", "names an algorithm twice, or the recipe's own again"
        yield from self._of_the_adapter()
        yield from self._of_privacy()

    def _of_privacy(self) -> Iterator[tuple[str, str]]:
        """What would make [privacy] mean less than it says."""
        cfg, own = self.privacy, type(self.privacy).model_fields
        if cfg.unit == "none":
            given = [key for key in own if getattr(cfg, key) != own[key].default]
            yield from (
                (f"privacy.{key}", 'has an effect with unit = "client" or "record" only')
                for key in given
            )
            return
        if (cfg.noise_multiplier is None) == (cfg.target_epsilon is None):
            yield "privacy.noise_multiplier", "or target_epsilon: give one of both"
        if cfg.delta is None:
            yield "privacy.delta", f"is missing: give one well below 1 by the number of {cfg.unit}s"
        if cfg.clipping == "fixed":
            adaptive = [k for k in ("quantile", "clip_lr") if getattr(cfg, k) != own[k].default]
            yield from (
                (f"privacy.{k}", 'has an effect with clipping = "adaptive"') for k in adaptive
            )
        if self.checkpoint.keep == "best":
            yield "checkpoint.keep", "'best' chooses by held-out losses, which have no noise"
        if self.runtime.name == "flower":
            if self.evaluate.every > 0:
                yield (
                    "evaluate.every",
                    "with [privacy] and runtime.name = 'flower' must be 0: real clients keep their "
                    "losses, which have no noise",
                )
            if cfg.noise == "seeded":
                yield (
                    "privacy.noise",
                    "'seeded' is for simulations: real clients would be protected by nothing",
                )
        if cfg.unit == "record":
            yield from self._of_records()
        if cfg.is_at_client:
            yield from self._of_own_noise()
        else:
            yield from self._of_noise_at_the_server()

    def _of_records(self) -> Iterator[tuple[str, str]]:
        """What would make the protection of rows mean less, or cannot give a row's gradient."""
        if self.privacy.noise_at != "server":
            yield "privacy.noise_at", 'has an effect with unit = "client" only: rows always have it'
        if self.train.packing:
            yield (
                "train.packing",
                "puts rows into one, and privacy.unit = 'record' has to tell them apart",
            )
        if "same-samples" in self.train.compat:
            yield "train.compat", "'same-samples' would end the secret draw of rows"
        if self.model.gradient_checkpointing:
            yield (
                "model.gradient_checkpointing",
                "hides the gradients of single rows that privacy.unit = 'record' needs",
            )
        if self.adapter.kind != "lora" or self.adapter.dora:
            kind = "dora" if self.adapter.kind == "lora" else f"kind = '{self.adapter.kind}'"
            yield (
                "adapter.kind",
                f"with privacy.unit = 'record' must be 'lora' without dora: {kind} gives no "
                "gradients of single rows",
            )

    def _of_own_noise(self) -> Iterator[tuple[str, str]]:
        """What only a server that adds the noise can do."""
        if self.privacy.clipping == "adaptive":
            yield (
                "privacy.clipping",
                "'adaptive' has an effect with noise at the server only, which knows the norms",
            )

    def _of_noise_at_the_server(self) -> Iterator[tuple[str, str]]:
        """What would make the protection of clients mean less."""
        if self.privacy.max_participations is not None:
            yield "privacy.max_participations", "has an effect with noise at the client only"
        arms = {"algorithm": self.algorithm}
        arms |= {f"compare.algorithms.{i}": arm for i, arm in enumerate(self.compare.algorithms)}
        for where, arm in arms.items():
            if isinstance(arm, FlowerStrategyConfig):
                yield where, "a Flower strategy cannot be private here: what it releases is unknown"
            elif arm.weights != "uniform":
                yield (
                    f"{where}.weights",
                    "with [privacy] must be 'uniform': a weight by rows would let a large client "
                    "move the mean by more than the noise covers",
                )

    def _of_the_adapter(self) -> Iterator[tuple[str, str]]:
        """What cannot be trained on such a base, or for such a task."""
        kind, model = self.adapter.kind, self.model
        if kind == "full" and model.dtype in ("float16", "bfloat16"):
            yield (
                "model.dtype",
                f"'{model.dtype}' cannot hold the small steps of full training; use float32",
            )
        if kind == "full" and model.quantization != "none":
            yield (
                "model.quantization",
                "and adapter.kind = 'full' exclude each other: quantised weights cannot learn",
            )
        arms = (self.algorithm, *self.compare.algorithms)
        for name in dict.fromkeys(chosen_algorithm(arm) for arm in arms if arm.needs_lora):
            if kind != "lora":
                why = f"with algorithm '{name}', which works on LoRA's two factors; use lora"
                yield "adapter.kind", f"'{kind}' cannot be used {why}"
            elif self.adapter.dora:
                why = "what DoRA makes of the factors is not linear in them, so means are not exact"
                yield "adapter.dora", f"cannot be used with algorithm '{name}': {why}"
        if kind in PROMPT_KINDS and self.task == "classify":
            yield "adapter.kind", f"'{kind}' works with task = \"instruct\" only"
        if kind in PROMPT_KINDS and self.server.work == "distill":
            yield "adapter.kind", f"'{kind}' cannot learn from a teacher; use lora, ia3 or full"
        if kind in PROMPT_KINDS and self.train.packing:
            yield "train.packing", f"cannot be used with adapter.kind = '{kind}'"
        if kind == "prefix" and model.gradient_checkpointing:
            yield (
                "model.gradient_checkpointing",
                "cannot be used with adapter.kind = 'prefix', which needs the cache it drops",
            )

    def _of_the_task(self) -> Iterator[tuple[str, str]]:
        """Keys that only one of the tasks knows."""
        other = {
            "instruct": (
                ("adapter", "head"),
                ("data", "labels"),
                ("data", "text"),
                ("data", "text_pair"),
            ),
            "classify": (
                ("data", "prompt"),
                ("data", "completion"),
                ("data", "system"),
                ("data", "template"),
                ("train", "packing"),
                ("compare", "max_new_tokens"),
            ),
        }
        for section, key in other[self.task]:
            part: BaseModel = getattr(self, section)
            if getattr(part, key) != type(part).model_fields[key].default:
                its = next(task for task in other if task != self.task)
                yield f"{section}.{key}", f'has an effect with task = "{its}" only'

    def _of_the_server(self) -> Iterator[tuple[str, str]]:
        """What the server needs for its own training."""
        server, distill = self.server, self.distill
        if server.data_path is not None and server.data_fraction > 0:
            yield "server.data_path", "and data_fraction exclude each other; give one"
        if server.data_path is not None and server.data_path in (
            self.data.path,
            self.data.eval_path,
        ):
            yield "server.data_path", "names the clients' rows; the server's have to be its own"
        has_rows = server.data_path is not None or server.data_fraction > 0
        if server.work != "none" and not has_rows:
            yield (
                "server.work",
                f"'{server.work}' needs rows of the server's own: set server.data_fraction or "
                "server.data_path",
            )
        if server.work == "distill" and distill.teacher is None:
            yield "distill.teacher", "is missing: name a larger model with the same tokenizer"
        if server.work != "none" and self.adapter.head == "local":
            yield "adapter.head", "'local' leaves the server without a head to train with"


# --- reading ---------------------------------------------------------------------------------


def shipped_recipes() -> dict[str, Path]:
    """The recipes in the package, by name."""
    folder = Path(str(resources.files("silotune") / "recipes"))
    return {p.stem: p for p in sorted(folder.glob("*.toml"), key=lambda p: p.stem)}


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe and apply `key=value` overrides.

    Args:
        recipe: A shipped name, or the path of a TOML file.
        overrides: Dotted keys, for instance "train.lr=5e-4". A value is read as TOML, and as text
            where it is none; `none` takes a key out.

    Raises:
        ConfigError: All mistakes together, each with its key and its mend.
    """
    path = _find(recipe)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: not valid TOML: {error}.\n"
            '  Mend the line. A recipe holds lines such as: rounds = 3, or data.path = "rows.csv".'
        ) from error
    problems: list[str] = []
    for override in overrides:
        problem = _apply(table, override)
        if problem:
            problems.append(problem)
    return parse(table, name=path.stem, problems=problems)


def with_overrides(run: RunConfig, overrides: Sequence[str], *, name: str = "recipe") -> RunConfig:
    """A recipe with other values at some keys, checked like one that is read.

    Args:
        run: The recipe.
        overrides: As in `load_recipe`. Another algorithm begins with its own defaults.
        name: What an error calls the recipe.

    Raises:
        ConfigError: All mistakes together.
    """
    table = tomllib.loads(to_toml(run))
    problems = [problem for text in overrides if (problem := _apply(table, text))]
    if chosen_algorithm(table["algorithm"]) != chosen_algorithm(run.algorithm):
        table["algorithm"] = {}
        for text in overrides:
            if text.strip().startswith("algorithm."):
                _apply(table, text)
    return parse(table, name=name, problems=problems)


def _find(recipe: str | Path) -> Path:
    shipped = shipped_recipes()
    if str(recipe) in shipped:
        return shipped[str(recipe)]
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    beside = sorted(p.name for p in path.parent.glob("*.toml"))
    near = did_you_mean(path.name, [*shipped, *beside])
    raise ConfigError(
        f"recipe '{recipe}': no such file and no shipped recipe.{near}\n"
        f"  Give the path of a TOML file, or a shipped name: {', '.join(shipped)}."
    )


def _apply(table: dict[str, Any], override: str) -> str | None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(part.strip() for part in key.split(".")):
        return f"override '{override}': write key=value, for instance train.lr=5e-4"
    *sections, last = key.split(".")
    here = table
    for section in sections:
        inner = here.setdefault(section, {})
        if not isinstance(inner, dict):
            return f"override '{key}': '{section}' is a value, not a section"
        here = cast(dict[str, Any], inner)
    if text.strip() == "none":
        here.pop(last, None)
    else:
        here[last] = _value(text.strip())
    return None


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def parse(
    table: Mapping[str, Any], *, name: str = "recipe", problems: Sequence[str] = ()
) -> RunConfig:
    """Check a recipe's table. `problems` found before are reported with the others.

    Raises:
        ConfigError: All mistakes together.
    """
    found, bad, rest = list(problems), set[tuple[str, ...]](), _copy(table)
    # What is wrong is taken out and the rest is read again: a wrong type in a section would
    # otherwise hide the contradictions of that section, and those of the whole recipe.
    while True:
        before = _copy(rest)
        try:
            config = RunConfig.model_validate(rest)
            break
        except ValidationError as error:
            for item in error.errors():
                where = _where(item["loc"])
                if not _follows_from(item, where, bad):
                    found.append(_explain(where, item, table))
                bad |= {where, _meant(where, item, table)}
                _take_out(rest, where)
            assert rest != before, "a required field has no stand-in"
    keys = {".".join(where) for where in bad}
    found += [f"{key}: {why}" for key, why in config.contradictions() if key not in keys]
    if found:
        count = "1 mistake" if len(found) == 1 else f"{len(found)} mistakes"
        raise ConfigError("\n  ".join([f"{count} in recipe '{name}':", *found]))
    return config


def _meant(where: tuple[str, ...], item: Any, table: Mapping[str, Any]) -> tuple[str, ...]:
    """The key that a misspelt one most likely stands for; it is missing, so it is suspect too."""
    if item["type"] != "extra_forbidden":
        return where
    near = nearest_key(".".join(where), chosen_algorithm(table.get("algorithm", {})))
    return tuple(near.split(".")) if near else where


def _follows_from(item: Any, where: tuple[str, ...], bad: Collection[tuple[str, ...]]) -> bool:
    """Whether a mistake only shows because another key was taken out before."""
    names = {key[-1] for key in bad if key[:-1] == where}
    return item["type"] == "value_error" and any(
        re.search(rf"\b{name}\b", str(item["ctx"]["error"])) for name in names
    )


STAND_INS: dict[tuple[str, ...], Any] = {
    ("rounds",): 1,
    ("data",): {"path": "medquad_mini"},
    ("data", "path"): "medquad_mini",
}
"""What a recipe must have, where reading has to go on without it."""


def _take_out(table: dict[str, Any], where: tuple[str, ...]) -> None:
    """Remove a key, or the list that a wrong item stands in; put in what a recipe must have."""
    here = table
    for depth, part in enumerate(where, start=1):
        inner = here.get(part)
        if depth == len(where) or not isinstance(inner, dict):
            here.pop(part, None)
            if where[:depth] in STAND_INS:
                here[part] = deepcopy(STAND_INS[where[:depth]])
            return
        here = cast(dict[str, Any], inner)


def _where(loc: Sequence[int | str]) -> tuple[str, ...]:
    """A pydantic location as a recipe's key: without the tag of a chosen algorithm."""
    parts = [str(part) for part in loc]
    tag = {"algorithm": 1, "compare": 3}.get(parts[0])  # compare.algorithms.0.<tag>
    if tag is not None and len(parts) > tag and parts[tag] in ALGORITHM_CONFIGS:
        del parts[tag]
    return tuple(parts)


LISTS = {
    "": '["one", "two"]',
    "adapter.targets": '["q_proj", "v_proj"]',
    "compare.algorithms": '["fedprox"]',
    "sweep.keys": '["train.lr=1e-4,1e-3"]',
    "sweep.runs": '["train.lr=1e-3 adapter.rank=8"]',
}
"""Examples of lists, by key."""


def _explain(where: tuple[str, ...], item: Any, table: Mapping[str, Any]) -> str:
    key = ".".join(where)
    match item["type"]:
        case "extra_forbidden":
            chosen = chosen_algorithm(table.get("algorithm", {}))
            others = [n for n, cfg in ALGORITHM_CONFIGS.items() if where[-1] in cfg.model_fields]
            if where[0] == "algorithm" and chosen == FLOWER:
                near = did_you_mean(where[-1], FlowerStrategyConfig.model_fields)
                return f"{key}: unknown key.{near} The strategy's are in algorithm.options."
            if where[0] == "algorithm" and others:
                return f"{key}: is a key of {', '.join(others)}, not of {chosen}."
            near = nearest_key(key, chosen)
            return f"{key}: unknown key." + (f" Did you mean {near}?" if near else "")
        case "missing":
            return f"{key}: is missing."
        case "union_tag_invalid":
            section = item["input"]
            if not isinstance(section, dict):
                return f"{key}: is a section. Name the algorithm with {key}.name."
            chosen = chosen_algorithm(cast(dict[str, Any], section))
            return (
                f"{key}.name: there is no algorithm '{chosen}'.{did_you_mean(chosen, ALGORITHMS)} "
                f"There are: {', '.join(ALGORITHM_CONFIGS)}."
                + (f" {FLOWER_EXAMPLE}" if re.match("flower|flwr", chosen.lower()) else "")
            )
        case "string_pattern_mismatch":
            return f"{key}: is not the path of a class. {FLOWER_EXAMPLE}"
        case "model_type" | "dict_type":
            return f"{key}: is a section; set single keys of it, as in {key}.key = value."
        case "tuple_type":
            return f"{key}: should be a list, for instance {LISTS.get(key, LISTS[''])}."
        case "value_error":
            return f"{key}: {item['ctx']['error']}."
        case _:
            given = item["input"]
            shown = f", got {given!r}" if isinstance(given, (str, int, float, bool)) else ""
            return f"{key}: {item['msg'].replace('Input should', 'should')}{shown}."


def _copy(table: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: _copy(cast(Mapping[str, Any], v)) if isinstance(v, Mapping) else v
        for k, v in table.items()
    }


def nearest_key(key: str, algorithm: str) -> str | None:
    """The known key that a mistyped one most likely means; a dotted one for a dotted one."""
    keys, last = list(known_keys(algorithm)), key.rsplit(".", 1)[-1]
    if elsewhere := [k for k in keys if k.rsplit(".", 1)[-1] == last]:  # in the wrong section
        return difflib.get_close_matches(key, elsewhere, n=1, cutoff=0)[0]
    known = [k for k in keys if ("." in k) == ("." in key)]
    if close := difflib.get_close_matches(key, known, n=1, cutoff=0.75):
        return close[0]
    by_last = {k.rsplit(".", 1)[-1]: k for k in reversed(keys)}
    close = difflib.get_close_matches(last, by_last, n=1, cutoff=0.75)
    return by_last[close[0]] if close else None


def known_keys(algorithm: str = "fedavg") -> Iterator[str]:
    """Every key that a recipe with this algorithm may hold, dotted."""
    for name, cls in sections(algorithm).items():
        yield from (f"{name}.{key}" for key in cls.model_fields)
    yield from ("seed", "rounds", "task", "track", *sections(algorithm))


def sections(algorithm: str = "fedavg") -> dict[str, type[BaseModel]]:
    """The tables of a recipe and the models that describe them."""
    return {
        "model": ModelConfig,
        "adapter": AdapterConfig,
        "data": DataConfig,
        "partition": PartitionConfig,
        "sampling": SamplingConfig,
        "train": TrainConfig,
        "server": ServerConfig,
        "distill": DistillConfig,
        "algorithm": ALGORITHM_CONFIGS.get(algorithm, AlgorithmConfig),
        "privacy": PrivacyConfig,
        "evaluate": EvaluateConfig,
        "checkpoint": CheckpointConfig,
        "runtime": RuntimeConfig,
        "budget": BudgetConfig,
        "plan": PlanConfig,
        "report": ReportConfig,
        "compare": CompareConfig,
        "sweep": SweepConfig,
    }


# --- writing ---------------------------------------------------------------------------------


def to_toml(run: RunConfig) -> str:
    """The resolved recipe: every value spelt out; `parse` of it gives an equal RunConfig."""
    return tomli_w.dumps(run.model_dump(mode="json", exclude_none=True, serialize_as_any=True))
