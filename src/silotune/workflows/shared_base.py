"""Train one run after another on one base in memory, for comparisons and sweeps.

Loading a base and tokenizing rows can cost more than a run's first round. Both are kept until a
recipe needs others. The result of a run is the same as when it runs alone, bit for bit.
"""

import gc
import time
from collections.abc import Mapping

import torch

from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.core.errors import SilotuneError
from silotune.core.types import AdapterState
from silotune.data.clients import fingerprint
from silotune.federation.client import ClientData, Worker
from silotune.federation.progress import Progress
from silotune.federation.recipe_model import load_for, warn_of_template
from silotune.federation.run_folder import RunFolder
from silotune.models.loading import (
    LoadedModel,
    is_renewable,
    read_adapter,
    renew_adapter,
    write_adapter,
)
from silotune.recipes.schema import RunConfig
from silotune.results.run import Run
from silotune.runtime.inprocess import prepare_clients
from silotune.training.tasks import build_task
from silotune.training.tasks.instruct import check_packing
from silotune.workflows.check import Checked, check
from silotune.workflows.run import run_in


def needs(run: RunConfig) -> str:
    """What a recipe needs of its base and tokenizer; recipes with equal needs can share them."""
    ends = "no-end-token" in run.train.compat
    labels = run.data.labels if run.task == "classify" else None
    template = (run.data.template, run.data.date, ends)
    return repr((run.model, run.runtime.device, run.task, labels, template))


class SharedBase:
    """A base model that several recipes are trained on, one after another."""

    def __init__(self, run: RunConfig, progress: Progress) -> None:
        self._load(run, progress)

    def _load(self, run: RunConfig, progress: Progress | None = None) -> None:
        self.loaded: LoadedModel = load_for(run, progress)
        self.needs = needs(run)
        self._keep(run)

    def _keep(self, run: RunConfig) -> None:
        self._dressed_for = (run.seed, run.adapter)
        self._first = read_adapter(self.loaded)

    def serves(self, run: RunConfig) -> bool:
        """Whether a recipe needs exactly this base and tokenizer."""
        return needs(run) == self.needs

    def dress(self, run: RunConfig) -> AdapterState:
        """Put a recipe's initial adapter on the base, and return it.

        The adapter is built again only for another seed or another kind of adapter. Base weights
        that were trained have to be loaded again.
        """
        assert self.serves(run)
        if self._dressed_for != (run.seed, run.adapter):
            if is_renewable(self.loaded, run.adapter):
                self.loaded = renew_adapter(self.loaded, run.adapter, seed=run.seed)
                self._keep(run)
            else:
                self._load(run)
        if run.train.packing:
            check_packing(self.loaded, run.train.max_length)
        write_adapter(self.loaded, self._first)
        return self._first


class Bench:
    """Trains recipes one after another, and keeps what the next one also needs."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._base: SharedBase | None = None
        self._tokens: tuple[str, Mapping[str, ClientData]] | None = None

    def run(self, folder: RunFolder, checked: Checked) -> Run:
        """Finish a run in its folder, which the caller has locked."""
        began, run = time.perf_counter(), checked.run
        if folder.read_json("summary.json") is not None:
            return Run(folder.path)
        if run.runtime.name != "in-process":  # the engine's processes load their own bases
            return run_in(folder, checked, self.progress, began=began)
        base = self._base_for(run)
        base.dress(run)
        data = self._data_for(checked, base.loaded)
        return run_in(folder, checked, self.progress, began=began, loaded=base.loaded, data=data)

    def _base_for(self, run: RunConfig) -> SharedBase:
        if self._base is None or not self._base.serves(run):
            self._base = self._tokens = None
            gc.collect()  # two bases at once may not fit
            self.progress.note(f"loading {run.model.name}")
            self._base = SharedBase(run, self.progress)
        return self._base

    def _data_for(self, checked: Checked, loaded: LoadedModel) -> Mapping[str, ClientData]:
        run = checked.run
        about = (fingerprint(checked.rows), run.train.max_length, run.evaluate.batch_size)
        if run.task == "prefer":  # what the reference says is kept with the tokens
            about = (*about, run.adapter.start)
        if self._tokens is None or self._tokens[0] != repr(about):
            task = build_task(run.task, run.data.labels, run.prefer)
            worker = Worker(loaded, task, run, fedavg(FedAvgConfig()))
            self._tokens = (repr(about), prepare_clients(checked.rows, worker))
            for text in warn_of_template(loaded.tokenizer, run, checked.rows):
                self.progress.note(f"warning: {text}")
        return self._tokens[1]

    def forget(self) -> None:
        """Drop the base and the tokens: after a failure their state is unknown."""
        self._base = self._tokens = None


def attempt(bench: Bench, folder: RunFolder) -> str | None:
    """Finish a run that no other run depends on. Returns why it failed, or None."""
    try:
        with folder.locked():
            bench.run(folder, check(folder.run))
    except (SilotuneError, MemoryError, torch.OutOfMemoryError) as error:
        bench.forget()
        return f"{type(error).__name__}: {error}"
    return None
