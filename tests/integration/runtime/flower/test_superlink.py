"""What we change in Flower: how long the SuperLink waits for its database, how large a part is."""

import subprocess
import sys

import pytest
from flwr.supercore import sql_mixin
from flwr.supercore.constant import SQLITE_PRAGMAS
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from sqlalchemy import text

from silotune.runtime.flower.engine_command import engine_environment
from silotune.runtime.flower.superlink import BUSY_MS, wait_longer
from silotune.runtime.parts import MOST_BYTES


def pragmas(path) -> dict[str, str]:
    store = SqlObjectStore(str(path))
    store.initialize()
    with store.session() as session:
        return {name: str(session.scalar(text(f"PRAGMA {name}"))) for name, _ in SQLITE_PRAGMAS}


def test_a_request_waits_for_others_longer_than_flower_lets_it(tmp_path, monkeypatch):
    """Regression: with three clients and adapters of 500 MB, `database is locked` ended the run."""
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", SQLITE_PRAGMAS)
    flowers = pragmas(tmp_path / "flowers.db")
    assert flowers["busy_timeout"] == "5000"
    wait_longer()
    assert pragmas(tmp_path / "ours.db") == {**flowers, "busy_timeout": str(BUSY_MS)}


@pytest.mark.timeout(120)
def test_it_accepts_flowers_own_arguments():
    words = [sys.executable, "-m", "silotune.runtime.flower.superlink", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "--enable-supernode-auth" in done.stdout


def test_a_part_is_as_large_as_we_say_and_parts_are_sent_one_at_a_time(tmp_path):
    """Regression: at 1 Mbit/s no part of 4.5 MB arrived within the 30 s that Flower waits."""
    own = engine_environment(tmp_path, private=tmp_path, runs=tmp_path, threads=1)
    code = (
        "from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as size\n"
        "from flwr.supercore.constant import FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES as at_once\n"
        "print(size, at_once)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True)
    assert done.stdout.split() == [str(MOST_BYTES), "1"], done.stderr
