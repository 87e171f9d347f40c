"""A damaged, edited or read-only run folder: one error with the file and the fix, never other
results without a word."""

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

import silotune
from silotune.cli import app
from silotune.core.checksums import FILE, list_files
from silotune.core.errors import DiskError, RunFolderError, SilotuneError
from silotune.federation.progress import Progress
from silotune.federation.run_folder import RunFolder
from tests.conftest import write_tiny_recipe

ADAPTER = "adapter/adapter_model.safetensors"


class StopHere(Exception):
    """Ends a run as an error would."""


class StopInRoundTwo(Progress):
    """Stops when two clients of round 2 are in the spool."""

    def __init__(self):
        self.done = 0

    def client_done(self, update):
        self.done += update.round == 2
        if self.done == 2:
            raise StopHere


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model):
    return write_tiny_recipe(tmp_path_factory.mktemp("r"), tiny_model, algorithm="fedadam")


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    place = tmp_path_factory.mktemp("whole") / "run"
    return silotune.run(recipe, ["report.page=true", "report.samples=1"], out=place)


@pytest.fixture(scope="module")
def half_done(recipe, tmp_path_factory):
    place = tmp_path_factory.mktemp("half") / "run"
    keys = ["report.page=true", "report.samples=1"]
    with pytest.raises(StopHere):
        silotune.run(recipe, keys, out=place, progress=StopInRoundTwo())
    return place


@pytest.fixture
def finished(whole, tmp_path):
    return silotune.Run(shutil.copytree(whole.path, tmp_path / "run"))


@pytest.fixture
def half(half_done, tmp_path):
    return shutil.copytree(half_done, tmp_path / "run")


def flip(path: Path, at: float = 0.9) -> None:
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 4
    path.write_bytes(data)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE = {
    "a flipped bit": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe" + path.read_bytes()),
    "empty": lambda path: path.write_bytes(b""),
    "a folder in its place": as_folder,
    "gone": Path.unlink,
}

# --- finished runs

USES = {
    "ask": lambda run: run.ask("What is a1?", max_new_tokens=1),
    "chat": lambda run: run.chat(),
    "export": lambda run: run.export("peft"),
    "merge": lambda run: run.export("merged"),
    "evaluate": lambda run: silotune.evaluate(run),
    "audit": lambda run: silotune.audit(run.path),
    "load": lambda run: run.load(),
}


@pytest.mark.parametrize("use", USES)
def test_a_flipped_bit_in_a_finished_adapter_is_never_used(finished, use):
    flip(finished.path / ADAPTER)
    with pytest.raises(RunFolderError, match=r"adapter_model\.safetensors has changed") as caught:
        USES[use](finished)
    assert f"silotune run --resume {finished.path}" in str(caught.value)
    assert not (finished.path / "export").exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "tokenizer.json", "adapter_model"])
def test_a_missing_file_of_the_adapter_is_named(finished, name):
    (path,) = (finished.path / "adapter").glob(f"{name}*")
    path.unlink()
    with pytest.raises(RunFolderError, match=f"{name}|no result"):
        finished.ask("What is a1?")


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize(
    "name",
    ["summary.json", "provenance.json", "split.json", "samples.json", "metrics.jsonl"],
)
def test_a_damaged_record_of_a_finished_run_is_one_error(finished, name, how):
    DAMAGE[how](finished.path / name)
    with pytest.raises(SilotuneError) as caught:
        finished.report()
    first, *rest = str(caught.value).split("\n")
    assert name in first or (name, how) == ("summary.json", "gone")
    assert rest, "a fix"
    said = CliRunner().invoke(app, ["report", str(finished.path)])
    assert said.exit_code == 2
    assert "Traceback" not in said.output
    assert isinstance(said.exception, SystemExit)


def test_the_fix_for_a_damaged_result_gives_the_same_result(finished, whole):
    for name in (ADAPTER, "split.json", "samples.json"):
        flip(finished.path / name)
    (finished.path / "summary.json").unlink()
    again = silotune.run(resume=finished.path)
    assert (again.path / ADAPTER).read_bytes() == (whole.path / ADAPTER).read_bytes()
    assert again.ask("What is a1?", max_new_tokens=2) == whole.ask("What is a1?", max_new_tokens=2)


@pytest.mark.parametrize("how", DAMAGE)
def test_a_changed_recipe_in_the_folder_is_refused(finished, how):
    DAMAGE[how](finished.path / "recipe.toml")
    with pytest.raises(RunFolderError, match=r"recipe\.toml"):
        _ = finished.config


def test_a_folder_of_an_earlier_version_is_refused_and_the_fix_works(finished):
    (finished.path / FILE).unlink()
    with pytest.raises(RunFolderError, match=r"earlier version[\s\S]*sha256sum") as caught:
        finished.ask("What is a1?")
    command = str(caught.value).splitlines()[-1].strip()
    assert os.system(command) == 0  # the line that the error shows
    assert finished.ask("What is a1?", max_new_tokens=1) is not None
    flip(finished.path / ADAPTER)
    with pytest.raises(RunFolderError, match="has changed"):
        finished.ask("What is a1?")


def test_all_files_that_a_finished_run_is_read_from_are_listed(finished):
    listed = {line.split("  ", 1)[1] for line in (finished.path / FILE).read_text().splitlines()}
    there = {
        p.relative_to(finished.path).as_posix() for p in finished.path.rglob("*") if p.is_file()
    }
    own_hash = {name for name in there if name.startswith(("checkpoints/", "clients/"))}
    made_of_others = {"README.md", "report.html", "run.lock", FILE}
    assert there - own_hash - made_of_others == listed


# --- unfinished runs


def test_a_run_that_was_stopped_goes_on_to_the_same_adapter(half, whole):
    """So the following damage is what changes the outcome."""
    assert list((half / "spool").rglob("*.safetensors"))
    silotune.run(resume=half)
    assert (half / ADAPTER).read_bytes() == (whole.path / ADAPTER).read_bytes()


@pytest.mark.parametrize("how", [*DAMAGE, "a zero"])
@pytest.mark.parametrize(
    "name",
    [
        "checkpoints/round-00001/adapter.safetensors",
        "checkpoints/round-00001/extra.safetensors",
        "clients/hospital-0/round-00001.safetensors",
        "clients/hospital-2/round-00001.safetensors",
        "metrics.jsonl",
        "provenance.json",
        "plan.json",
        "recipe.toml",
    ],
)
def test_damage_ends_a_resume_with_one_error(half, whole, name, how):
    path = half / name
    if how == "a zero":
        data = path.read_bytes()
        path.write_bytes(data[:-20] + b"\0" * 20)
    else:
        DAMAGE[how](path)
    try:
        silotune.run(resume=half)
    except SilotuneError as error:
        first, *rest = str(error).split("\n")
        assert path.name in first
        assert rest, "a fix"
    else:  # hospital-0's memory of round 1 is not read again: it has trained in round 2
        assert name == "clients/hospital-0/round-00001.safetensors"
        assert (half / ADAPTER).read_bytes() == (whole.path / ADAPTER).read_bytes()


def test_client_memory_that_was_deleted_is_named(half):
    shutil.rmtree(half / "clients" / "hospital-2")
    with pytest.raises(RunFolderError, match=r"hospital-2/round-00001\.safetensors is gone"):
        silotune.run(resume=half)


def test_memory_of_a_spooled_round_that_was_deleted_is_named(half):
    (half / "clients" / "hospital-0" / "round-00002.safetensors").unlink()
    with pytest.raises(RunFolderError, match=r"hospital-0/round-00002\.safetensors is gone"):
        silotune.run(resume=half)


@pytest.mark.parametrize("how", [*DAMAGE])
def test_a_damaged_spool_is_trained_again(half, whole, how):
    DAMAGE[how](sorted((half / "spool").rglob("*.safetensors"))[0])
    silotune.run(resume=half)
    assert (half / ADAPTER).read_bytes() == (whole.path / ADAPTER).read_bytes()


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_mark_of_the_last_boot_drops_the_spool(half, whole, how):
    DAMAGE[how](next((half / "spool").rglob("boot")))
    silotune.run(resume=half)
    assert (half / ADAPTER).read_bytes() == (whole.path / ADAPTER).read_bytes()


def test_a_number_edited_in_the_metrics_is_found(half):
    """It decides the best checkpoint and the curves."""
    rows = [json.loads(line) for line in (half / "metrics.jsonl").read_text().splitlines()]
    next(row for row in rows if row["event"] == "train")["train_loss"] = 0.001
    (half / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl has changed since the checkpoint"):
        silotune.run(resume=half)


def test_a_rank_edited_in_the_folders_recipe_is_found(half):
    edit(half / "recipe.toml", "lr = 0.01", "lr = 0.02")
    with pytest.raises(RunFolderError, match=r"recipe\.toml has changed[\s\S]*start a new run"):
        silotune.run(resume=half)


# --- the folders of other commands


def test_a_damaged_part_of_a_comparison_is_named(recipe, tmp_path):
    done = silotune.compare(recipe, ["rounds=1", "compare.seeds=1"], out=tmp_path / "c")
    (done.path / "comparison.json").unlink()
    flip(done.path / "base" / "scores.jsonl")
    with pytest.raises(RunFolderError, match=r"scores\.jsonl has changed[\s\S]*trained again"):
        silotune.compare(resume=done.path)
    shutil.rmtree(done.path / "base")
    silotune.compare(resume=done.path)
    flip(done.path / "comparison.json")
    with pytest.raises(RunFolderError, match=r"comparison\.json has changed"):
        done.report()


def test_a_damaged_summary_inside_a_sweep_is_named(recipe, tmp_path):
    keys = ["rounds=1", "adapter.rank=2,4", "report.page=false"]
    done = silotune.sweep(recipe, keys, jobs=1, out=tmp_path / "s")
    flip(done.path / "runs" / "001" / "summary.json")
    with pytest.raises(RunFolderError, match=r"001/summary\.json has changed"):
        _ = silotune.Run(done.path / "runs" / "001").summary
    flip(done.path / "sweep.json")
    with pytest.raises(RunFolderError, match=r"sweep\.json has changed"):
        _ = done.result


def test_a_damaged_evaluation_is_named(finished):
    found = silotune.evaluate(finished, silotune.Questions(max_new_tokens=1, base=False))
    flip(found.path / "scores.json")
    with pytest.raises(RunFolderError, match=r"scores\.json has changed[\s\S]*evaluate the run"):
        _ = found.scores


# --- read-only folders


@contextlib.contextmanager
def read_only(run: Path):
    """A copy of a run that this process may read and not change."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        copy = shutil.copytree(run, Path(place) / "run")
        is_root = os.geteuid() == 0  # for whom permissions do not count
        for path in copy.rglob("*"):  # what a run leaves is readable by its owner only
            path.chmod(0o555 if path.is_dir() else 0o444)
        copy.chmod(0o555)
        if is_root:
            os.seteuid(65534)
        try:
            yield copy
        finally:
            if is_root:
                os.seteuid(0)
            for path in [copy, *copy.rglob("*")]:
                path.chmod(0o755)


def test_a_read_only_folder_is_one_error_of_resume_and_report(whole, half_done):
    whole.report()  # imports what it needs while it may
    with read_only(whole.path) as place, pytest.raises(DiskError, match=r"report\.html cannot be"):
        silotune.Run(place).report()
    with (
        read_only(half_done) as place,
        pytest.raises(DiskError, match=r"cannot be locked[\s\S]*writable"),
        RunFolder.open(place).locked(),
    ):
        pass


def test_a_half_checkpoint_is_never_the_best(whole, finished):
    """Versions before removed checkpoints in place, so a kill could leave one."""
    folder = RunFolder.open(finished.path)
    best = folder.best_round()
    assert best == 3
    (finished.path / "checkpoints" / "round-00003" / "adapter.safetensors").unlink()
    assert folder.best_round() is None


def test_list_files_of_a_missing_file_is_a_bug_of_ours(tmp_path):
    with pytest.raises(FileNotFoundError):
        list_files(tmp_path, ["nothing"])
