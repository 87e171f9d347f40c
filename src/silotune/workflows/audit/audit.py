"""Audits: attacks on your own runs, whose success is a lower bound on what a run gives away.

A recipe is trained with canaries, that is clients or rows that a coin puts in or leaves out. The
attack then guesses from the result which are in. A finished run is not trained again: the attack
checks whether its losses reveal the rows that it was trained on. An audit never proves privacy,
because another attack may find more.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from silotune.core.algorithm import expected_layout, keep_local, starting_state
from silotune.core.atomic_files import free_place, make_folder, write_json
from silotune.core.checksums import check_listed, list_files
from silotune.core.errors import ConfigError, RunFolderError
from silotune.core.public_call import public
from silotune.core.reading_back import read_object
from silotune.core.types import ServerState
from silotune.data.reading import TaskRow
from silotune.federation.client import Worker
from silotune.federation.client_privacy import Protection, plan_of_client
from silotune.federation.privacy_guarantee import Promise, with_privacy
from silotune.federation.privacy_statement import statement
from silotune.federation.progress import Progress
from silotune.federation.recipe_model import load_for, local_tensors
from silotune.federation.rounds import run_rounds
from silotune.federation.run_folder import RunFolder
from silotune.federation.sampling import cohort_size
from silotune.federation.server_work import open_server_work
from silotune.models.loading import LoadedModel, read_adapter, untrained
from silotune.recipes.parse import shipped_recipes
from silotune.recipes.personal import kept_by, what_is_kept
from silotune.recipes.schema import RunConfig
from silotune.recipes.sections import BudgetConfig, StopConfig
from silotune.results.run import Run
from silotune.runtime.flower.strategy import algorithm_of
from silotune.runtime.inprocess import InProcessClients, prepare_clients
from silotune.training.tasks import build_task
from silotune.workflows.audit.bounds import exposure
from silotune.workflows.audit.canary_clients import CanaryClients, Protect
from silotune.workflows.audit.canary_rows import CanaryRow, draw_canaries, with_canaries
from silotune.workflows.audit.membership import drawn_rows, infer_membership, losses
from silotune.workflows.audit.released_norm import replay
from silotune.workflows.audit.result import claim_of, result_of
from silotune.workflows.check import Checked, check
from silotune.workflows.folders import place_for
from silotune.workflows.in_memory import keep_beside
from silotune.workflows.provenance import provenance_of
from silotune.workflows.run import run_in

FILE = "audit.json"
CANARIES, FEWEST = 100, 10
"""Default and minimum: with ten canaries, no guesses can refute an epsilon above 1.05."""
NUM_OTHERS = 200
"""Other secrets that a canary's own secret is ranked among."""
NUM_EXPOSED = 8
"""Number of ranked canaries, in and out each: every one costs `NUM_OTHERS` more losses."""
BLACK_BOX = "uses only losses under the last adapter, not what clients sent before"


class AuditFolder(RunFolder):
    """A run with canaries in it. It is not a normal run: `silotune run --resume` refuses it."""

    RECIPE = "audit.toml"
    KIND = "audit"
    COMMAND = "silotune audit"
    RESULT = "audit.json"


@dataclass(frozen=True)
class Audit:
    """A finished audit on disk."""

    path: Path

    @property
    def result(self) -> dict[str, Any]:
        """audit.json: what was attacked and how, what the attack shows, and what was claimed."""
        fix = f"Remove {self.path}, and audit again."
        check_listed(self.path, FILE, fix=fix)
        return read_object(self.path / FILE, fix=fix)

    @property
    def is_refuted(self) -> bool:
        """Whether the attack shows more than the claim allows."""
        return bool(self.result.get("is_refuted"))


@public
def audit(
    target: str | Path | RunConfig,
    overrides: Sequence[str] = (),
    *,
    canaries: int | None = None,
    out: Path | str | None = None,
    progress: Progress | None = None,
    rows: Any = None,
    model: Any = None,
) -> Audit:
    """Attack a finished run, or train a recipe with canaries in it and attack that.

    Args:
        target: The folder of a finished in-process run, for membership inference; or a recipe.
        overrides: Dotted `key=value` strings that change a recipe.
        canaries: How many, at least 10; by default 100. With [privacy] unit = "client" they are
            clients, otherwise rows.
        out: The folder to create for a recipe; by default `runs/<time>-<recipe>-audit`.
        progress: Receives progress messages; silent by default.
        rows: Rows in memory, instead of data.path: a list of dicts, a data set, a data frame, an
            iterator, or {client: rows}. They are written beside the audit folder.
        model: A transformers model and its tokenizer in memory, instead of model.name. It is saved
            like the rows and not changed.

    Returns:
        The audit. For a run, it is in a new folder inside the run folder.

    Raises:
        ConfigError: Invalid arguments, or a recipe that cannot be audited.
        SilotuneError: Training or the attack failed; nothing incomplete is left behind.
    """
    progress = progress or Progress()
    if not isinstance(target, RunConfig) and _is_run(target):
        given = (canaries, out, rows, model)
        if overrides or any(one is not None for one in given):
            raise ConfigError(
                f"{target} is a run, and it is audited as it is: keys, canaries, out, rows and "
                "model do not apply.\n  Leave them out, or give a recipe."
            )
        return _audit_run(Run(Path(target)), progress)
    count = CANARIES if canaries is None else canaries
    if count < FEWEST:
        raise ConfigError(
            f"canaries = {count}: so few can hardly show anything.\n  Use {FEWEST} or more."
        )
    checked = check(target, keep_beside(out, rows, model, overrides))
    _check_auditable(checked.run)
    place = place_for(target, out, "-audit")
    if place.exists():  # the folder's own message would offer --resume
        raise RunFolderError(f"{place} exists and is not overwritten.\n  Choose another --out.")
    folder = AuditFolder.create(place, _bare(checked.run))
    progress.note(f"audit folder: {folder.path}")
    attack = _with_clients if checked.run.privacy.unit == "client" else _with_rows
    try:
        with folder.locked():
            found = attack(folder, replace(checked, run=folder.run), progress, count)
            folder.write_json(FILE, found)
    except BaseException:  # an incomplete audit shows nothing and cannot be resumed
        folder.remove()
        raise
    finally:
        progress.end()
    return Audit(folder.path)


def _is_run(target: str | Path) -> bool:
    """Whether the target is a run folder, or another folder that cannot be a recipe."""
    path = Path(target)
    return (path / RunFolder.RECIPE).is_file() or (
        path.is_dir() and str(target) not in shipped_recipes()
    )


def _check_auditable(run: RunConfig) -> None:
    if run.runtime.name != "in-process":
        raise ConfigError(
            f"runtime.name = '{run.runtime.name}': an audit adds canaries to the clients, which "
            "only works in process.\n  Add runtime.name=in-process."
        )
    if run.task == "prefer":
        raise ConfigError(
            "task = 'prefer': there are no canaries for pairs yet.\n"
            "  Audit a finished run instead: silotune audit RUN."
        )
    if (kept := kept_by(run)) and run.privacy.unit != "client":
        key = kept.partition(" ")[0]
        raise ConfigError(
            f"{kept}: every client scores with its own {what_is_kept(run)}, which is not part of "
            f"the result, so canary rows reveal little.\n  Choose another {key}."
        )


def _bare(run: RunConfig) -> RunConfig:
    """The recipe without reports, because an audit is not a result to publish.

    It also has no budget, which the canaries' messages would use up before the promised rounds end,
    and no early stop.
    """
    report = run.report.model_copy(update={"page": False, "samples": 0, "tracker": "none"})
    bare = {"report": report, "budget": BudgetConfig(), "stop": StopConfig()}
    return run.model_copy(update=bare)


# --- a finished run -------------------------------------------------------------------------------


def _audit_run(run: Run, progress: Progress) -> Audit:
    found = infer_membership(run, progress)
    place = free_place(run.path / "audits" / time.strftime("%Y-%m-%d-%H%M%S"))
    make_folder(place)
    notes = [
        "an attack on the rows as they are: it does not bound epsilon, because no coin decided "
        "which rows were trained on"
    ]
    claim = claim_of(statement(run.config, RunFolder.open(run.path)))
    result = {"attack": "membership inference", "run": run.path.name, "claim": claim, **found}
    write_json(place / FILE, {**result, "notes": notes})
    list_files(place, [FILE])
    return Audit(place)


# --- canary clients -------------------------------------------------------------------------------


def _with_clients(
    folder: RunFolder, checked: Checked, progress: Progress, count: int
) -> dict[str, Any]:
    run = checked.run
    if run.adapter.ranks:
        raise ConfigError(
            "adapter.ranks: canary clients answer at the server's rank only.\n"
            "  Audit the recipe without ranks."
        )
    progress.note(f"loading {run.model.name}")
    loaded = load_for(run, progress)
    provenance_of(folder, checked, loaded)
    plain = keep_local(algorithm_of(run.algorithm), local_tensors(run, loaded))
    worker = Worker(loaded, build_task(run.task, run.data.labels, run.prefer), run, plain)
    inner = InProcessClients(worker, prepare_clients(checked.rows, worker), folder, progress)
    first = read_adapter(loaded)
    clients = CanaryClients(
        inner,
        count=count,
        clip_norm=run.privacy.clip_norm,
        layout=expected_layout(plain, ServerState(0, first)),
        settings=plain.local.settings,
        seed=run.seed,
        protect=_own_noise_of(run) if run.privacy.is_at_client else None,
    )
    num_rows = {name: own.num_train for name, own in inner.data.items()}
    num_rows |= dict.fromkeys(clients.canaries, 1)
    algorithm = with_privacy(plain, run, folder, num_rows)
    server = open_server_work(run, folder, algorithm=algorithm, progress=progress, loaded=loaded)
    progress.begin(run.rounds, 1)
    last = run_rounds(
        run,
        starting_state(algorithm, first, len(num_rows)),
        algorithm=algorithm,
        clients=clients,
        folder=folder,
        progress=progress,
        improve=server and server.improve,
    )
    asked = cohort_size(run.sampling, len(num_rows))
    notes = [f"the guarantee is for {len(num_rows)} clients, including canaries"]
    if asked < len(num_rows):
        notes.append(f"a round asks {asked} of them, so each canary reveals less")
    scores = clients.scores(first, last.adapter)
    told = result_of(clients.coins, scores, statement(run, folder), notes)
    told |= _with_replays(run, told["privacy"]["promise"], progress)
    told["is_refuted"] |= told.get("released_norm", {}).get("is_refuted", False)
    return {"attack": "canary clients", **told}


def _with_replays(run: RunConfig, promise: Promise, progress: Progress) -> dict[str, Any]:
    """Attack the clip norm that every round releases; nothing if it is fixed."""
    if run.privacy.clipping == "fixed" or promise["noise_multiplier"] == 0:
        return {}
    progress.note("replaying the guard")
    found = replay(
        run.privacy,
        noise_multiplier=promise["noise_multiplier"],
        num_planned=promise["num_planned"],
        rounds=run.rounds,
        seed=run.seed,
    )
    return {"released_norm": asdict(found)}


def _own_noise_of(run: RunConfig) -> Protect:
    """Protect a client's change in the same way as `client.train_round`."""

    def protect(delta: dict[str, Tensor], client: str, round_: int) -> dict[str, Tensor]:
        plan = plan_of_client(run, 1, client=client)
        assert plan is not None, "called only if the noise is at the client"
        return Protection(run, client, round_, plan).protect(delta)

    return protect


# --- canary rows ----------------------------------------------------------------------------------


def _with_rows(
    folder: RunFolder, checked: Checked, progress: Progress, count: int
) -> dict[str, Any]:
    began, run = time.perf_counter(), checked.run
    canaries = draw_canaries(
        checked.rows,
        count,
        seed=run.seed,
        labels=(run.data.labels or ()) if run.task == "classify" else (),
        system=run.data.system,
        is_text=run.task == "text",
        num_others=NUM_OTHERS,
    )
    progress.note(f"loading {run.model.name}")
    loaded = load_for(run, progress)
    rows = [canary.row for canary in canaries]
    _check_length(loaded, rows, run)
    with untrained(loaded):
        before = losses(loaded, rows, run)
    planted = with_canaries(checked.rows, canaries)
    run_in(folder, replace(checked, rows=planted), progress, began=began, loaded=loaded)
    after = losses(loaded, rows, run)
    scores = [b - a for b, a in zip(before, after, strict=True)]
    coins = [canary.is_in for canary in canaries]
    notes = [*_not_met(run, folder, checked, canaries), BLACK_BOX]
    told = result_of(coins, scores, statement(run, folder), notes)
    if run.task != "classify":
        progress.note("ranking secrets")
        told["exposure"] = {
            name: _exposure(loaded, run, canaries, after, is_in=is_in)
            for name, is_in in (("in", True), ("out", False))
        }
    return {"attack": "canary rows", **told}


def _check_length(loaded: LoadedModel, rows: Sequence[TaskRow], run: RunConfig) -> None:
    task = build_task(run.task, run.data.labels, run.prefer)
    longest = max(task.num_tokens(rows, loaded.tokenizer))
    if longest > run.train.max_length:
        raise ConfigError(
            f"train.max_length = {run.train.max_length} truncates canary rows, which have up to "
            f"{longest} tokens.\n  Raise it to {longest} or more."
        )


def _not_met(
    run: RunConfig, folder: RunFolder, checked: Checked, canaries: Sequence[CanaryRow]
) -> list[str]:
    """A note on canaries that no step has met: they cannot be found, which lowers the bound."""
    missed, metrics = 0, folder.metrics()
    for name, own in checked.rows.items():
        planted = sum(canary.is_in and canary.client == name for canary in canaries)
        # canaries are the last train rows; every dropped row of the client shifts them
        met = drawn_rows(run, metrics, name, len(own.train) + planted)
        missed += planted - sum(n >= len(own.train) for n in met)
    if missed <= 0:
        return []
    num_in = sum(canary.is_in for canary in canaries)
    return [f"about {missed} of the {num_in} canaries that are in were not met by any step"]


def _exposure(
    loaded: LoadedModel,
    run: RunConfig,
    canaries: Sequence[CanaryRow],
    own_losses: Sequence[float],
    *,
    is_in: bool,
) -> dict[str, Any]:
    """Exposure in bits of the secrets that are in, or, as a control, of those that are out."""
    pairs = zip(canaries, own_losses, strict=True)
    chosen = [(c, loss) for c, loss in pairs if c.is_in == is_in][:NUM_EXPOSED]
    bits = [exposure(loss, losses(loaded, canary.others, run)) for canary, loss in chosen]
    return {
        "num_secrets": len(bits),
        "num_candidates": 1 + NUM_OTHERS,
        "mean_bits": statistics.fmean(bits) if bits else None,
        "most_bits": max(bits, default=None),
        "num_first": sum(b == math.log2(1 + NUM_OTHERS) for b in bits),
    }
