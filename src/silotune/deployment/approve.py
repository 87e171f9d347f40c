"""`silotune client approve`: what a run asks of this client, in plain words, and the answer."""

from collections.abc import Iterator
from pathlib import Path

from silotune.core.errors import ConfigError, SilotuneError, first_line
from silotune.core.safe_text import one_line
from silotune.core.wording import counted, human_bytes
from silotune.deployment.consortium.kit import read_kit
from silotune.deployment.join import KIT, OWN, server_fingerprint
from silotune.federation import approval_files
from silotune.federation.approval_files import WAITING, Request, requests
from silotune.federation.client_config import ClientConfig, load_client_config
from silotune.federation.client_privacy import spent_so_far
from silotune.federation.client_recipe import own_recipe
from silotune.federation.consent import named_columns
from silotune.federation.ledger import FILE as LEDGER
from silotune.federation.operator_log import record
from silotune.federation.outbound_log import FILE as OUTBOUND
from silotune.federation.outbound_log import Outbound
from silotune.recipes.schema import RunConfig
from silotune.runtime.flower.strategy import algorithm_of
from silotune.workflows.plan.shapes import build_shapes
from silotune.workflows.plan.traffic import traffic


def client_folder(given: Path | None) -> Path:
    """The folder of a client: the given one, this one, or the only one below it.

    Raises:
        ConfigError: It cannot be told.
    """
    if given is not None:
        return given
    here = Path()
    found = [here] if (here / OWN).is_file() else sorted(p.parent for p in here.glob(f"*/{OWN}"))
    if len(found) != 1:
        names = ", ".join(map(str, found)) or "none"
        raise ConfigError(
            f"which client? Folders of clients here: {names}.\n  Give one: --folder DIR"
        )
    return found[0]


def find_request(folder: Path, run: str | None) -> Request:
    """The run that asks, by its id or how it begins; without one, the only run that waits.

    Raises:
        ConfigError: There is none, or there are several.
    """
    own = load_client_config(_config(folder))
    known = requests(Path(own.state))
    fit = [r for r in known if (r.run.startswith(run) if run else r.state == WAITING)]
    if len(fit) != 1:
        shown = ", ".join(f"{r.run[:8]} ({r.state})" for r in known) or "none"
        how_many = f"{len(fit)} runs match" if fit else "no run matches"
        what = f"'{run}'" if run else "(waiting for an answer)"
        raise ConfigError(
            f"{how_many} {what}.\n  Runs that asked: {shown}. A run asks once `join` is connected "
            'and client.toml says approve = "ask" under [runs].'
        )
    return fit[0]


def answer(folder: Path, request: Request, *, approved: bool) -> None:
    """Remember the answer, after it is in the log of operators.

    Raises:
        DiskError: It cannot be written.
    """
    own = load_client_config(_config(folder))
    what = "run approved" if approved else "run declined"
    record(folder, what, run=request.run, recipe_sha256=request.sha256)
    approval_files.answer(Path(own.state), request, approved=approved)


def describe(folder: Path, request: Request) -> Iterator[tuple[str, str]]:
    """What a run asks for, one subject each: (subject, words).

    Texts of the server are made safe for a terminal.

    Raises:
        SilotuneError: The recipe cannot be read, or this client's limits refuse it.
    """
    own = load_client_config(_config(folder))
    run = RunConfig.model_validate_json(request.recipe)
    here = own_recipe(run, own)
    changed = "; its recipe has changed since it was answered" if request.changed else ""
    yield "run", f"{request.run}, asked {request.time}, now {request.state}{changed}"
    kit = read_kit(folder / KIT)
    version = one_line(request.version, longest=40) or "unknown"
    yield "server", f"{kit.consortium}, {server_fingerprint(kit)}, silotune {version}"
    yield "recipe", f"SHA-256 {request.sha256}"
    base = f", content {request.base_sha256[:12]}..." if request.base_sha256 else ""
    yield "base model", one_line(f"{run.model.name}{base}")
    yield "task", f"{run.task}: {_task_words(run)}"
    yield "columns", _columns(here, own)
    yield "training", _training(run)
    yield "algorithm", one_line(f"{getattr(run.algorithm, 'name', '')}, on {_adapter(run)}")
    yield "sends", _bytes(here, own, request.run)
    yield "privacy", _privacy(run)
    if own.limits.epsilon is not None:
        yield "privacy left", _privacy_left(own)
    yield "others", _others(run, own)


def _others(run: RunConfig, own: ClientConfig) -> str:
    """Who else may take part: what the server says about that is not asked."""
    if not run.secure_sum.is_on:
        return "the server does not say who else takes part"
    names = sorted(own.secure_sum.roster.keys() - {own.name})
    return one_line(
        "only clients on your roster: " + (", ".join(names) or "nobody, so none at all")
    )


def _task_words(run: RunConfig) -> str:
    return {
        "prefer": "learns which of two answers to prefer",
        "classify": "learns to choose one of the labels; scores count rows per label",
        "text": "learns to continue texts",
    }.get(run.task, "learns to answer prompts")


def _columns(here: RunConfig, own: ClientConfig) -> str:
    """The columns that the recipe names, or else those that the rows' own format can have."""
    found = dict.fromkeys(column for _, column in named_columns(here.data, here.task))
    if found:
        return one_line(", ".join(found))
    if own.limits.columns is None:
        return "those of a known format that the rows have: prompt and answer, or messages"
    return f"those of a known format, out of limits.columns: {', '.join(own.limits.columns)}"


def _training(run: RunConfig) -> str:
    train = run.train
    amount = (
        counted(train.local_steps, "step")
        if train.local_steps
        else f"{train.local_epochs or 1:g} passes over the rows"
    )
    rows = train.batch_size * train.accumulation
    return f"{counted(run.rounds, 'round')}, in each {amount} of {counted(rows, 'row')}"


def _adapter(run: RunConfig) -> str:
    kind = run.adapter.kind
    return f"an adapter of kind {kind}, rank {run.adapter.rank}" if kind == "lora" else kind


def _bytes(here: RunConfig, own: ClientConfig, run_id: str) -> str:
    sent = sum(line["bytes"] for line in Outbound(Path(own.state) / OUTBOUND, run_id).sent())
    try:
        cost = traffic(here, build_shapes(here), algorithm_of(here.algorithm), 1)
        said = f"{human_bytes(cost.up)} in each round, {human_bytes(cost.up * here.rounds)} in all"
    except SilotuneError as error:
        said = f"an amount that cannot be computed here ({one_line(first_line(str(error)))})"
    limit = own.limits.max_bytes
    most = "no limit" if limit is None else f"at most {human_bytes(limit)}"
    return f"{said}; sent so far {human_bytes(sent)}, limits.max_bytes: {most}"


def _privacy(run: RunConfig) -> str:
    asked = run.privacy
    if asked.unit == "none":
        return "none: the server reads each update as it is"
    where = "at this client" if asked.is_at_client else "at the server, which reads updates before"
    target = asked.target_epsilon
    amount = f"epsilon {target:g}" if target else f"noise multiplier {asked.noise_multiplier}"
    return f"unit {asked.unit}, noise {where}, {amount} for the whole run"


def _privacy_left(own: ClientConfig) -> str:
    limit = own.limits.epsilon
    spent = spent_so_far(Path(own.state) / LEDGER, delta=own.limits.delta or 0.0)
    return f"epsilon {spent:.2f} of {limit or 0:g} is spent, by all runs together"


def _config(folder: Path) -> Path:
    if not (folder / OWN).is_file():
        raise ConfigError(
            f"{folder} has no {OWN}, so it is not the folder of a client that has joined.\n"
            "  Give the folder that `silotune client init` created: --folder DIR"
        )
    return folder / OWN
