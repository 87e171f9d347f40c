"""A submitted recipe means the same in the folder where the engine runs."""

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
