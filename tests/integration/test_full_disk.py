"""A disk without room: one clear error, nothing half-written, and the run goes on afterwards.

The limit is real: the kernel lets this process write no file beyond so many bytes, and answers as
it does when a disk is full.
"""

import shutil

import pytest
from typer.testing import CliRunner

import silotune
from silotune.cli import app
from silotune.core.atomic_files import save_tensors, write_atomically, write_json
from silotune.core.errors import DiskError
from silotune.federation.run_folder import RunFolder
from tests.conftest import largest_file, write_tiny_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model):
    return write_tiny_recipe(tmp_path_factory.mktemp("disk"), tiny_model)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    return silotune.run(recipe, out=tmp_path_factory.mktemp("runs") / "whole")


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("write", [write_atomically, write_json, save_tensors])
def test_a_file_is_there_as_it_was_or_new_and_whole(tmp_path, write):
    import torch

    (tmp_path / "old").write_bytes(b"before")
    small, large = (b"x" * n if write is write_atomically else "x" * n for n in (10, 10_000))
    more = {}
    if write is save_tensors:
        small, large, more = {"a": torch.zeros(2)}, {"a": torch.zeros(5000)}, {"about": {}}
    with largest_file(1000), pytest.raises(DiskError, match=r"old cannot be written: .*too large"):
        write(tmp_path / "old", large, **more)
    assert files(tmp_path) == ["old"]
    assert (tmp_path / "old").read_bytes() == b"before"
    with largest_file(1000):
        write(tmp_path / "old", small, **more)


def test_a_run_stops_with_one_error_and_goes_on_to_the_same_adapter(recipe, whole, tmp_path):
    # room for the first two rounds' lines of metrics, and not for the third's
    limit = (whole.path / "metrics.jsonl").stat().st_size - 200
    assert limit > (whole.path / "adapter" / "adapter_model.safetensors").stat().st_size / 4
    with largest_file(limit):
        answer = CliRunner().invoke(app, ["run", str(recipe), f"--out={tmp_path / 'r'}"])
    assert answer.exit_code == 1
    assert "DiskError: " in answer.stderr
    assert "Traceback" not in answer.output
    assert f"silotune run --resume {tmp_path / 'r'}" in answer.stderr
    assert not list((tmp_path / "r").rglob("*.part"))
    again = silotune.run(resume=tmp_path / "r")
    assert again.summary["adapter_sha256"] == whole.summary["adapter_sha256"]
    assert len(again.metrics) == len(whole.metrics)


def test_a_half_written_line_of_metrics_is_no_obstacle(recipe, whole, tmp_path):
    shutil.copytree(whole.path, tmp_path / "r")
    (tmp_path / "r" / "summary.json").unlink()
    with (tmp_path / "r" / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "rou')
    again = silotune.run(resume=tmp_path / "r")
    assert again.summary["overall"] == whole.summary["overall"]


def test_a_sweep_says_which_run_and_takes_it_up_again(recipe, tmp_path):
    keys = ["rounds=1", "adapter.rank=2,64", "report.samples=0"]
    with largest_file(12_000):
        found = silotune.sweep(recipe, keys, jobs=1, out=tmp_path / "s")
    assert [run["number"] for run in found.result["runs"]] == [1, 2]
    assert "DiskError" in found.result["runs"][1]["failed"]
    again = silotune.sweep(resume=found.path)
    assert all(run["failed"] is None for run in again.result["runs"])
    assert RunFolder.open(found.path / "runs" / "002").load_state() is not None
