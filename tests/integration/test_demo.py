"""The README's demo command, shortened: the named model is fetched and all else is real."""

import json
import subprocess
import sys

import pytest


@pytest.mark.timeout(600)
def test_the_demo_command_runs(tmp_path):
    out = tmp_path / "run"
    # a few short rows: the named model alone takes its time on a processor without bfloat16
    short = ["rounds=1", "train.local_steps=1", "data.max_eval_rows=2", "report.max_new_tokens=4"]
    short += ["train.batch_size=2", "train.max_length=128"]
    command = [sys.executable, "-m", "silotune", "demo", *short]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for text in ("held-out loss", "NINDS", "question", "federated ", "adapter:", "in training"):
        assert text in done.stdout
    assert "round 1/1" in done.stderr  # progress goes to stderr, results to stdout
    assert "round 1/1" not in done.stdout
    assert "Warning" not in done.stderr  # once, saving asked the hub for a named source
    summary = json.loads((out / "summary.json").read_text())
    assert summary["base_model_loads"] == 1
    assert len(summary["clients"]) == 5
