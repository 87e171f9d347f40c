"""The client's side of Flower: a message comes in, a `Station` answers it, a reply goes out.

In simulation the station lives in this process, an actor that Ray keeps. In deployment Flower
starts a new process for every message, so the station lives in a resident worker. This file then
only passes parcels on, and imports neither torch nor a model library.
"""

import json
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from silotune.runtime.flower.bundle import TOLD
from silotune.runtime.flower.records import from_record, to_record
from silotune.runtime.payload import Parcel, round_of

if TYPE_CHECKING:
    from silotune.federation.run_folder import RunFolder
    from silotune.recipes.schema import RunConfig
    from silotune.runtime.client_host import Station
    from silotune.runtime.client_sums import ClientSums

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say who this is, what it holds and what it runs."""
    return _answer("query", message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round."""
    return _answer("train", message, context)


@app.query("keys")
def keys(message: Message, context: Context) -> Message:
    """Secure sums: make keys for a round."""
    return _answer("query.keys", message, context)


@app.query("shares")
def shares(message: Message, context: Context) -> Message:
    """Secure sums: share their secrets among the clients of the round."""
    return _answer("query.shares", message, context)


@app.query("open")
def open_(message: Message, context: Context) -> Message:
    """Secure sums: give the shares that open a sum."""
    return _answer("query.open", message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score an adapter on the held-out rows."""
    return _answer("evaluate", message, context)


def _answer(kind: str, message: Message, context: Context) -> Message:
    told = dict(context.run_config)
    if "runs" in told:  # an exported app: each run has a folder, named by Flower's number
        told["folder"] = str(Path(str(told["runs"])) / str(context.run_id))
    reply = pass_on(kind, from_record(message.content), told, context.node_config)
    return Message(to_record(reply), reply_to=message)


def pass_on(kind: str, parcel: Parcel, run: Mapping[str, Any], node: Mapping[str, Any]) -> Parcel:
    """Pass a parcel to what answers it. Only this function distinguishes simulation and deployment.

    Args:
        kind: query, train, evaluate, or one of the messages of secure sums (`sum_wire.STEPS`).
        parcel: What the server sent.
        run: The run's config: recipe, names of the clients, run folder.
        node: This node's config: `client`, the path of a client's own configuration; or
            `partition-id`, the number of a simulated client.
    """
    round_ = round_of(parcel.about)
    if "client" in node:
        from silotune.runtime.flower.resident_worker import ask

        asked = {key: run[key] for key in TOLD if key in run}
        asked |= {"kind": kind, "parcel": parcel.about}
        return ask(Path(str(node["client"])), Parcel(asked, parcel.values), round_=round_)
    from silotune.runtime.client_host import guarded

    name = json.loads(str(run["clients"]))[int(node["partition-id"])]

    def work() -> Parcel:
        station = _station(str(run["recipe"]), str(run["folder"]))
        return station.answer(kind, name, parcel)

    return guarded(work, client=name, round_=round_)


@lru_cache(maxsize=1)
def _station(recipe: str, folder: str) -> "Station":
    """The simulated clients' station, once per actor."""
    from silotune.data.clients import load_clients
    from silotune.federation.run_folder import RunFolder
    from silotune.recipes.schema import RunConfig
    from silotune.runtime.client_host import Place, Station

    run = RunConfig.model_validate_json(recipe)
    rows = load_clients(
        run.data,
        run.partition,
        seed=run.seed,
        task=run.task,
        server_fraction=run.server.data_fraction,
    )
    run_folder = RunFolder(Path(folder), run)
    sums = partial(_sums, run, run_folder) if run.secure_sum.is_on else None
    return Station(Place(run, rows.__getitem__, run_folder.client_folder, sums=sums))


def _sums(run: "RunConfig", folder: "RunFolder", name: str) -> "ClientSums":
    """A simulated client's half of secure sums. Its keys are throwaway ones."""
    from silotune.runtime.client_sums import ClientSums
    from silotune.runtime.identity import throwaway_of

    identity, smallest = throwaway_of(folder.path, name), run.secure_sum.min_cohort
    own = folder.client_folder(name)
    return ClientSums(name, run, folder.run_id(), own, identity, smallest)
