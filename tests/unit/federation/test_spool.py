"""The spool: files left by an earlier process are used, unless they cannot be trusted."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from silotune.core import atomic_files
from silotune.core.atomic_files import load_rows, save_rows
from silotune.core.errors import RunFolderError
from silotune.core.types import Score, Update
from silotune.federation import spool
from silotune.federation.spool import Spool


def update_of(client: str) -> Update:
    return Update(
        client=client,
        round=3,
        delta={"b": torch.tensor([[1.5, -0.0], [1e-42, 3.0]]), "a": torch.ones(())},
        num_examples=7,
        metrics={"train_loss": 1.25, "delta_norm": 2.0},
        settings={"mu": 0.1},
        extra={"control": {"b": torch.full((2, 2), 5.0, dtype=torch.float64)}},
        score=Score(client, 3.0, 2, 1, 1),
        bytes_down=20,
        bytes_up=20,
    )


def same(a: Update, b: Update) -> bool:
    def bits(u: Update):
        groups = {"delta": u.delta, **u.extra}
        return {(g, n): (t.dtype, t.tolist()) for g, s in groups.items() for n, t in s.items()}

    return bits(a) == bits(b) and replace(a, delta={}, extra={}) == replace(b, delta={}, extra={})


@pytest.fixture
def left(tmp_path):
    """A spool with three updates, left by a process that ended."""
    spool = Spool(tmp_path / "round")
    for name in ("west", "Zürich / 2", "east"):
        spool.add(update_of(name))
    return spool.folder


def test_a_spool_returns_every_bit_in_name_order(left):
    spool = Spool(left)
    assert spool.names() == ["Zürich / 2", "east", "west"]
    assert len(spool) == 3
    assert all(same(u, update_of(u.client)) for u in spool)
    assert [u.client for u in spool] == spool.names()


def test_a_spool_in_memory_has_the_same_reports_as_one_read_from_disk(left):
    fresh = Spool(left.parent / "other")
    for name in ("west", "Zürich / 2", "east"):
        fresh.add(update_of(name))
    assert fresh.reports() == Spool(left).reports()
    assert all(not report.delta and not report.extra for report in fresh.reports())


@pytest.mark.parametrize("kept", [0, 5, 100])
def test_a_truncated_update_is_dropped_and_its_client_asked_again(left, kept):
    path = left / "east.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert Spool(left).names() == ["Zürich / 2", "west"]
    assert not path.exists()


def test_a_spool_from_before_the_last_boot_is_dropped(left, monkeypatch):
    """It was not synced: after a power failure its values may be zeros."""
    monkeypatch.setattr(spool, "boot_id", lambda: "another boot")
    assert Spool(left).names() == []
    assert not left.exists()


def test_the_disk_is_waited_for_if_boots_cannot_be_distinguished(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(spool, "boot_id", lambda: "")
    monkeypatch.setattr(atomic_files.os, "fsync", waited.append)
    Spool(tmp_path / "round").add(update_of("east"))
    assert len(waited) == 1
    assert Spool(tmp_path / "round").names() == ["east"]


def test_the_disk_is_not_waited_for_if_boots_can_be_distinguished(tmp_path, monkeypatch):
    monkeypatch.setattr(spool, "boot_id", lambda: "this boot")
    monkeypatch.setattr(atomic_files.os, "fsync", lambda _: pytest.fail("waited"))
    Spool(tmp_path / "round").add(update_of("east"))


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]


@given(
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=6),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=6, max_size=6),
)
def test_saved_rows_keep_names_shapes_dtypes_and_bits(tmp_path_factory, shapes, dtypes):
    gen = torch.Generator().manual_seed(0)
    tensors = {
        f"t{i}": (torch.randn(shape, generator=gen) * 4).to(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    path = tmp_path_factory.mktemp("rows") / "x.safetensors"
    save_rows(path, tensors, about="a text, ü", sync=False)
    back, about = load_rows(path)
    assert about == "a text, ü"
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (back[name].shape, back[name].dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(back[name], tensor)


def test_a_damaged_file_of_rows_is_named_in_the_error(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\0" * 64)
    with pytest.raises(RunFolderError, match=r"x\.safetensors is damaged"):
        load_rows(path)
