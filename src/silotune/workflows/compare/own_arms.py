"""The arms of [finish]: each client goes on by itself, from the federation and from alone.

Lone clients get as many more steps and trials as members of the federation, and choose a share of
them in the same way. Nothing is trained twice: these arms start from what the others have kept.
"""

from pathlib import Path

from silotune.core.atomic_files import load_tensors, save_tensors
from silotune.core.types import AdapterState
from silotune.federation.client_memory import folder_name, load_memory
from silotune.federation.own_steps import (
    FILE,
    OwnSteps,
    best_share,
    interpolated,
    personal,
    take_own_steps,
)
from silotune.federation.run_folder import RunFolder
from silotune.recipes.tuning import Point
from silotune.results.run import Run
from silotune.workflows.compare.arms import Arms
from silotune.workflows.compare.folder import (
    Trial,
    place_alone,
    place_extended,
    place_of,
    place_of_trial,
    tuning_seed,
)
from silotune.workflows.compare.local_training import Cost, Trained, trained_alone
from silotune.workflows.compare.names import INTERPOLATION, LOCAL, OWN_STEPS, extension


def try_own_steps(arms: Arms, arm: str, client: str, point: Point, before: Point) -> Trial:
    """One trial of a client's own steps, from the trial that its arm has chosen.

    Args:
        arms: Trains and scores.
        arm: What is extended.
        client: Who goes on.
        point: How.
        before: What the arm was trained with.
    """
    part_of = f"{arm}/{folder_name(client)}" if arm == LOCAL else arm
    begun = arms.folder.path / place_of_trial(part_of, before.label)

    def train(_: Path) -> Trained:
        return _trained(
            arms, client, _steps(arms, arm, client, point, tuning_seed(arms.run), begun)
        )

    place = place_of_trial(f"{OWN_STEPS}/{arm}/{folder_name(client)}", point.label)
    title = f"tuning {extension(arm, OWN_STEPS)}, {client}: {point.label}"
    return arms.trial(place, title, train)


def go_on(arms: Arms, arm: str, client: str, point: Point, seed: int) -> None:
    """A client's own steps, from what its arm has arrived at with a seed; and a share of them."""
    begun = arms.folder.path / (place_alone(client, seed) if arm == LOCAL else place_of(arm, seed))

    def train(part: Path) -> Trained:
        done = _steps(arms, arm, client, point, seed, begun)
        save_tensors(part / FILE, done.adapter, about={})
        return _trained(arms, client, done)

    def mix(_: Path) -> Trained:
        start, _position = _start(arms, arm, client, point, seed, begun)
        own, _about = load_tensors(arms.folder.path / place / FILE)
        share, loss = best_share(
            arms.run.finish.interpolate,
            lambda each: arms.validation_loss([client], interpolated(start, own, each)),
        )
        return Trained(interpolated(start, own, share), Cost(), 0, loss, share)

    place = place_extended(arm, OWN_STEPS, client, seed)
    arms.part(place, f"{extension(arm, OWN_STEPS)}, {client}", train, [client], seed=seed)
    if arms.run.finish.interpolate:
        mixed = place_extended(arm, INTERPOLATION, client, seed)
        arms.part(mixed, f"{extension(arm, INTERPOLATION)}, {client}", mix, [client], seed=seed)


def _start(
    arms: Arms, arm: str, client: str, point: Point, seed: int, begun: Path
) -> tuple[AdapterState, int]:
    """What a client goes on from, and how many rows it has taken so far."""
    first = arms.base_model.dress(arms.recipe(point.run, seed))
    if arm == LOCAL:
        return trained_alone(begun / "state", first)
    run, folder = Run(begun / "run"), RunFolder.open(begun / "run")
    result = {name: t for name, t in run.adapter().items() if name in first}
    memory = load_memory(folder.client_folder(client), folder.run.rounds + 1)
    return {**result, **personal(folder, client)}, memory.position


def _steps(arms: Arms, arm: str, client: str, point: Point, seed: int, begun: Path) -> OwnSteps:
    start, position = _start(arms, arm, client, point, seed, begun)
    how = point.run.finish
    return take_own_steps(
        arms.worker(arms.recipe(point.run, seed)),
        arms.data[client],
        start,
        position=position,
        num_steps=how.local_steps,
        lr=how.lr or point.run.train.lr,
    )


def _trained(arms: Arms, client: str, done: OwnSteps) -> Trained:
    cost = Cost(done.num_tokens, done.num_examples, done.num_steps, done.seconds)
    loss = arms.validation_loss([client], done.adapter) if arms.has_validation else None
    return Trained(done.adapter, cost, 0, loss)
