"""One client on several processes: each step's rows are dealt out, and the gradients are added up.

The client's own process does everything else, as without it: it chooses rows, changes gradients as
the algorithm says, clips, and takes the step. Its helpers hold the same base and no state: with
every step they receive the trained tensors and their rows, and return their share of the gradient
of the step's loss, which is a sum over rows. torch.distributed carries both, over gloo between
processors and NCCL between GPUs (Li et al. 2020, arXiv:2006.15704, section 2.2, is the same sum).
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.convert_parameters import parameters_to_vector, vector_to_parameters

from silotune.core.atomic_files import write_atomically
from silotune.core.errors import ModelError, SilotuneError
from silotune.core.types import AdapterState
from silotune.core.wording import counted
from silotune.federation.recipe_model import load_for
from silotune.models.devices import pick_device
from silotune.models.loading import LoadedModel, write_adapter
from silotune.privacy.record_level import RowGuard
from silotune.recipes.schema import RunConfig
from silotune.training.local_step import Totals, backward
from silotune.training.own_functions import own_loss
from silotune.training.tasks import build_task
from silotune.training.tasks.base import Batch, Task

PATIENCE = timedelta(days=30)
"""How long a helper waits for its next step: rounds of real clients may be days apart."""
RECIPE, READY = "recipe.json", "ready-"
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


@dataclass(frozen=True)
class Order:
    """What a helper does next."""

    adapter: AdapterState | None = None
    """A client's round begins: everything that is trained or stands beside it."""
    names: tuple[str, ...] = ()
    """Otherwise a step: the tensors that are trained."""
    num_terms: int = 0
    """Terms of the step's loss, over all processes."""
    batches: tuple[Batch, ...] = ()
    seed: int = 0
    """Of the step's dropout at this helper."""


class Team:
    """The client's own process and its helpers, while they hold the base of one recipe."""

    def __init__(self, run: RunConfig) -> None:
        """Start the helpers, and wait until each has loaded the base.

        Args:
            run: The recipe; runtime.client_processes counts this process, too.

        Raises:
            ModelError: There are fewer GPUs than processes, or a helper could not load the base.
        """
        self.size, self._threads = run.runtime.client_processes, _threads_each(run)
        device = pick_device(run.runtime.device).type
        num_devices = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device, self.size)
        if num_devices < self.size:
            raise ModelError(
                f"runtime.client_processes = {self.size}, but {counted(num_devices, 'GPU')} can be "
                "used.\n  Each process needs one of its own: lower it, or set runtime.device = "
                "'cpu'."
            )
        self._scratch = tempfile.TemporaryDirectory(prefix="silotune-team-")
        place = Path(self._scratch.name)
        (place / RECIPE).write_text(run.model_dump_json(serialize_as_any=True), encoding="utf-8")
        # not multiprocessing, which would run a script that calls this a second time
        self._helpers = [
            subprocess.Popen(
                [sys.executable, "-m", "silotune.federation.team", str(n), str(place)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
            )
            for n in range(1, self.size)
        ]
        try:
            for n, helper in enumerate(self._helpers, 1):
                _wait_for(helper, place / f"{READY}{n}")
            with _failing("could not be reached"):
                _meet(place, 0, self.size, is_cuda=device == "cuda")
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def training(self, adapter: AdapterState) -> Iterator[None]:
        """Inside, `backward` may be called; the processors are shared with the helpers.

        Args:
            adapter: What this process's model holds, with what stands beside it.
        """
        own = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            with _failing("ended"):
                self._tell([Order(adapter=adapter)] * self.size)
            yield
        finally:
            torch.set_num_threads(own)

    def backward(
        self,
        loaded: LoadedModel,
        batches: Sequence[Batch],
        task: Task,
        learning: Mapping[str, nn.Parameter],
        guard: RowGuard | None,
        totals: Totals,
    ) -> None:
        """As `local_step.backward`, with the batches dealt out one by one.

        Raises:
            ModelError: A helper has ended.
        """
        assert guard is None, "the recipe's check refuses it"
        num_terms = sum(batch.num_terms for batch in batches)
        if num_terms == 0:  # a client without rows: no gradient, as in one process
            return
        seeds = torch.randint(2**62, (self.size,)).tolist()
        orders = [
            Order(None, tuple(learning), num_terms, tuple(batches[n :: self.size]), seeds[n])
            for n in range(self.size)
        ]
        before, totals.loss_sum = totals.loss_sum, torch.zeros_like(totals.loss_sum)
        with _failing("ended"):
            self._tell(orders)
            dist.broadcast(parameters_to_vector(learning.values()).detach(), src=0)
            backward(loaded, orders[0].batches, task, learning, None, totals, num_terms=num_terms)
            _add_up(learning, totals.loss_sum)
        totals.loss_sum += before
        for batch in (batch for order in orders[1:] for batch in order.batches):
            totals.num_tokens += batch.num_real_tokens
            totals.num_padded_tokens += batch.ids.numel()

    def _tell(self, orders: Sequence[Order]) -> None:
        dist.scatter_object_list([None], list(orders), src=0)

    def close(self) -> None:
        """End the helpers."""
        if dist.is_initialized():
            dist.destroy_process_group()
        for helper in self._helpers:
            helper.kill()  # it holds nothing
            helper.communicate()
        self._helpers.clear()
        self._scratch.cleanup()


@contextlib.contextmanager
def team_of(run: RunConfig) -> Iterator[Team | None]:
    """A team while a recipe runs, if it asks for one."""
    if run.runtime.client_processes == 1:
        yield None
        return
    team = Team(run)
    try:
        yield team
    finally:
        team.close()


def help_with(number: int, place: Path) -> None:
    """A helper's whole life: load the base, then follow orders until nobody gives any.

    Args:
        number: 1 for the first helper.
        place: A folder that only these processes share, with the recipe. The helper leaves a file
            there once the base is loaded: empty, or with what went wrong.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the client's own process, which ends this
    threading.Thread(target=_end_with_the_client, daemon=True).start()
    ready = place / f"{READY}{number}"
    run = RunConfig.model_validate_json((place / RECIPE).read_bytes())
    is_cuda = pick_device(run.runtime.device).type == "cuda"
    if is_cuda:
        torch.cuda.set_device(number)
    try:
        loaded = load_for(run)
        task = own_loss(run.train.loss, build_task(run.task, run.data.labels, run.prefer))
    except SilotuneError as error:
        write_atomically(ready, str(error).encode())
        return
    torch.set_num_threads(_threads_each(run))
    loaded.model.train()
    write_atomically(ready, b"")
    _meet(place, number, run.runtime.client_processes, is_cuda=is_cuda)
    with contextlib.suppress(RuntimeError):  # the client's own process has ended
        while True:
            told: list[Any] = [None]
            dist.scatter_object_list(told, None, src=0)
            _follow(told[0], loaded, task)


def _end_with_the_client() -> None:
    """Its end closes this pipe, however it came about."""
    sys.stdin.buffer.read()
    os._exit(0)


def _follow(order: Order, loaded: LoadedModel, task: Task) -> None:
    if order.adapter is not None:
        write_adapter(loaded, order.adapter)
        return
    learning = {name: loaded.parameters[name] for name in order.names}
    for name, p in loaded.parameters.items():
        p.requires_grad_(name in learning)
        p.grad = None
    now = parameters_to_vector(learning.values()).detach()
    dist.broadcast(now, src=0)
    with torch.no_grad():
        vector_to_parameters(now, learning.values())
    torch.manual_seed(order.seed)
    totals = Totals.zero(loaded.device)
    backward(loaded, order.batches, task, learning, None, totals, num_terms=order.num_terms)
    _add_up(learning, totals.loss_sum)


def _add_up(learning: Mapping[str, nn.Parameter], loss_sum: Tensor) -> None:
    """Add all processes' gradients and losses, at the client's own process, in place."""
    for p in learning.values():
        if p.grad is None:  # no row was dealt to this process
            p.grad = torch.zeros_like(p)
    gradients = [p.grad for p in learning.values() if p.grad is not None]
    whole = torch.cat([gradient.flatten() for gradient in gradients])
    dist.reduce(whole, dst=0)
    dist.reduce(loss_sum, dst=0)
    parts = whole.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def _threads_each(run: RunConfig) -> int:
    return max(1, run.runtime.threads // run.runtime.client_processes)


def _meet(place: Path, number: int, size: int, *, is_cuda: bool) -> None:
    """Join the group of a client's processes, which listen on this machine only."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", LOOPBACK)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
        init_method=f"file://{place / 'meeting'}",
        rank=number,
        world_size=size,
        timeout=PATIENCE,
    )


def _wait_for(helper: "subprocess.Popen[bytes]", ready: Path) -> None:
    while not ready.is_file():
        if helper.poll() is not None:
            raise _not_started("its process ended; was there enough memory for another base?")
        time.sleep(0.05)
    if problem := ready.read_text(encoding="utf-8"):
        raise _not_started(problem)


def _not_started(why: str) -> ModelError:
    return ModelError(f"a helper of runtime.client_processes did not start: {why}")


@contextlib.contextmanager
def _failing(how: str) -> Iterator[None]:
    """What torch.distributed raises, as a sentence for the person who runs this client."""
    try:
        yield
    except RuntimeError as error:
        raise ModelError(
            f"a helper process of runtime.client_processes {how}: {error}\n  Is there enough "
            "memory for one copy of the base per process?"
        ) from error


if __name__ == "__main__":
    from silotune.federation import team  # orders name this module, and not __main__

    team.help_with(int(sys.argv[1]), Path(sys.argv[2]))
