"""Files that appear whole, and that nobody but their owner can read."""

import os
import subprocess
import sys

import pytest
import torch

from silotune.core.atomic_files import (
    build_folder,
    make_folder,
    owner_only,
    save_rows,
    save_tensors,
    write_atomically,
    write_json,
    write_rows,
)
from silotune.federation.ledger import write_down
from tests.conftest import open_to_others


@pytest.fixture(autouse=True)
def _generous_umask():
    """As on a cluster where everybody's files are everybody's."""
    before = os.umask(0)
    yield
    os.umask(before)


def test_every_way_of_writing_a_file_makes_it_its_owners_alone(tmp_path):
    """Only tensors were: the library that writes them does it by itself."""
    folder = make_folder(tmp_path / "a" / "b")
    write_atomically(folder / "bytes", b"rows")
    write_json(folder / "json", {})
    write_rows(folder / "rows", [{"a": 1}])
    save_tensors(folder / "tensors", {"a": torch.ones(1)}, about={})
    save_rows(folder / "flat", {"a": torch.ones(1)}, about="", sync=True)
    write_down(folder / "new" / "ledger", {"a": 1})
    with open(folder / "log", "a", opener=owner_only) as file:
        file.write("line")
    assert len(list(folder.iterdir())) == 7
    assert open_to_others(tmp_path / "a") == []


def test_what_was_open_to_others_is_its_owners_once_it_is_written_again(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    (tmp_path / "file.part").write_text("left by a crash")
    assert open_to_others(path)
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert open_to_others(path) == []


def test_what_a_library_writes_into_a_folder_is_its_owners_too(tmp_path):
    def build(part):
        (part / "inner").mkdir()
        (part / "inner" / "tokenizer.json").write_text("{}")
        (part / "link").symlink_to(tmp_path / "elsewhere")

    (tmp_path / "elsewhere").write_text("not ours")
    made = build_folder(tmp_path / "adapter", build)
    assert open_to_others(made) == []
    assert open_to_others(tmp_path / "elsewhere"), "what a link points to is left as it is"


def test_a_folder_that_exists_keeps_its_mode(tmp_path):
    """A project folder that its owner shares on purpose stays shared."""
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o750)
    make_folder(shared / "runs" / "one")
    assert open_to_others(shared) == [shared]


@pytest.mark.parametrize("command", ["approve", "init", "revoke"])
def test_the_operators_commands_load_no_torch(command, tmp_path):
    """It took two of their 2.3 seconds, for files that hold no tensors."""
    words = {
        "init": ("init", "fl", "--address", "fl.example.org"),
        "approve": ("approve", "missing.toml"),
        "revoke": ("revoke", "north"),
    }
    code = (
        "import sys; from silotune.cli import app; "
        "import atexit; atexit.register(lambda: print('torch' in sys.modules)); "
        f"sys.argv = ['silotune', *{('server', *words['init'])!r}]; "
        "app(standalone_mode=False); "
        f"sys.argv = ['silotune', 'server', *{words[command]!r}]; app(standalone_mode=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert "created consortium" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "False", done.stderr
