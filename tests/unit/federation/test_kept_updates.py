"""Kept updates: what a round has used stays, complete, for as long as its result does."""

import errno
import os

import pytest
import torch

from silotune.core.errors import DiskError, RunFolderError
from silotune.core.types import ServerState, Update
from silotune.federation.kept_updates import UPDATES, keep_spool, kept_updates, wait_for_disk
from silotune.federation.run_folder import RunFolder
from silotune.recipes.parse import parse


def update_of(client: str, round_: int, value: float = 1.0) -> Update:
    return Update(client, round_, {"a": torch.full((2,), value)}, 7, {"train_loss": 1.0})


def folder_at(place, **checkpoint) -> RunFolder:
    table = {"rounds": 9, "data": {"path": "medquad_mini"}, "evaluate": {"every": 0}}
    return RunFolder.create(place, parse({**table, "checkpoint": checkpoint}))


def play(folder: RunFolder, round_: int, *, value: float = 1.0) -> None:
    """A round with two clients, up to and including its checkpoint."""
    spool = folder.spool(round_)
    for client in ("east", "west"):
        if client not in spool.names():
            spool.add(update_of(client, round_, value))
    rows = [
        {"event": "train", "round": round_, "client": name, "status": "ok", "num_examples": 7}
        for name in spool.names()
    ]
    failed = {"event": "train", "round": round_, "client": "south", "status": "timeout"}
    folder.append_metrics([*rows, failed])
    folder.save(ServerState(round_, {"a": torch.zeros(2)}), last=False)


@pytest.fixture
def folder(tmp_path):
    return folder_at(tmp_path / "run", keep_updates=True)


def values(folder: RunFolder, num_rounds: int) -> dict[int, list[tuple[str, float]]]:
    found = kept_updates(folder.path, folder.metrics(), num_rounds)
    return {r: [(u.client, float(u.delta["a"][0])) for u in kept] for r, kept in found.items()}


def test_updates_are_kept_as_they_were_and_only_those_that_were_used(folder):
    play(folder, 1)
    play(folder, 2, value=3.0)
    folder.clear_away()
    assert values(folder, 2) == {
        1: [("east", 1.0), ("west", 1.0)],
        2: [("east", 3.0), ("west", 3.0)],
    }
    kept = kept_updates(folder.path, folder.metrics(), 2)[1]
    assert (len(kept), [u.client for u in kept.without("east")]) == (2, ["west"])
    assert not (folder.path / "spool").exists()
    files = {p.name for p in (folder.path / UPDATES).rglob("*") if p.is_file()}
    assert files == {"east.safetensors", "west.safetensors"}


def test_without_the_key_nothing_is_kept(tmp_path):
    folder = folder_at(tmp_path / "run")
    play(folder, 1)
    assert not (folder.path / UPDATES).exists()


def test_updates_wait_in_the_spool_for_their_checkpoint(tmp_path):
    folder = folder_at(tmp_path / "run", keep_updates=True, every=2)
    play(folder, 1)
    assert not (folder.path / UPDATES).exists()
    assert folder.spool(1).names() == ["east", "west"]
    play(folder, 2)
    assert sorted(p.name for p in (folder.path / UPDATES).iterdir()) == [
        "round-00001",
        "round-00002",
    ]


def test_updates_are_on_disk_before_the_checkpoint_that_replaces_them(folder, monkeypatch):
    """A spool does not wait; after a power failure nobody could be asked for these again."""
    final, seen = folder.path / "checkpoints" / "round-00001", []

    def wait(spool):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: seen.append(final.exists()))
            wait_for_disk(spool)

    monkeypatch.setattr("silotune.federation.run_folder.wait_for_disk", wait)
    play(folder, 1)
    assert seen == [False, False]


@pytest.mark.parametrize("half", ["moved", "not moved"])
def test_a_kill_after_the_checkpoint_loses_no_update(folder, monkeypatch, half):
    def die(spool):
        if half == "moved":
            keep_spool(spool)
        raise KeyboardInterrupt

    monkeypatch.setattr("silotune.federation.run_folder.keep_spool", die)
    with pytest.raises(KeyboardInterrupt):
        play(folder, 1)
    monkeypatch.undo()
    again = RunFolder.open(folder.path)
    state = again.load_state()
    assert state is not None
    assert state.round == 1
    again.rewind(1)
    play(again, 2)
    assert [len(kept) for kept in values(again, 2).values()] == [2, 2]


def test_a_full_disk_is_one_error_and_the_updates_wait_in_the_spool(folder, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("silotune.federation.kept_updates.make_folder", full)
    with pytest.raises(DiskError, match="No space left"):
        play(folder, 1)
    monkeypatch.undo()
    folder.clear_away()  # of the resumed run
    assert [len(kept) for kept in values(folder, 1).values()] == [2]


def test_updates_of_rounds_that_are_repeated_are_dropped(folder):
    """After a damaged checkpoint was removed, for example: the repeated round may differ."""
    play(folder, 1)
    play(folder, 2)
    folder.rewind(1)
    assert [p.name for p in (folder.path / UPDATES).iterdir()] == ["round-00001"]
    play(folder, 2, value=5.0)
    assert values(folder, 2)[2] == [("east", 5.0), ("west", 5.0)]


def damage(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def swap(path):
    path.write_bytes(path.with_name("east.safetensors").read_bytes())


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda path: path.unlink(), "is gone: the update of client 'west' in round 1"),
        (damage, "is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:50]), "is damaged"),
        (swap, "is not the update of client 'west' in round 1"),
    ],
)
def test_an_update_that_is_gone_or_damaged_is_named_and_left_as_it_is(folder, harm, says):
    play(folder, 1)
    path = folder.path / UPDATES / "round-00001" / "west.safetensors"
    harm(path)
    before = path.exists() and path.read_bytes()
    with pytest.raises(RunFolderError, match=says) as caught:
        values(folder, 1)
    assert "checkpoint.keep_updates=true" in str(caught.value)
    assert (path.exists() and path.read_bytes()) == before
