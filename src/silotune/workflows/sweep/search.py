"""Choose the values of a sweep's next run with Optuna, from the results so far.

Reference:
    Akiba et al. 2019, "Optuna: A Next-generation Hyperparameter Optimization Framework".
    arXiv:1907.10902. It uses the tree-structured Parzen estimator (Bergstra et al. 2011,
    "Algorithms for Hyper-Parameter Optimization").
"""

import warnings
from collections.abc import Sequence
from typing import Any

from silotune.core.errors import ConfigError
from silotune.recipes.sweep_grid import Axis, Range

TRIES = 50
"""How often Optuna is asked for new values before the search space counts as exhausted."""


class Search:
    """Proposes overrides and is told the loss of each. Only the sweep's folder is persistent."""

    def __init__(self, axes: Sequence[Axis], *, seed: int) -> None:
        try:
            import optuna
        except ImportError as error:
            raise ConfigError(
                "sweep.search needs Optuna, which is not installed.\n"
                "  Install it: make env EXTRAS=search"
            ) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._axes = axes
        self._space = {axis.key: _distribution(axis) for axis in axes}
        with warnings.catch_warnings():
            # constant_liar makes concurrent runs differ; it may change with Optuna's versions
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        self._study = optuna.create_study(direction="minimize", sampler=sampler)
        self._open: dict[tuple[str, ...], Any] = {}
        self._known: dict[tuple[str, ...], float | None] = {}

    def remember(self, keys: tuple[str, ...], loss: float | None) -> None:
        """Add a run of an earlier process.

        Args:
            keys: Its overrides.
            loss: Its loss; None if it failed.
        """
        from optuna.trial import TrialState, create_trial

        params = {
            axis.key: _number(axis, text) for axis, text in zip(self._axes, keys, strict=True)
        }
        state = TrialState.FAIL if loss is None else TrialState.COMPLETE
        self._study.add_trial(
            create_trial(state=state, params=params, distributions=self._space, value=loss)
        )
        self._known[keys] = loss

    def propose(self) -> tuple[str, ...] | None:
        """Overrides that were not tried before; None if there seem to be no more."""
        for _ in range(TRIES):
            trial = self._study.ask(self._space)
            keys = tuple(f"{axis.key}={trial.params[axis.key]}" for axis in self._axes)
            if keys not in self._known and keys not in self._open:
                self._open[keys] = trial
                return keys
            self._tell(trial, self._known.get(keys))
        return None

    def tell(self, keys: tuple[str, ...], loss: float | None) -> None:
        """Report the loss of a proposal; None if its run failed."""
        self._known[keys] = loss
        self._tell(self._open.pop(keys), loss)

    def _tell(self, trial: Any, loss: float | None) -> None:
        from optuna.trial import TrialState

        if loss is None:
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            self._study.tell(trial, loss)


def _distribution(axis: Axis) -> Any:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    values = axis.values
    if not isinstance(values, Range):
        return CategoricalDistribution(values)
    if values.whole:
        return IntDistribution(int(values.low), int(values.high), log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


def _number(axis: Axis, override: str) -> Any:
    """The value of an override in Optuna's search space."""
    text = override.removeprefix(f"{axis.key}=")
    if not isinstance(axis.values, Range):
        return text
    return int(text) if axis.values.whole else float(text)
