"""What goes down to clients: the whole adapter, or only what is new since the one before.

A client that has received the adapter of the round before is sent news: the tensors that have
changed, or what `wire.down` makes of their changes. With a codec, the server goes on from what
clients can know, and what that leaves out is added to the next change (error feedback); so the
adapter of a checkpoint is the one that clients hold and score.

The first adapter does not travel to clients whose own model begins with the same one: its numbers
follow from the recipe's seed, and a client reports their hash.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from silotune.compression.changes import codec_of, decode_change, encode_change, payload_layout
from silotune.compression.config import WireConfig
from silotune.core.algorithm import Algorithm
from silotune.core.atomic_files import load_tensors, make_folder, save_tensors
from silotune.core.errors import RunFolderError, UpdateError
from silotune.core.lora import without_identities
from silotune.core.tree import (
    add,
    check_same_layout,
    layout_bytes,
    layout_of,
    sha256,
    size_bytes,
    subtract,
)
from silotune.core.types import AdapterState, Broadcast, Layout, News, ServerState
from silotune.recipes.schema import RunConfig

HELD = "held.safetensors"
"""In a client's own folder of a run: the adapter that it received last."""
UNSENT = "unsent down"
"""In `ServerState.extra`: what the codec has left out of the changes so far."""
NOTHING = News(-1, (), {})
"""The news of the first adapter, which no other comes before."""


def is_made_by_clients(run: RunConfig, algorithm: Algorithm) -> bool:
    """Whether the seed alone decides the first adapter, so that clients have it already.

    Not if it comes from a file, or if clients train at ranks of their own.
    """
    return run.adapter.start is None and algorithm.tailor is None


def with_known_first(run: RunConfig, algorithm: Algorithm, state: ServerState) -> ServerState:
    """The state that a run or its next part begins with: it says if the first adapter is known."""
    if state.round == 0 and is_made_by_clients(run, algorithm):
        return replace(state, news=NOTHING)
    return state


def settle(
    run: RunConfig, algorithm: Algorithm, before: ServerState, after: ServerState
) -> ServerState:
    """The state after a round as clients can know it, with the news that tell them.

    Args:
        run: The recipe.
        algorithm: Says which tensors a round changes.
        before: What the clients of the round received.
        after: What the round has made of it.
    """
    if algorithm.tailor is not None or layout_of(before.adapter) != layout_of(after.adapter):
        return replace(after, news=None)  # every client needs tensors of its own, or new ones
    unsent = after.extra.get(UNSENT, {})
    names = tuple(
        name
        for name in sorted(after.adapter)
        if may_change(run, algorithm, name, after.round)
        or not torch.equal(before.adapter[name], after.adapter[name])
    )
    now = {name: after.adapter[name] for name in names}
    if (codec := codec_of(run.wire.down, run.wire)) is None or not now:
        return replace(after, news=News(before.round, names, now))
    old = {name: before.adapter[name] for name in names}
    payload, left = encode_change(codec, subtract(now, old), unsent)
    news = News(before.round, names, payload)
    extra = {**after.extra, **({UNSENT: left} if run.wire.error_feedback else {})}
    adapter = with_news(run.wire, before.adapter, news)
    return replace(after, adapter=adapter, extra=extra, news=news)


def result_of(state: ServerState, algorithm: Algorithm) -> ServerState:
    """The last state with the adapter that leaves the run, of which news may say nothing."""
    result = algorithm.result(state)
    if result is state.adapter:
        return state
    return replace(state, adapter=result, news=None)


def may_change(run: RunConfig, algorithm: Algorithm, name: str, round_: int) -> bool:
    """Whether a tensor may change in a round, which is known before it."""
    if algorithm.local.personal(name):
        return False
    return (
        run.server.work != "none"
        or algorithm.local.trains(name, round_)
        or algorithm.rewrites(name, round_)
    )


def with_news(cfg: WireConfig, adapter: AdapterState, news: News) -> AdapterState:
    """The adapter of a round, from that of the round before. The same bits on both sides.

    Args:
        cfg: The recipe's.
        adapter: Of round `news.base`.
        news: Of the round after; may be anybody's.

    Raises:
        UpdateError: The news do not fit the adapter.
    """
    who = f"the news since round {news.base}"
    if strangers := sorted(set(news.names) - adapter.keys()):
        raise UpdateError(f"{who} are about '{strangers[0]}', which the adapter does not have.")
    old = {name: adapter[name] for name in news.names}
    check_same_layout(news.payload, news_layout(cfg, layout_of(old)), who=who)
    if (codec := codec_of(cfg.down, cfg)) is None or not old:
        return {**adapter, **news.payload}
    return {**adapter, **add(old, decode_change(codec, news.payload, layout_of(old)))}


def news_layout(cfg: WireConfig, layout: Layout) -> Layout:
    """The layout of the payload of news about tensors of this layout."""
    codec = codec_of(cfg.down, cfg)
    # nothing new has no payload, where a codec would make an empty one
    return layout if codec is None or not layout else payload_layout(codec, layout)


def news_bytes(run: RunConfig, algorithm: Algorithm, state: ServerState, round_: int) -> int:
    """Bytes of the news of a round, as far as they are known before it.

    Args:
        run: The recipe.
        algorithm: Says what a round changes.
        state: Any state of the run; only the sizes of its tensors matter.
        round_: The round.
    """
    own = {n: t for n, t in state.adapter.items() if may_change(run, algorithm, n, round_)}
    if algorithm.tailor is not None:
        return size_bytes(state.adapter)
    if round_ == 0:  # nobody is told, or nothing is new
        return 0
    return layout_bytes(news_layout(run.wire, layout_of(own)))


def hold(folder: Path, broadcast: Broadcast) -> None:
    """Keep the adapter that a client has received, in its own folder of the run."""
    make_folder(folder)
    about = {"round": str(broadcast.round - 1)}
    save_tensors(folder / HELD, broadcast.adapter, about=about)


def held(folder: Path, base: int) -> AdapterState:
    """The adapter that a client holds.

    Raises:
        UpdateError: It is not that of this round. The server sends the whole adapter next time.
    """
    path, found = folder / HELD, None
    if path.is_file():
        with contextlib.suppress(RunFolderError):
            adapter, about = load_tensors(path)
            found = int(about["round"])
            if found == base:
                return adapter
    raise UpdateError(
        f"the server sent what is new since round {base}, and this client holds "
        f"{'no adapter' if found is None else f'that of round {found}'}.\n"
        "  Nothing is lost: it receives the whole adapter with the next message."
    )


class Holdings:
    """Which adapter each client holds. After an interruption nobody is known to hold any."""

    def __init__(
        self,
        start: AdapterState | None = None,
        *,
        makes_first: Callable[[str, str], bool] | None = None,
    ) -> None:
        """Nobody has received anything.

        Args:
            start: The adapter that the run started from, if every client needs it, see
                `first_adapter.start_to_send`.
            makes_first: Whether the model of a client begins with the adapter of this SHA-256;
                None: that of none is known to.
        """
        self._start = start
        self._held: dict[str, int | None] = {}
        self._started: set[str] = set()
        self._first: str | None = None
        self._makes_first = makes_first

    def tell_all(self, messages: Mapping[str, Broadcast]) -> dict[str, Broadcast]:
        """What each client has to be sent. Those that are sent the same share one object."""
        made: dict[tuple[int, bool, bool, bool], Broadcast] = {}
        found: dict[str, Broadcast] = {}
        for client, broadcast in messages.items():
            told = self.tell(client, broadcast)
            news = told.news
            is_known = news is not None and not news.payload
            key = (id(broadcast), news is None, is_known, bool(told.start))
            found[client] = made.setdefault(key, told)
        return found

    def tell(self, client: str, broadcast: Broadcast) -> Broadcast:
        """What this client has to be sent: the same broadcast with either adapter or news."""
        told = self._adapter_or_news(client, broadcast)
        if self._start is None or client in self._started or is_start(broadcast, self._start):
            return told
        return replace(told, start=self._start)

    def _adapter_or_news(self, client: str, broadcast: Broadcast) -> Broadcast:
        version = broadcast.round - 1
        if broadcast.news is None:  # of a result, for example, which nobody holds under its round
            return broadcast
        if version == 0 and self._first is None:
            self._first = sha256(broadcast.adapter)
        held = self._holds(client)
        if held == version:
            return replace(broadcast, adapter={}, news=News(version, (), {}))
        if held == broadcast.news.base == version - 1:
            return replace(broadcast, adapter={})
        return replace(broadcast, news=None)

    def note(self, client: str, broadcast: Broadcast, *, answered: bool) -> None:
        """Remember that a client has answered, so it holds what it was sent; or that it failed."""
        self._held[client] = broadcast.round - 1 if answered else None
        if answered:
            self._started.add(client)
        else:
            self._started.discard(client)

    def _holds(self, client: str) -> int | None:
        makes, first, held = self._makes_first, self._first, self._held.get(client, 0)
        if makes is not None and first is not None and held == 0:
            # whose own is another may have lost the one received, and must not add news to its own
            return 0 if makes(client, first) else None
        return self._held.get(client)


def is_start(broadcast: Broadcast, start: AdapterState) -> bool:
    """Whether a message's adapter is the one that the run started from."""
    first = without_identities(broadcast.adapter)
    return (
        broadcast.round == 1
        and layout_of(first) == layout_of(start)
        and all(torch.equal(first[name], tensor) for name, tensor in start.items())
    )


def bytes_of(told: Broadcast) -> int:
    """Bytes of the tensors in a message, as `Holdings.tell` makes it."""
    news: Mapping[str, torch.Tensor] = {} if told.news is None else told.news.payload
    return sum(map(size_bytes, (told.adapter, news, told.start, *told.extra.values())))
