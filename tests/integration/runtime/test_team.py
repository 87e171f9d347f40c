"""Several real processes train one client, and do what one does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

import silotune
from silotune.core.errors import ConfigError, ModelError
from silotune.federation.recipe_model import load_for
from silotune.federation.team import Team
from silotune.models.loading import read_adapter
from silotune.recipes.parse import load_recipe
from tests.conftest import hospital_rows, write_jsonl, write_tiny_recipe

EXACT = ["adapter.dropout=0", "train.optimizer=sgd", "train.lr=0.1", "rounds=2"]
"""Adam would divide by the size of a gradient that is zero but for its rounding."""
TWO = ["runtime.client_processes=2", "runtime.threads=2"]
CASES = {
    # batches of three rows: two for one process, one for the other; what stands beside the adapter
    # changes with every round
    "odd batches and a residual": ["train.batch_size=3", "algorithm.name=fedex"],
    # fewer rows than processes in a pass, and passes that are dealt out
    "one row in a pass": ["train.batch_size=1", "train.accumulation=3"],
    "a penalty, and rows in one pass": [
        *("algorithm.name=fedprox", "algorithm.mu=0.1", "train.packing=true"),
    ],
}
SLOW = [case for case in CASES if "residual" not in case]
"""Every team imports the libraries again."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model) -> Path:
    place = tmp_path_factory.mktemp("team")
    path = write_tiny_recipe(place, tiny_model)
    write_jsonl(place / "hospitals.jsonl", hospital_rows(per_client=5)[:10])
    return path


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in CASES]
)
def test_two_processes_train_what_one_does(recipe, tmp_path, case, capfd):
    keys = [*EXACT, *CASES[case]]
    one = silotune.run(recipe, keys, out=tmp_path / "one")
    two = silotune.run(recipe, [*keys, *TWO], out=tmp_path / "two")
    first = load_file(tmp_path / "one" / "adapter" / "adapter_model.safetensors")
    for name, value in load_file(
        tmp_path / "two" / "adapter" / "adapter_model.safetensors"
    ).items():
        torch.testing.assert_close(value, first[name], rtol=0, atol=1e-5)
    assert any(first[name].abs().max() > 1e-3 for name in first if "lora_B" in name)
    same = ("num_tokens", "num_targets", "num_steps")
    for a, b in zip(trainings(one), trainings(two), strict=True):
        assert [a[key] for key in same] == [b[key] for key in same]
        assert b["train_loss"] == pytest.approx(a["train_loss"], abs=1e-5)
        assert b["num_padded_tokens"] <= a["num_padded_tokens"]
    assert "Gloo" not in capfd.readouterr().out


def trainings(done):
    return [row for row in done.metrics if row["event"] == "train"]


@pytest.mark.slow
def test_with_dropout_a_repetition_gives_the_same_bits(recipe, tmp_path):
    keys = ["adapter.dropout=0.3", "rounds=1", *TWO]
    runs = [silotune.run(recipe, keys, out=tmp_path / name) for name in ("a", "b")]
    assert runs[0].summary["adapter_sha256"] == runs[1].summary["adapter_sha256"]
    other = silotune.run(recipe, keys[:2], out=tmp_path / "c")
    assert other.summary["adapter_sha256"] != runs[0].summary["adapter_sha256"]


def test_a_helper_that_ends_is_an_error_and_not_a_wait(recipe):
    run = load_recipe(recipe, TWO)
    adapter = read_adapter(load_for(run))
    team = Team(run)
    try:
        (helper,) = team._helpers
        os.kill(helper.pid, signal.SIGKILL)
        helper.wait()
        began = time.monotonic()
        with pytest.raises(ModelError, match=r"a helper .*ended.*\n  Is there enough memory"):
            begin_twice(team, adapter)
        assert time.monotonic() - began < 60
    finally:
        team.close()


def begin_twice(team, adapter):
    """What is sent first may still fit into a buffer of the system."""
    for _ in range(2):
        with team.training(adapter):
            pass


@pytest.mark.slow
def test_a_script_without_a_guard_runs_once_and_its_helper_ends_with_it(recipe, tmp_path):
    """Python's own multiprocessing would run such a script a second time."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal\n"
        "from silotune.federation.team import Team\n"
        "from silotune.recipes.parse import load_recipe\n"
        "print('begun', flush=True)\n"
        f"team = Team(load_recipe({str(recipe)!r}, {TWO!r}))\n"
        "print(team._helpers[0].pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, check=False, text=True)
    begun, pid = done.stdout.split()
    assert begun == "begun"
    deadline = time.monotonic() + 30
    while psutil.pid_exists(int(pid)):
        assert time.monotonic() < deadline, "the helper outlives the process that it helps"
        time.sleep(0.1)


def test_a_helper_that_cannot_load_says_why(recipe, tmp_path, tiny_model):
    run = load_recipe(recipe, TWO)
    lost = run.model.model_copy(update={"name": str(tmp_path / "nowhere")})
    with pytest.raises(ModelError, match=r"did not start: .*nowhere"):
        Team(run.model_copy(update={"model": lost}))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        (["privacy.unit=record", "privacy.epsilon=8", "privacy.delta=1e-3"], "privacy.unit"),
        (["runtime.together=2"], "runtime.together"),
        (["runtime.name=flower-simulation"], "only has an effect with runtime.name"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(recipe, keys, why):
    with pytest.raises(ConfigError, match="client_processes") as caught:
        silotune.check(recipe, [*TWO, *keys])
    assert why in str(caught.value)
