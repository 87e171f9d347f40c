"""Checksums: every changed bit of a listed file, or of a file of tensors, is found."""

import json
import subprocess

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from silotune.core.atomic_files import load_rows, load_tensors, save_rows, save_tensors
from silotune.core.checksums import FILE, check_listed, list_files, listed, take_off
from silotune.core.errors import RunFolderError

TENSORS = {
    "b": torch.tensor([[1.5, -0.0], [1e-42, 3.0]]),
    "a": torch.ones(()),
    "half": torch.tensor([0.5, 2.0], dtype=torch.bfloat16),
    "none": torch.empty(0, 3),
}


def flips(path):
    """Every copy of a file with one bit flipped, written to its place; a bit per byte."""
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        yield at
    path.write_bytes(whole)


def same(found, wanted) -> bool:
    def bits(tensors):
        return {n: (t.dtype, t.shape, t.view(torch.uint8).tolist()) for n, t in flat(tensors)}

    def flat(tensors):
        return [(n, t.reshape(1, -1) if t.ndim == 0 else t) for n, t in tensors.items()]

    return bits(found) == bits(wanted)


def test_no_flipped_bit_of_a_checkpoint_gives_other_tensors_or_metadata(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS, about={"round": "3"})
    refused = 0
    for at in flips(path):
        try:
            tensors, about = load_tensors(path)
        except RunFolderError:
            refused += 1
        else:  # a blank in the header's padding, for example
            assert same(tensors, TENSORS), at
            assert about == {"round": "3"}
    assert refused > 0.8 * path.stat().st_size
    assert same(load_tensors(path)[0], TENSORS)


def test_no_flipped_bit_of_a_spooled_update_gives_another_one(tmp_path):
    path = tmp_path / "x.safetensors"
    save_rows(path, TENSORS, about="a text", sync=False)
    for _ in flips(path):
        try:
            tensors, about = load_rows(path)
        except RunFolderError:
            continue
        assert same(tensors, TENSORS)
        assert about == "a text"


def test_a_file_of_an_earlier_version_is_refused_with_what_to_do(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "x", metadata={"round": "3"})
    with pytest.raises(RunFolderError, match=r"has no SHA-256[\s\S]*version that began it"):
        load_tensors(tmp_path / "x")


def test_other_programs_read_the_same_tensors(tmp_path):
    save_tensors(tmp_path / "x", TENSORS, about={"round": "3"})
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert sorted(file.keys()) == sorted(TENSORS)
        assert file.metadata()["round"] == "3"


# --- the list of a folder


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "adapter").mkdir()
    for name in ("a.json", "adapter/b", "c d.txt"):
        (tmp_path / name).write_text(json.dumps({"name": name}))
    list_files(tmp_path, ["a.json", "adapter/b"])
    list_files(tmp_path, ["c d.txt"])
    return tmp_path


def test_sha256sum_checks_the_list(folder):
    words = ["sha256sum", "--check", "--strict", FILE]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.count(": OK") == 3


def test_every_flipped_bit_of_a_listed_file_is_found(folder):
    for _ in flips(folder / "a.json"):
        with pytest.raises(RunFolderError, match=r"a\.json has changed[\s\S]*Do this\."):
            check_listed(folder, "a.json", fix="Do this.")
    check_listed(folder, "a.json", fix="Do this.")


def test_a_listed_file_that_is_gone_is_named(folder):
    (folder / "adapter" / "b").unlink()
    with pytest.raises(RunFolderError, match="adapter/b cannot be read: No such file"):
        check_listed(folder, "adapter/b", fix="Do this.")


def test_a_folder_of_files_is_taken_off_the_list_and_nothing_else(folder):
    take_off(folder, "adapter/")
    assert sorted(listed(folder)) == ["a.json", "c d.txt"]


@pytest.mark.parametrize("damage", [b"\xff", b"abc  a.json\n", b"\n"])
def test_a_damaged_list_is_named(folder, damage):
    (folder / FILE).write_bytes(damage)
    with pytest.raises(RunFolderError, match=f"{FILE} (is damaged|cannot be read)"):
        listed(folder)
