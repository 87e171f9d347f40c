"""An exported run by `flwr run` itself: Flower's own local SuperLink, its simulation, its log."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import silotune
from silotune.deployment.app_folder import export_app
from silotune.runtime.flower.engine import free_port
from silotune.runtime.flower.kept_processes import program
from tests.conftest import hospital_rows, write_jsonl, write_tiny_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def flower_home(tmp_path):
    """`flwr run` starts a SuperLink that nobody ends; it is known by the folder of its state."""
    yield tmp_path / "flwr"
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLWR_HOME") == str(tmp_path / "flwr"):
                process.kill()
        except psutil.Error:
            continue


def test_flwr_run_gives_the_adapter_of_silotune_run(tmp_path, tiny_model, flower_home):
    write_jsonl(tmp_path / "hospitals.jsonl", hospital_rows())
    recipe = write_tiny_recipe(tmp_path, tiny_model)
    here = silotune.run(recipe, ["rounds=2"], out=tmp_path / "here")
    _, *words = shlex.split(export_app(tmp_path / "app", recipe, ["rounds=2"]))
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(flower_home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
    }
    done = subprocess.run(
        [program("flwr"), *words], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    (place,) = (tmp_path / "app-runs").iterdir()
    summary = silotune.Run(place).summary  # `flwr run` returns 0 for a run that failed too
    assert summary["adapter_sha256"] == here.summary["adapter_sha256"], done.stdout + done.stderr
