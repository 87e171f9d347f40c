"""More rounds for a run that is finished or was interrupted: `silotune run --resume RUN rounds=20`.

Allowed where the longer run is a run that could have been started that way: with a constant
learning rate the result has the same bytes. Everything that was planned for the number of rounds,
or has ended the run early, is refused with the reason.
"""

from collections.abc import Sequence
from pathlib import Path

from silotune.core.checksums import take_off
from silotune.core.errors import ConfigError
from silotune.federation.extended import extension
from silotune.federation.run_folder import RunFolder
from silotune.federation.run_record import EXTENDED, extensions
from silotune.recipes.parse import with_overrides
from silotune.recipes.schema import RunConfig
from silotune.workflows.check import Checked, check
from silotune.workflows.plan.outcome import FILE as PLAN

SCHEDULE = "train.schedule"


def open_to_extend(resume: Path, overrides: Sequence[str]) -> tuple[RunFolder, Checked]:
    """Open a run folder with a recipe of more rounds, which `extend` then writes down.

    Args:
        resume: The run folder.
        overrides: `rounds=N`, and `train.schedule=...` where the learning rate is not constant.

    Returns:
        The folder as it is, and the checked recipe of the longer run. The recipe is the folder's
        if it has this number of rounds already, as after an interruption.

    Raises:
        ConfigError: Other keys, or the run cannot be extended.
        ModelError, DataError, RunFolderError: See `check` and `RunFolder`.
    """
    folder = RunFolder.open(resume)
    keys = {override.partition("=")[0].strip() for override in overrides}
    if others := sorted(keys - {"rounds", SCHEDULE}):
        raise ConfigError(
            f"a resumed run keeps its recipe, so {', '.join(others)} cannot be changed.\n"
            f"  Leave it out, or start a new run. More rounds are possible: rounds="
            f"{2 * folder.run.rounds}."
        )
    asked = [*overrides]
    if any(text.partition("=")[2].strip().strip("\"'") == "constant" for text in overrides):
        asked.append("train.lr_min=0")  # it belongs to the schedule that ends here
    longer = with_overrides(folder.run, asked, name=str(resume))
    if longer != folder.run:
        _check_can_grow(folder, longer, says_schedule=SCHEDULE in keys)
    return folder, check(longer)


def extend(folder: RunFolder, longer: RunConfig) -> RunFolder:
    """Write down that a run goes on for more rounds. The caller has locked the folder.

    Its results are those of fewer rounds, so the marks that say "done" and "expected" go first: a
    kill before the last line leaves a run that ends as it was planned.
    """
    state = folder.load_state()
    entry = extension(folder.run, longer, after_round=state.round if state else 0)
    for name in (folder.RESULT, PLAN):
        take_off(folder.path, name)
        (folder.path / name).unlink(missing_ok=True)
    folder.write_json(EXTENDED, [*extensions(folder.path), entry])
    return RunFolder(folder.path, longer)


def _check_can_grow(folder: RunFolder, longer: RunConfig, *, says_schedule: bool) -> None:
    """Refuse what would not be the run that it claims to be.

    Raises:
        ConfigError: It says why, and what to do instead.
    """
    run, path = folder.run, folder.path
    if longer.rounds <= run.rounds:
        raise ConfigError(
            f"rounds = {longer.rounds}: {path} has {run.rounds} already, and a run can only grow.\n"
            "  Give more rounds, or leave them out to resume the run as it is."
        )
    if run.privacy.unit != "none":
        raise ConfigError(
            f"{path}: its [privacy] guarantee is about {run.rounds} rounds, and more of them would "
            "break what privacy.json states.\n"
            "  Start a new run with more rounds: its guarantee counts all of them."
        )
    if run.runtime.name == "flower":
        raise ConfigError(
            f"{path}: real clients agreed to {run.rounds} rounds of this run.\n"
            "  Submit a new run, which every client checks against its limits."
        )
    _check_end(folder, longer)
    if run.train.schedule != "constant" and not says_schedule:
        raise ConfigError(
            f"{path}: the learning rate of its rounds was chosen for {run.rounds} of them "
            f'({SCHEDULE} = "{run.train.schedule}"), so {longer.rounds} from the start would have '
            "been another run.\n"
            "  Say what the further rounds should follow, and the run records it: "
            f"{SCHEDULE}={run.train.schedule} (the rates of {longer.rounds} rounds, from here on) "
            f"or {SCHEDULE}=constant."
        )


def _check_end(folder: RunFolder, longer: RunConfig) -> None:
    """Refuse to extend a run that something else than its rounds has ended."""
    run, state = folder.run, folder.load_state()
    is_finished = folder.read_json(folder.RESULT) is not None
    if state is None or (state.round < run.rounds and not is_finished):
        return  # it was interrupted, so no round was its last
    if state.round < run.rounds:
        raise ConfigError(
            f"{folder.path} ended after round {state.round} of {run.rounds}, by a budget or "
            "[stop] of its recipe; with more rounds, it would end there too.\n"
            "  Start a new run with another limit."
        )
    # the end of a run adds a checkpoint and a score that a longer run would not have
    due = longer.evaluate.every == 0 or longer.evaluate.due(state.round, longer.rounds)
    off = not due or bool(state.round % run.checkpoint.every)
    chosen = run.checkpoint.keep == "best"
    patient = run.stop.patience is not None and run.evaluate.choose_by == "server"
    if off and (chosen or patient):
        raise ConfigError(
            f"{folder.path}: round {state.round} was scored or kept only because it was the last, "
            "and checkpoint.keep or stop.patience would choose by it.\n"
            "  Start a new run with more rounds."
        )
