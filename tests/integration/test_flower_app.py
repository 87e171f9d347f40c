"""`silotune export-app`: the app's two components do what `silotune run` does; no engine here.

The grid is in memory and calls the client app; tests/slow/test_flwr_run.py hands it to `flwr run`.
"""

import tomllib
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from typer.testing import CliRunner

import silotune
from silotune.cli import app as command_line
from silotune.core.errors import ConfigError, EngineError
from silotune.deployment import flower_app
from silotune.deployment.app_folder import export_app
from silotune.runtime.flower import client as flower_client
from silotune.runtime.flower import members
from silotune.runtime.flower import server as flower_server
from tests.conftest import write_tiny_recipe
from tests.unit.runtime.flower.test_server import Nodes

RUN_ID = 4711


@pytest.fixture(autouse=True)
def outside_the_engine(monkeypatch):
    """Outside its engine Flower makes no `Message` without these private numbers (engine.md)."""
    for key in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, key, 1)
    monkeypatch.setattr(flower_server, "POLL_S", (0.001, 0.01))
    monkeypatch.setattr(members, "POLL_S", 0.01)
    flower_client._station.cache_clear()


def config_of(app: Path) -> dict:
    table = tomllib.loads((app / "pyproject.toml").read_text(encoding="utf-8"))
    return table["tool"]["flwr"]["app"]["config"]


def context(config: dict, node: dict) -> Context:
    return Context(
        run_id=RUN_ID, node_id=1, node_config=node, state=RecordDict(), run_config=config
    )


def start(app: Path, *, num_nodes: int) -> None:
    """What Flower does: a server app with a grid, whose messages reach the client app."""
    config = config_of(app)

    def node(number: int):
        own = context(config, {"partition-id": number, "num-partitions": num_nodes})
        return lambda message: flower_client.app(message, own).content

    grid = Nodes({100 + number: node(number) for number in range(num_nodes)})
    flower_app.app(grid, context(config, {}))


@pytest.fixture
def recipe(tmp_path, tiny_model, hospital_file):
    return write_tiny_recipe(tmp_path, tiny_model)


def test_an_exported_app_learns_what_the_run_learns_bit_for_bit(recipe, tmp_path):
    here = silotune.run(recipe, ["rounds=2"], out=tmp_path / "here")
    said = CliRunner().invoke(
        command_line, ["export-app", f"{tmp_path}/app", str(recipe), "rounds=2"]
    )
    assert said.exit_code == 0, said.output
    assert "flwr run" in said.output
    assert "num-supernodes=3" in said.output
    start(tmp_path / "app", num_nodes=3)
    there = silotune.Run(tmp_path / "app-runs" / str(RUN_ID))
    assert there.summary["adapter_sha256"] == here.summary["adapter_sha256"]
    assert there.summary["clients"] == here.summary["clients"]
    readme = (tmp_path / "app" / "README.md").read_text(encoding="utf-8")
    assert said.output.removeprefix("run it: ").strip() in readme


def test_too_few_nodes_are_an_error_that_says_for_whom(recipe, tmp_path):
    keys = ["rounds=1", "runtime.name=flower-simulation", "runtime.join_timeout_s=0.2"]
    export_app(tmp_path / "app", recipe, keys)
    with pytest.raises(EngineError, match=r"train for hospital-2: .*\n.*supernodes=3"):
        start(tmp_path / "app", num_nodes=2)


def test_an_app_means_the_same_from_any_directory(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export_app(Path("app"), recipe.relative_to(tmp_path), ["data.path=hospitals.jsonl"])
    assert f'"path":"{tmp_path}/hospitals.jsonl"' in config_of(tmp_path / "app")["recipe"]
    assert config_of(tmp_path / "app")["runs"] == str(tmp_path / "app-runs")


def test_nothing_is_overwritten(recipe, tmp_path):
    (tmp_path / "app").mkdir()
    with pytest.raises(ConfigError, match="already exists"):
        export_app(tmp_path / "app", recipe)


def test_real_clients_are_sent_to_a_consortium(recipe, tmp_path):
    (tmp_path / "clients").mkdir()
    (tmp_path / "clients" / "north.toml").write_text('name = "north"\n')
    with pytest.raises(ConfigError, match="silotune server init"):
        export_app(tmp_path / "app", recipe, [f"data.path={tmp_path}/clients"])
