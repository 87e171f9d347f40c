"""The benchmark for GPUs runs in its small form on a processor, and says that it is skipped."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def started(*words):
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True)


def test_the_small_form_trains_both_recipes_and_clients_in_one_batch():
    done = started("--small", "--only", "recipes", "--only", "together")
    assert done.returncode == 0, done.stderr
    for recipe in ("flowertune", "medical-dora"):
        said = rf"{recipe}: \d+ tokens/s in training, peak memory .* predicted .* \([+-][\d.]+ %\)"
        assert re.search(said, done.stdout), done.stdout
    assert "| 4x1x16 |" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_skipped_with_the_reason():
    done = started()
    assert done.returncode == 1
    assert done.stderr.startswith("skipped: no GPU on this machine")
