"""Find every mistake that shows without loading a model: recipe, names, data, clients, labels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from silotune.core.errors import ConfigError, DataError, HubUnreachable, first_line
from silotune.core.public_call import public
from silotune.data.chat_templates import TEMPLATES, resolve_template
from silotune.data.client_rows import ClientRows
from silotune.data.clients import cut_clients
from silotune.data.files import locate
from silotune.data.labelled_texts import sorted_labels
from silotune.data.partition import PartitionConfig
from silotune.data.reading import TaskRow
from silotune.federation.client_config import (
    is_client_folder,
    load_client_config,
    load_client_configs,
)
from silotune.federation.client_recipe import own_rows
from silotune.federation.mixed_ranks import check_client_ranks
from silotune.federation.privacy_guarantee import Promise, promise_of, too_few_for
from silotune.federation.roster import is_consortium, names_in
from silotune.federation.sampling import cohort_size
from silotune.federation.secure_sum import check_cohort
from silotune.federation.server_scores import check_server_test
from silotune.federation.server_work import server_rows
from silotune.federation.trackers import check_tracker
from silotune.models.adapters import check_adapter
from silotune.models.devices import pick_device
from silotune.models.quantization import check_quantization
from silotune.models.sources import check_name, is_hub_id
from silotune.models.start import check_start
from silotune.privacy.secure_sum.ckks import COST_NOTE, KEYS_NOTE, tenseal
from silotune.recipes.arms import repeated_arms
from silotune.recipes.auto import resolve_auto, why_chosen
from silotune.recipes.parse import resolve_recipe
from silotune.recipes.preferences import ASKED
from silotune.recipes.schema import RunConfig
from silotune.recipes.tracks import TRACKS
from silotune.runtime.flower.engine import check_installed
from silotune.runtime.flower.strategy_check import check_algorithm, strategy_warnings
from silotune.training.loop import pick_optimizer
from silotune.training.own_functions import own_loss, own_metric
from silotune.training.tasks import build_task
from silotune.workflows.data_overview import label_warnings
from silotune.workflows.in_memory import from_memory


@dataclass(frozen=True)
class Checked:
    """A recipe without mistakes, and the rows it names."""

    run: RunConfig
    rows: Mapping[str, ClientRows]
    warnings: Sequence[str] = ()
    """What is allowed but may be surprising."""
    promise: Promise | None = None
    """What [privacy] guarantees, if the recipe has it."""
    unchecked: Sequence[str] = ()
    """What could not be looked at, each with the reason."""
    chosen: str = ""
    """Which algorithm "auto" is, and why."""

    @property
    def not_looked_at(self) -> str:
        """What a check never looks at, and what does."""
        return (
            "not looked at: the model's tokenizer, chat template and weights; "
            "`silotune data` looks at every row with the first two"
        )


def on_a_day(run: RunConfig) -> RunConfig:
    """A recipe with the day for templates that write one: today, unless it names a day.

    The resolved recipe is what a folder keeps and clients receive, so a run has one day only.
    """
    if run.data.date is not None or run.task not in ASKED:
        return run
    today = {"date": date.today().isoformat()}
    return run.model_copy(update={"data": run.data.model_copy(update=today)})


@public
def check(
    recipe: str | Path | RunConfig,
    overrides: Sequence[str] = (),
    *,
    offline: bool = False,
    rows: Any = None,
    model: Any = None,
    clients: Sequence[str] | None = None,
) -> Checked:
    """Find every mistake that shows without loading a model: recipe, model name, data, clients.

    Args:
        recipe: A shipped recipe's name, a TOML file, or a recipe.
        overrides: Keys to change, such as "train.lr=5e-4".
        offline: If the hub cannot be reached, check everything except its rows, and say so in
            `unchecked`. Otherwise that is an error.
        rows: Rows in memory, instead of data.path: a list of dicts, a data set, a data frame, an
            iterator, or {client: rows}. They are written to a folder that is removed in the end.
        model: A transformers model and its tokenizer in memory, instead of model.name. It is saved
            like the rows and not changed.
        clients: The only clients of a consortium that take part; by default, all do.

    Returns:
        The recipe (`run`), the rows of every client (`rows`), warnings, and what was not checked.

    Raises:
        ConfigError, ModelError, DataError: What is wrong, where, and how to fix it.
    """
    with from_memory(rows, model, overrides) as changed:
        return _checked(resolve_recipe(recipe, changed), offline=offline, clients=clients)


def _checked(run: RunConfig, *, offline: bool, clients: Sequence[str] | None) -> Checked:
    chosen = why_chosen(run)
    looked_at = _looked_at(resolve_auto(run), offline=offline, clients=clients)
    return replace(looked_at, chosen=chosen)


def _looked_at(run: RunConfig, *, offline: bool, clients: Sequence[str] | None) -> Checked:
    check_name(run.model.name)
    if run.model.revision is not None and not is_hub_id(run.model.name):
        raise ConfigError(
            f"model.revision = '{run.model.revision}' has no effect: '{run.model.name}' is not on "
            "the hub.\n  Remove it, or set model.name to a hub id."
        )
    if run.data.template not in TEMPLATES:  # the run keeps the text, even if the file moves
        text = resolve_template(run.data.template)
        run = run.model_copy(update={"data": run.data.model_copy(update={"template": text})})
    run = on_a_day(run)
    check_track(run)
    device = pick_device(run.runtime.device)
    check_quantization(run.model.quantization, device, "model.quantization")
    check_adapter(run.adapter, run.model.quantization, device)
    if run.adapter.start is not None:
        check_start(run.adapter.start, run.adapter.model_dump())
    if run.runtime.name != "in-process":
        check_installed(run)
    check_tracker(run.report.tracker)
    own_loss(run.train.loss, build_task(run.task, run.data.labels, run.prefer))
    own_metric(run.evaluate.metric)
    repeated = repeated_arms(run)  # raises for other mistakes in [compare]
    strategy, (_, notice) = (
        strategy_warnings(run.algorithm),
        pick_optimizer(run.train.optimizer, device),
    )
    warnings = [*repeated, *strategy, *([notice] if notice else [])]
    if run.server.work == "distill" and run.distill.teacher is not None:
        check_name(run.distill.teacher, "distill.teacher")
    try:
        rows, unused = _rows(run, clients)
        own = server_rows(run)
    except HubUnreachable as error:
        if not offline:
            raise
        return _without_rows(run, warnings, error)
    if run.server.work != "none" and not own:
        raise DataError(
            "the server has no rows to train on.\n  Set server.data_fraction or server.data_path."
        )
    warnings = [*unused, *warnings]
    if run.task == "classify":
        run = _with_labels(run, rows, own)
        # under [privacy], nobody else may learn about real clients' rows; and without rows here,
        # nothing is known about them
        here = any(own.train for own in rows.values())
        if here and (run.runtime.name != "flower" or run.privacy.unit == "none"):
            warnings += label_warnings(rows, run.data.labels or ())
    check_server_test(run, {} if has_real_clients(run) else rows, own)
    num_asked = cohort_size(run.sampling, len(rows))
    check_algorithm(run.algorithm, num_clients=num_asked)
    if run.secure_sum.is_on:
        check_cohort(run, num_asked)
    if run.secure_sum.kind == "ckks":
        tenseal()
        warnings.append(f"secure_sum.kind = 'ckks': {KEYS_NOTE}. {COST_NOTE}")
    check_client_ranks(run, rows, real=has_real_clients(run))
    promise = promise_of(run, {name: len(own.train) for name, own in rows.items()})
    if promise is not None and (few := too_few_for(promise)) is not None:
        warnings.append(
            f"privacy.delta = {promise['delta']:g} is at least 1 in {few}: revealing one of them "
            "completely would still satisfy the guarantee"
        )
    return Checked(run, rows, warnings, promise)


def known_clients(run: RunConfig) -> int | None:
    """The number of clients as far as the recipe alone tells it."""
    split = run.partition or PartitionConfig()
    return split.num_clients if split.only is None else len(split.only)


def _without_rows(run: RunConfig, warnings: Sequence[str], error: HubUnreachable) -> Checked:
    """What can be said without the rows."""
    unchecked = [f"the rows: {first_line(str(error))}"]
    if (known := known_clients(run)) is not None:
        num_asked = cohort_size(run.sampling, known)
        check_algorithm(run.algorithm, num_clients=num_asked)
        if run.secure_sum.is_on:
            check_cohort(run, num_asked)
    else:
        unchecked.append("the number of clients, which follows from the rows")
    if run.task == "classify" and run.data.labels is None:
        unchecked.append("the labels, which are those of the rows")
    if run.privacy.unit != "none":
        unchecked.append("the privacy guarantee, which depends on the clients' numbers of rows")
    return Checked(run, {}, warnings, None, unchecked)


def check_track(run: RunConfig) -> None:
    """Refuse a recipe that names a leaderboard's track but breaks its rules.

    Raises:
        ConfigError: Names every key that differs.
    """
    if run.track is None:
        return
    rules = TRACKS[run.track]
    given = run.partition.num_clients if run.partition is not None else None
    wrong: list[str] = []
    if run.data.path != rules.data:
        wrong.append(f"data.path = '{run.data.path}', the track requires '{rules.data}'")
    if given != rules.num_clients:
        wrong.append(f"partition.num_clients = {given}, the track requires {rules.num_clients}")
    if (run.budget.bytes or math.inf) > rules.max_bytes:
        wrong.append(f"budget.bytes is above {rules.max_bytes} or not set")
    if wrong:
        raise ConfigError(
            "\n  ".join([f"track = '{run.track}' does not allow:", *wrong])
            + "\n  Fix them, or remove the track with track=none: the scores then do not count "
            "for the leaderboard."
        )


def _with_labels(
    run: RunConfig, rows: Mapping[str, ClientRows], server: Sequence[TaskRow]
) -> RunConfig:
    """The recipe with all labels: its own, or otherwise those of the rows."""
    if run.data.labels is not None:
        return run
    everything = [*server, *(row for own in rows.values() for row in own.every)]
    labels = sorted_labels([row for row in everything if isinstance(row, dict)])
    if len(labels) < 2:
        raise DataError(
            f"all rows have the same label ({', '.join(labels)}), so there is nothing to learn.\n"
            "  Add rows with other labels, or set data.label to the column that holds the labels."
        )
    return run.model_copy(update={"data": run.data.model_copy(update={"labels": labels})})


def has_real_clients(run: RunConfig) -> bool:
    """Whether the rows belong to real clients, who read them with their own configuration."""
    place = locate(run.data.path)
    return place is not None and (is_client_folder(place) or is_consortium(place))


def _rows(
    run: RunConfig, clients: Sequence[str] | None
) -> tuple[Mapping[str, ClientRows], list[str]]:
    """All clients' rows, from the recipe's data or from the clients' own configurations.

    Also returns a warning for each group of rows that is not used.
    """
    place = locate(run.data.path)
    if place is None or not has_real_clients(run):
        return cut_clients(
            run.data,
            run.partition,
            seed=run.seed,
            task=run.task,
            server_fraction=run.server.data_fraction,
        )
    if run.runtime.name != "flower":
        raise ConfigError(
            f"data.path = '{run.data.path}' points to real clients, which only work with "
            "runtime.name = 'flower'.\n  Set runtime.name = 'flower', or point data.path to rows."
        )
    if run.checkpoint.keep_updates:
        raise ConfigError(
            "checkpoint.keep_updates = true: what real clients send is not kept beyond its round, "
            "because contributions are measured on all clients' rows.\n  Remove it."
        )
    if run.partition is not None and run.partition != PartitionConfig():
        raise ConfigError(
            f"data.path = '{run.data.path}' points to real clients, so [partition] has nothing to "
            "split.\n  Remove [partition]."
        )
    if run.server.data_fraction > 0:
        raise ConfigError(
            "server.data_fraction: these rows belong to the clients, so the server cannot take a "
            "share of them.\n  Give the server its own rows: server.data_path."
        )
    if run.task == "classify" and run.data.labels is None:
        raise ConfigError(
            "data.labels is missing: the server cannot read the labels from the clients' own "
            'rows.\n  Name all classes: data.labels = ["no", "yes"].'
        )
    if is_consortium(place):
        return {name: ClientRows(name, (), ()) for name in _members(place, clients)}, []
    owners = [load_client_config(path) for path in load_client_configs(place).values()]
    found = {own.name: own_rows(run, own) for own in owners}
    return found, [f"client '{name}': {n}" for name, own in found.items() for n in own.notes]


def _members(place: Path, chosen: Sequence[str] | None) -> Sequence[str]:
    if not (names := names_in(place)):
        raise ConfigError(
            f"the consortium in {place} has no clients yet.\n"
            "  Approve one: silotune server approve REQUEST"
        )
    if here := [name for name in names if chosen is None or name in chosen]:
        return here
    raise ConfigError(
        f"none of {', '.join(map(repr, chosen or ()))} is in the consortium in {place}.\n"
        f"  Its clients: {', '.join(names)}."
    )
