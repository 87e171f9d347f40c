"""The full demo as a user runs it: real model, real rows, own cache. Minutes."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.timeout(1800)
def test_the_demo_improves_every_hospital(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "silotune", "demo", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["clients"]) == ["CancerGov", "GARD", "GHR", "NIDDK", "NINDS"]
    for name, client in summary["clients"].items():
        assert client["federated_loss"] < client["base_loss"], name
    assert summary["base_model_loads"] == 1
    one = 460_800 * 4  # LoRA rank 8 on q and v of SmolLM2-135M, float32
    assert summary["bytes_up"] == 5 * 5 * one
    assert summary["bytes_down"] == 5 * 5 * one  # not the first, but the last to score
    for text in ("held-out loss", "question", "base ", "federated ", "adapter:", "in training"):
        assert text in done.stdout
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from silotune.models.sources import model_folder

    base = AutoModelForCausalLM.from_pretrained(model_folder("smollm2-135m-instruct"))
    PeftModel.from_pretrained(base, str(out / "adapter"))


@pytest.mark.timeout(1800)
def test_one_round_of_the_demo_gives_the_same_adapter_in_every_runtime(tmp_path):
    found = {}
    for name in ("in-process", "flower-simulation", "flower"):
        out = tmp_path / name
        command = [sys.executable, "-m", "silotune", "run", "hospitals", "rounds=1", "--json"]
        command += [f"runtime.name={name}", "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        summary = json.loads(done.stdout)
        found[name] = summary["adapter_sha256"], summary["clients"], summary["bytes_up"]
    assert found["flower-simulation"] == found["in-process"]
    assert found["flower"] == found["in-process"]
