"""What secure sums cost a client and the engine: a round with masks against one without.

    python benchmarks/masks.py [--only protocol|engine] [--clients 5] [--rounds 8]

Seconds are seconds of a processor, so that other work on the machine changes little.

The first part has no engine and no model: random numbers, as many as an adapter of `hospitals` has
(SmolLM2-135M, rank 8, q_proj and v_proj), go through the code of real clients with kits, and of the
server. The second part is a consortium on this machine with real processes, as in deployment.py,
and counts all that a client's processes need in a round, the start of processes included.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from deployment import SHORT, of_small, quiet, rows_of, small_base

from silotune.core.types import Update
from silotune.deployment.consortium.folder import Consortium
from silotune.deployment.join import OWN, init, take_kit
from silotune.deployment.orders import FAILED, STOPPED, state_of
from silotune.deployment.queue import submit
from silotune.deployment.rehearse import clients_of, consortium_of, follow
from silotune.federation.client_config import load_client_config
from silotune.federation.run_folder import RunFolder
from silotune.federation.secure_sum import TENSOR
from silotune.privacy.secure_sum.ring import Words
from silotune.recipes.parse import load_recipe
from silotune.recipes.schema import RunConfig
from silotune.runtime import wire
from silotune.runtime.client_sums import ClientSums
from silotune.runtime.identity import add_roster, identity_of
from silotune.runtime.payload import Parcel, pack
from silotune.runtime.sum_relay import Relay

LAYERS, RANK = 30, 8
WIDTHS = {"q_proj": (576, 576), "v_proj": (576, 192)}
"""SmolLM2-135M: numbers that go into and come out of the layers that `hospitals` adapts."""
MASKS = ["secure_sum.kind=masks", "secure_sum.range=1.0", "secure_sum.min_cohort=3"]
KEYS = ["evaluate.every=0", "algorithm.weights=uniform", "runtime.name=flower"]


def main() -> None:
    """Measure, and print the results."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--only", choices=("protocol", "engine"))
    options.add_argument("--clients", type=int, default=5)
    options.add_argument("--rounds", type=int, default=8)
    args = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if args.only != "engine":
            Protocol(Path(scratch), args.clients, args.rounds).measure()
        if args.only != "protocol":
            engine(Path(scratch), args.clients, args.rounds)


# --- without an engine


class Protocol:
    """The clients' and the server's halves of secure sums, in one process."""

    def __init__(self, place: Path, num_clients: int, num_rounds: int) -> None:
        """Make a consortium's kits, and a client.toml with a roster for each client."""
        self.place = place
        keys = [*MASKS, *KEYS, f"rounds={num_rounds}"]
        self.run: RunConfig = load_recipe("hospitals", keys)
        self.names = [f"client-{n}" for n in range(num_clients)]
        self.folder = RunFolder.create(place / "run", self.run)
        self.clients = dict(zip(self.names, self._with_kits(), strict=True))
        self.spent = dict.fromkeys(self.names, 0.0)
        """Seconds of a processor, by client."""
        self.bytes: dict[str, int] = {}
        """Most bytes to and from one client, by message."""
        self.num_messages = 0

    def _with_kits(self) -> Iterator[ClientSums]:
        Consortium.create(self.place / "consortium", name="bench", address="localhost")
        consortium = Consortium.open(self.place / "consortium")
        configs: dict[str, Path] = {}
        roster: dict[str, str] = {}
        for name in self.names:
            own = self.place / name
            request, roster[name] = init(name, own)
            kit, _ = consortium.approve(request)
            (own / "rows.jsonl").write_text('{"question": "?", "answer": "!"}\n')
            take_kit(kit, own, data=own / "rows.jsonl")
            configs[name] = own / OWN
        add_roster(configs, roster)
        for name, path in configs.items():
            identity = identity_of(path, load_client_config(path))
            state = self.place / name / "state"
            yield ClientSums(name, self.run, self.folder.run_id(), state, identity, 3)

    def ask(self, kind: str, told: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """Have every client answer, and count its seconds and bytes."""
        self.num_messages += 1
        for name, about in told.items():
            began = time.process_time()
            said = self.clients[name].answer(kind, dict(about), lambda _: num_numbers())
            self.spent[name] += time.process_time() - began
            size = len(pack(Parcel(dict(about)))) + len(pack(Parcel(said)))
            self.bytes[kind] = max(size, self.bytes.get(kind, 0))
            yield name, said

    def measure(self) -> None:
        """Run the rounds, and print what masks add to each."""
        relay = Relay(self.run, self.folder.run_id(), self.folder, self.ask)
        plain: list[float] = []
        masked: list[float] = []
        messages: list[int] = []
        server: list[float] = []
        bare = 0
        for round_ in range(1, self.run.rounds + 1):
            self.spent, self.num_messages = dict.fromkeys(self.names, 0.0), 1
            failures, beside = relay.begin(round_, self.names)
            assert not failures, failures
            total = np.zeros(num_numbers() + 1, dtype=np.uint32)
            for name in self.names:
                update = random_update(name, round_)
                began = time.process_time()
                bare = len(pack(wire.encode_update(update)))
                plain.append(time.process_time() - began)
                total += self._masked(update, beside[name], round_)
            began, before = time.process_time(), sum(self.spent.values())
            relay.open(round_, self.names, total)
            clients = sum(self.spent.values()) - before
            server.append(time.process_time() - began - clients)
            masked += self.spent.values()
            messages.append(self.num_messages)
        first, num = len(self.names), len(self.names)
        up = self.bytes["train"]
        print(f"{num} clients, {num_numbers():,} numbers each, {self.run.rounds} rounds")
        print(
            "seconds of a processor at a client, median (and largest), packing the update included"
        )
        print(f"  without masks          {told(plain)}")
        print(f"  with masks, round 1    {told(masked[:first])}")
        print(f"  with masks, from then  {told(masked[first:])}")
        print(f"  of the server, to open a sum  {told(server[1:])}")
        print(
            f"messages to a client: 1 without masks; with masks {messages[0]}, then {messages[1]}"
        )
        extra = up + self.bytes["query.open"]
        print(f"bytes of a client's update: {bare:,} without masks, {up:,} with ({up / bare:.4f})")
        print(f"and of the message that opens a sum: {extra - up:,} ({extra / bare:.4f} in all)")

    def _masked(self, update: Update, beside: dict[str, Any], round_: int) -> Words:
        sums, parcel = self.clients[update.client], Parcel({"round": round_, **beside})
        began = time.process_time()
        _, shares = sums.taken_from(parcel)
        hidden = sums.hide(update, shares)
        sent = pack(wire.encode_update(hidden))
        self.spent[update.client] += time.process_time() - began
        self.bytes["train"] = len(sent) + len(pack(Parcel(beside)))
        return hidden.delta[TENSOR].numpy().view(np.uint32)


def num_numbers() -> int:
    """How many numbers an adapter of `hospitals` has."""
    return LAYERS * RANK * sum(map(sum, WIDTHS.values()))


def random_update(name: str, round_: int) -> Update:
    """A change of the size of those of `hospitals`."""
    delta: dict[str, torch.Tensor] = {}
    for layer, (module, (into, out)) in itertools.product(range(LAYERS), WIDTHS.items()):
        at = f"layers.{layer}.{module}"
        delta[f"{at}.lora_A"] = 0.01 * torch.randn(RANK, into)
        delta[f"{at}.lora_B"] = 0.01 * torch.randn(out, RANK)
    metrics = {"lr": 1e-3, "num_steps": 8.0}
    return Update(name, round_, delta, 117, metrics)


def told(seconds: list[float]) -> str:
    """Median and largest."""
    return f"{statistics.median(seconds):.3f} ({max(seconds):.3f})"


# --- with the engine


def engine(place: Path, num_clients: int, num_rounds: int) -> None:
    """Print what all processes of a client need in a round of a consortium."""
    base = small_base(place / "base")
    own = [*SHORT, *of_small(base), f"rounds={num_rounds}", "algorithm.weights=uniform"]
    run, rows = clients_of("hospitals", [*own, *MASKS], num_clients)
    print(
        f"\n{num_clients} clients with real processes, {num_rounds} rounds; seconds of a processor"
    )
    with consortium_of(run, rows, place / "consortium-here", quiet) as (folder, kept):
        clients = sorted((folder.parent / "clients").iterdir())
        for words, keys in (("without masks", []), ("with masks", MASKS)):
            made = submit(folder, "hospitals", [*own, *keys])
            marks: list[tuple[float, int]] = []
            while len(marks) < 2 and state_of(made)["state"] not in (FAILED, STOPPED):
                ended = len(rows_of(made, "round")) if (made / "metrics.jsonl").exists() else 0
                if ended >= (1 if not marks else num_rounds - 1):
                    marks.append((sum(map(seconds_of, clients)), ended))
                time.sleep(0.2)
            follow(made, kept, quiet)
            (before, first), (after, last) = marks
            each = (after - before) / (last - first) / len(clients)
            sent = rows_of(made, "train")[-1]
            print(f"  {words:13}  {each:.2f} a round at a client, {sent['bytes_up']:,} bytes up")


def seconds_of(client: Path) -> float:
    """Seconds of a processor that all processes of a client have used so far."""
    found: dict[int, float] = {}
    for process in psutil.process_iter():
        try:
            if str(client) in " ".join(process.cmdline()):
                for own in (process, *process.children(recursive=True)):
                    used = own.cpu_times()
                    ended = used.children_user + used.children_system
                    found[own.pid] = used.user + used.system + ended
        except psutil.Error:
            continue
    return sum(found.values())


if __name__ == "__main__":
    main()
