"""A submitted recipe means the same in the folder where the engine runs."""

from typer.testing import CliRunner

from silotune.cli import app
from silotune.deployment.consortium.folder import Consortium
from silotune.deployment.queue import for_real_clients
from silotune.recipes.parse import parse
from tests.conftest import write_jsonl


def test_the_servers_own_files_are_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = write_jsonl(tmp_path / "own.jsonl", [{"question": "q", "answer": "a"}])
    run = parse(
        {
            "rounds": 1,
            "data": {"path": "rows.jsonl"},
            "server": {"data_path": "train.jsonl", "work": "fine-tune"},
            "evaluate": {"server_path": "own.jsonl"},
        }
    )
    sent = for_real_clients(run, tmp_path / "consortium")
    assert sent.evaluate.server_path == str(own)
    assert sent.server.data_path == "train.jsonl", "it may be a name; a missing file is told later"


def test_a_run_that_is_submitted_to_a_server_that_is_not_up_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "consortium"
    Consortium.create(folder, name="demo", address="127.0.0.1:8443")
    words = ["--folder", str(folder)]
    for typed in (["client", "init", "north"], ["server", "approve", "north/request.toml", *words]):
        assert CliRunner().invoke(app, typed).exit_code == 0
    done = CliRunner().invoke(app, ["server", "submit", "hospitals", *words])
    assert done.exit_code == 0, done.output
    assert "the server is not up; the run waits for: silotune server up" in done.stderr
    (run,) = (folder / "runs").iterdir()
    done = CliRunner().invoke(app, ["server", "log", *words])
    assert done.stdout == ""
    assert done.stderr == f"{run.name} has printed nothing yet\n"
