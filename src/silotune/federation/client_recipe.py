"""A recipe as a real client runs it: on its own rows and machine, and within its limits.

The server sends a recipe, and the client's own configuration wins: a recipe cannot name a path or a
device on the client's machine, and cannot ask for more than the limits.
"""

import math
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from silotune.core.errors import Declined
from silotune.core.types import Config
from silotune.core.wording import counted
from silotune.data.chat_templates import TEMPLATES
from silotune.data.client_rows import ClientRows
from silotune.data.clients import load_client, load_client_quietly
from silotune.data.config import DataConfig
from silotune.federation.client_config import ClientConfig, LimitsConfig
from silotune.federation.consent import against_consent, allowed_columns, split_key
from silotune.federation.first_adapter import own_start
from silotune.federation.mixed_ranks import own_adapter
from silotune.models.sources import SOURCES, is_hub_id
from silotune.models.start import TOLD
from silotune.privacy.base import PrivacyConfig
from silotune.recipes.contradictions import MAX_ROWS_UNDER_PRIVACY, contradictions
from silotune.recipes.schema import RunConfig
from silotune.recipes.sections import (
    CompareConfig,
    PlanConfig,
    ReportConfig,
    RuntimeConfig,
    StopConfig,
    SweepConfig,
)
from silotune.recipes.secure_sums import of_secure_sums
from silotune.training.scoring import EvaluateConfig
from silotune.training.server_training import DistillConfig, ServerConfig

LOCATIONS = {"path", "eval_path", "eval_split", "name", "split", "revision"}
"""Keys of [data] that say where the rows are. A client never takes them from a recipe."""
REVISION = r"(\w[\w./-]*)?"
START = rf"({TOLD}[0-9a-f]{{64}})?"
MOST_BYTES = 200_000
"""Of a recipe. A client keeps the recipes that it was asked about."""
CLIP_NORMS = (1e-9, 1e9)
"""Smallest and largest accepted value. float32 rounds much smaller values to zero, and sums of much
larger values are infinite: the norm would then bound nothing."""
SECTIONS_OF_THE_SERVER: Mapping[str, Config] = {
    "server": ServerConfig(),
    "distill": DistillConfig(),
    "stop": StopConfig(),
    "plan": PlanConfig(),
    "report": ReportConfig(),
    "compare": CompareConfig(),
    "sweep": SweepConfig(),
}
"""Sections that clients neither need nor see, with nothing set: some of their keys name paths and
models, and they say what else a server tries."""


def read_recipe(text: str) -> RunConfig:
    """A recipe as the server sent it.

    Raises:
        Declined: It is longer than any recipe needs to be.
    """
    if (size := len(text.encode())) > MOST_BYTES:
        raise Declined(f"the recipe has {size} bytes, and a client reads {MOST_BYTES} at most")
    return RunConfig.model_validate_json(text)


def without_server(run: RunConfig) -> dict[str, Config]:
    """The sections that concern only the server, with nothing set; see SECTIONS_OF_THE_SERVER."""
    own = {key: EvaluateConfig.model_fields[key].default for key in ("server_path", "choose_by")}
    return {**SECTIONS_OF_THE_SERVER, "evaluate": run.evaluate.model_copy(update=own)}


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
    if algorithm.startswith("python:") and algorithm not in (limits.algorithms or ()):
        refused.append(
            f"algorithm.name = '{algorithm}' is code of the server's choice; this client runs it "
            "only if limits.algorithms names it"
        )
    for key, function in (("train.loss", run.train.loss), ("evaluate.metric", run.evaluate.metric)):
        if function is not None and function not in limits.functions:
            refused.append(
                f"{key} is code of the server's choice; this client runs it only if "
                "limits.functions names it"
            )
    steps, passes = run.train.local_steps, run.train.accumulation
    if limits.max_steps is not None and steps is not None and steps * passes > limits.max_steps:
        each = f", each of train.accumulation = {passes} forward passes," * (passes > 1)
        refused.append(f"train.local_steps = {steps}{each} is above limits.max_steps")
    try:
        adapter = own_start(run.adapter, own_adapter(run, limits.rank))
    except ValueError as error:
        adapter = run.adapter
        refused.append(str(error))
    refused += _against_privacy(run, own)
    refused += _against_sums(run, own)
    refused += against_consent(run, own.data, columns=limits.columns, tasks=limits.tasks)
    sets_it = "validation_fraction" in own.data.model_fields_set
    if sets_it and own.data.validation_fraction == 0 < run.data.validation_fraction:
        refused.append(
            "data.validation_fraction = 0 of this client: it would score its held-out rows, and "
            "the recipe makes choices by these scores; remove it"
        )
    if not re.fullmatch(START, run.adapter.start or ""):
        refused.append("adapter.start names a path; a client is told the hash of the first adapter")
    if own.model is None and not is_public(run.model.name):
        refused.append("model.name is a path on the server; set model to this client's own copy")
    revision = run.model.revision or ""
    if not re.fullmatch(REVISION, revision) or ".." in revision:
        refused.append("model.revision is not a branch, a tag or a commit")
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
    if run.privacy.unit == "record" and own.runtime.client_processes > 1:
        refused.append(
            "privacy.unit = 'record' needs one process; set runtime.client_processes = 1 of this "
            "client, or remove it"
        )
    if refused:
        why = "\n  ".join(refused)
        raise Declined(f"client '{own.name}' does not take part:\n  {why}")
    # nothing from the recipe: how the server waits for clients does not concern this process
    machine = RuntimeConfig(
        device=own.runtime.device,
        threads=own.runtime.threads,
        client_processes=own.runtime.client_processes,
    )
    mine = {
        "name": own.model,
        "dtype": own.runtime.dtype,
        "quantization": own.runtime.quantization,
    }
    model = run.model.model_copy(update={k: v for k, v in mine.items() if v is not None})
    return run.model_copy(
        update={
            "model": model,
            "adapter": adapter,
            "data": own_data(run, own),
            "partition": None,
            "privacy": _own_privacy(run.privacy, limits),
            "runtime": machine,
            **without_server(run),
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
        if asked.unit == "record" and own.data.max_rows is not None:
            yield f"data.max_rows of this client {MAX_ROWS_UNDER_PRIVACY}"
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


def _against_sums(run: RunConfig, own: ClientConfig) -> Iterator[str]:
    """What is wrong with a recipe's secure sums for this client."""
    if own.secure_sum.required and not run.secure_sum.is_on:
        yield "secure_sum.kind must be 'masks': this client requires it ([secure_sum] required)"
    if run.secure_sum.is_on:
        yield from (f"{key}: {why}" for key, why in of_secure_sums(run))


def is_public(name: str) -> bool:
    """Whether a model's name means the same everywhere: a named source or a possible hub id."""
    hub_id = re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name) is not None
    return name in SOURCES or (hub_id and is_hub_id(name))


def check_steps(run: RunConfig, own: ClientConfig, num_train: int) -> None:
    """Refuse more steps or passes over the rows than this client allows.

    Unlike `own_recipe`, this needs the number of rows.

    Raises:
        Declined: Says how many the recipe asks for.
    """
    size, accumulation = run.train.batch_size, run.train.accumulation
    per_step, given = size * accumulation, run.train.local_steps
    # a batch cannot hide work: whatever exceeds this client's rows counts as further batches
    forward = (
        given * accumulation * -(-size // num_train)
        if given
        else math.ceil(num_train * (run.train.local_epochs or 1) / size)
    )
    limits, refused = own.limits, ""
    if limits.max_steps is not None and forward > limits.max_steps:
        refused = (
            f"{counted(forward, 'forward pass', 'forward passes')} in a round are above "
            f"limits.max_steps = {limits.max_steps}"
        )
    passes = given * per_step / num_train if given else run.train.local_epochs or 1
    if limits.max_epochs is not None and passes > limits.max_epochs:
        asked = f"train.local_steps = {given}" if given else f"train.local_epochs = {passes:g}"
        refused = (
            f"{asked} means more passes over these rows than "
            f"limits.max_epochs = {limits.max_epochs:g}"
        )
    if refused:
        raise Declined(f"client '{own.name}' does not take part:\n  {refused}")


def check_base(own: ClientConfig, sha256: str, *, servers: str = "") -> None:
    """Refuse a base model whose content this client does not allow, or which is not the server's.

    Args:
        own: The client's configuration.
        sha256: The content of the base model here.
        servers: The content of the server's, if it says so.

    Raises:
        Declined: Names the hash.
    """
    if servers and sha256 != servers:
        which = "model" if own.model is not None else "the model of that name"
        raise Declined(
            f"client '{own.name}' does not take part:\n"
            f"  {which} in client.toml has the SHA-256 {sha256[:12]}..., and the server's base "
            f"model {servers[:12]!r:.20}: get the same files"
        )
    allowed = own.limits.model_sha256
    if allowed is not None and sha256 not in allowed:
        raise Declined(
            f"client '{own.name}' does not take part:\n"
            f"  the base model's SHA-256, {sha256}, is not in limits.model_sha256"
        )


def check_version(own: ClientConfig, version: str) -> None:
    """Refuse a server whose version of silotune this client does not accept.

    Raises:
        Declined: Names both.
    """
    allowed = own.limits.versions
    if allowed is None or any(version == v or version.startswith(f"{v}.") for v in allowed):
        return
    raise Declined(
        f"client '{own.name}' does not take part:\n"
        f"  the server's silotune, {version or 'unknown'!r:.40}, is not in limits.versions"
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


def is_quiet(run: RunConfig, own: ClientConfig) -> bool:
    """Whether no row may decide what this client says about the number of its rows, or if it fails.

    Otherwise, a recipe could count the rows with any property: by what it skips, truncates or
    cannot read.
    """
    limits = own.limits
    private = run.privacy.unit != "none" or limits.epsilon is not None
    return private or limits.min_count is not None


def own_rows(run: RunConfig, own: ClientConfig) -> ClientRows:
    """Read this client's rows and split them as its own configuration says.

    Raises:
        DataError, ConfigError: They cannot be read.
        Declined: They are fewer than `limits.min_count`.
    """
    data, limits, seed = own_data(run, own), own.limits, run.seed
    columns = allowed_columns(own.data, limits.columns)
    if not is_quiet(run, own):
        return load_client(data, own.name, seed=seed, task=run.task, columns=columns)
    if run.privacy.unit != "none" and own.data.split_seed is None:
        # under a seed of the server, the sizes of many splits would say which rows are there
        seed = split_key(Path(own.state))
        data = data.model_copy(update={"split_seed": None})
    rows, problem = load_client_quietly(data, own.name, seed=seed, task=run.task, columns=columns)
    if rows.num_unused or rows.num_unused_eval:
        num = len(rows.train) + len(rows.scored)
        unused = rows.num_unused + rows.num_unused_eval
        sys.stderr.write(f"{unused} of {unused + num} rows cannot be used: {problem}\n")
    if limits.min_count is not None and len(rows.train) + rows.num_unused < limits.min_count:
        raise Declined(
            f"client '{own.name}' does not take part:\n"
            f"  it has fewer rows than limits.min_count = {limits.min_count}"
        )
    return rows
