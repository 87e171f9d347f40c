"""What each arm of a comparison is trained with: chosen by trials on the validation rows.

All trials share one seed that no compared run has. A lone client chooses for itself; a federation
chooses once for all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from silotune.core.errors import UpdateError
from silotune.recipes.tuning import Point, as_shipped, federated_points, lone_points, own_points
from silotune.workflows.compare.arms import Arms
from silotune.workflows.compare.folder import CENTRALIZED, Trial
from silotune.workflows.compare.local_training import Cost, Plan, pooled, rows_trained
from silotune.workflows.compare.names import EXTENDED, LOCAL, OWN_STEPS, extension
from silotune.workflows.compare.own_arms import try_own_steps


@dataclass
class Chosen:
    """The point of every arm, and what finding it has cost."""

    federated: dict[str, Point]
    local: dict[str, Point]
    """By client."""
    centralized: Point
    own: dict[str, dict[str, Point]] = field(default_factory=dict)
    """Of clients' own steps, by the arm that they extend, and by client."""
    costs: dict[str, Cost] = field(default_factory=dict)
    """By arm; empty without tuning."""
    num_trials: dict[str, int] = field(default_factory=dict)
    """By arm: trials that each of its trainings has made."""
    at_edge: list[str] = field(default_factory=list)
    """Arms and lone clients whose learning rate is the lowest or the highest that was tried."""

    def values(self) -> dict[str, Any]:
        """Arm -> chosen values; those of lone clients by client."""
        return {
            **{arm: dict(point.values) for arm, point in self.federated.items()},
            LOCAL: {client: dict(point.values) for client, point in self.local.items()},
            CENTRALIZED: dict(self.centralized.values),
            **{
                extension(arm, OWN_STEPS): {c: dict(point.values) for c, point in own.items()}
                for arm, own in self.own.items()
            },
        }


def choose(arms: Arms) -> Chosen:
    """Let every arm try the same number of points, and keep the best of each.

    Raises:
        UpdateError: No point of an arm could be trained.
    """
    run, tune = arms.run, arms.run.compare.tune
    shipped = as_shipped(run)
    if tune is False:
        federated = {arm: as_shipped(recipe) for arm, recipe in arms.recipes.items()}
        chosen = Chosen(federated, dict.fromkeys(arms.data, shipped), shipped)
        if run.finish.local_steps:
            chosen.own = {arm: dict.fromkeys(arms.data, shipped) for arm in EXTENDED}
        return chosen
    chosen, plan = Chosen({}, {}, shipped), Plan()
    for arm, recipe in arms.recipes.items():
        points, trials = federated_points(recipe, tune), list[Trial]()
        for point in points:
            trial, done = arms.try_federated(arm, point)
            trials.append(trial)
            if not plan and math.isfinite(trial.validation_loss):
                plan = rows_trained(done.metrics, arms.data, run)
        chosen.federated[arm] = _best(arm, arm, points, trials, chosen)
    points = lone_points(run, tune)
    for client in arms.data:
        trials = [arms.try_alone(client, point, plan[client]) for point in points]
        chosen.local[client] = _best(LOCAL, f"{client} alone", points, trials, chosen)
    if run.compare.centralized:
        trials = [arms.try_alone(None, point, pooled(plan)) for point in points]
        chosen.centralized = _best(CENTRALIZED, CENTRALIZED, points, trials, chosen)
    if run.finish.local_steps:
        _choose_own_steps(arms, chosen)
    return chosen


def _choose_own_steps(arms: Arms, chosen: Chosen) -> None:
    """Each client tries the same steps after training alone and after the federation."""
    points = own_points(arms.run, arms.run.compare.tune)
    for arm in EXTENDED:
        name, chosen.own[arm] = extension(arm, OWN_STEPS), {}
        for client in arms.data:
            before = chosen.local[client] if arm == LOCAL else chosen.federated[arm]
            trials = [try_own_steps(arms, arm, client, point, before) for point in points]
            best = _best(name, f"{name} of {client}", points, trials, chosen)
            chosen.own[arm][client] = best


def _best(
    arm: str, who: str, points: Sequence[Point], trials: Sequence[Trial], chosen: Chosen
) -> Point:
    """The point with the lowest loss, the first of equal ones; and note what the trials cost."""
    chosen.num_trials[arm] = len(trials)
    chosen.costs[arm] = sum((t.cost for t in trials), chosen.costs.get(arm, Cost()))
    best = min(range(len(points)), key=lambda i: trials[i].validation_loss)
    if not math.isfinite(trials[best].validation_loss):
        raise UpdateError(
            f"tuning {who}: training diverged with every learning rate that was tried.\n"
            "  Try lower ones: compare.tune.lr."
        )
    rates = [float(point.values["lr"]) for point in points]
    if rates[best] in (min(rates), max(rates)):
        chosen.at_edge.append(who)
    return points[best]
