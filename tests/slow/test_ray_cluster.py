"""A Ray cluster that is there already is used, and left running."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import silotune
from silotune.core.errors import EngineError
from tests.conftest import write_tiny_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture
def cluster(tmp_path_factory):
    """A head node of two processors on a port of its own."""
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    port = "6399"
    command = [
        RAY,
        "start",
        "--head",
        "--num-cpus=2",
        f"--port={port}",
        "--include-dashboard=false",
    ]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    yield f"127.0.0.1:{port}"
    subprocess.run([RAY, "stop", "--force"], check=True, capture_output=True)


def num_raylets() -> int:
    done = subprocess.run(["pgrep", "-fc", "raylet/raylet"], capture_output=True, text=True)
    return int(done.stdout)


def test_an_existing_ray_cluster_is_used_and_left_running(cluster, tiny_model, tmp_path):
    recipe = write_tiny_recipe(tmp_path, tiny_model)
    here = silotune.run(recipe, out=tmp_path / "here")
    running = num_raylets()
    there = silotune.run(
        recipe,
        ["runtime.name=flower-simulation", f"runtime.ray_address={cluster}"],
        out=tmp_path / "there",
    )
    assert there.summary["adapter_sha256"] == here.summary["adapter_sha256"]
    assert num_raylets() == running == 1


def test_a_cluster_that_is_not_there_ends_the_run_with_its_log_named(tiny_model, tmp_path):
    recipe = write_tiny_recipe(tmp_path, tiny_model)
    nowhere = ["runtime.ray_address=127.0.0.1:1", "runtime.join_timeout_s=20"]
    with pytest.raises(EngineError, match=r"within 20 s[\s\S]*127\.0\.0\.1:1[\s\S]*engine\.log"):
        silotune.run(recipe, ["runtime.name=flower-simulation", *nowhere], out=tmp_path / "run")
    assert "flwr" in (tmp_path / "run" / "engine.log").read_text()
