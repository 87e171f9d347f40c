"""What does not train loads no torch, and what a plain base does not need is not loaded with it."""

import json
import subprocess
import sys

import pytest

from silotune.algorithms import ALGORITHMS
from silotune.deployment.consortium.folder import Consortium
from silotune.deployment.orders import WAITING, write_state
from silotune.federation.run_folder import RunFolder
from silotune.recipes.algorithm import ALGORITHM_CONFIGS
from silotune.recipes.parse import parse

HEAVY = {"torch", "transformers", "peft", "numpy", "datasets", "flwr"}


def loaded_by(code: str) -> set[str]:
    """The heavy modules that a process of its own has after running some code."""
    code += f"\nimport json, sys\nprint(json.dumps(sorted({HEAVY!r} & set(sys.modules))))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(found.stdout.splitlines()[-1]))


def test_importing_silotune_loads_nothing_heavy():
    assert loaded_by("import silotune") == set()
    assert loaded_by("import torch") >= {"torch"}, "this would be noticed"


def test_listing_what_was_sent_loads_nothing_heavy(tmp_path):
    (tmp_path / "client.toml").write_text('name = "north"\nstate = "own"\n', encoding="utf-8")
    (tmp_path / "own").mkdir()
    line = {"time": "2026-11-30T10:00:00+00:00", "run": "f" * 32, "asked": "train", "bytes": 70}
    line |= {"bytes_numbers": 60, "seconds": 1.0, "said": {"failure": {}}}
    (tmp_path / "own" / "outbound.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    code = f"""
from typer.testing import CliRunner
from silotune.cli import app
for more in ([], ["--json"]):
    found = CliRunner().invoke(app, ["client", "outbound", {str(tmp_path)!r}, *more])
    assert found.exit_code == 0, found.output
    assert "ffffffff" in found.output
found = CliRunner().invoke(app, ["client", "outbound", {str(tmp_path / "other")!r}])
assert found.exit_code == 2, found.output
assert "client.toml cannot be read" in found.output, found.output
"""
    assert loaded_by(code) == set()


def test_the_status_of_a_server_loads_nothing_heavy(tmp_path):
    folder = tmp_path / "fl"
    Consortium.create(folder, name="hospitals", address="fl.example.org")
    (folder / "runs").mkdir(exist_ok=True)
    run = RunFolder.create(folder / "runs" / "first", parse({"rounds": 7, "data": {"path": "x"}}))
    write_state(run.path, WAITING)
    run.append_metrics([{"event": "round", "round": 1, "seconds": 2.0, "bytes_up": 70}])
    code = f"""
from typer.testing import CliRunner
from silotune.cli import app
for more in ([], ["--json"]):
    found = CliRunner().invoke(app, ["server", "status", "--folder", {str(folder)!r}, *more])
    assert found.exit_code == 0, found.output
    assert "waiting" in found.output and "first" in found.output, found.output
    assert "1/7" in found.output or '"rounds": 7' in found.output, found.output
"""
    assert loaded_by(code) == set()


def test_the_texts_of_an_algorithms_fields_are_inherited_and_not_looked_for_again():
    """pydantic reads the source of every module for them, for each class: 1.4 s at every start."""
    for name in ALGORITHMS:
        config = ALGORITHM_CONFIGS[name]
        assert not config.model_config["use_attribute_docstrings"], name
        assert all(field.description for field in config.model_fields.values()), name


def test_a_plain_base_loads_no_bitsandbytes_and_a_quantised_one_still_can(tiny_model):
    pytest.importorskip("bitsandbytes")
    code = f"""
import sys
from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig
from silotune.models.loading import load_model
from silotune.models.quantization import tame_bitsandbytes
model = ModelConfig(name={str(tiny_model)!r}, dtype="float32")
load_model(model, AdapterConfig(targets=("q_proj",)), seed=1, device="cpu")
assert "bitsandbytes" not in sys.modules
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from transformers.utils import is_bitsandbytes_available
assert is_bitsandbytes_available()
tame_bitsandbytes()
assert "bitsandbytes" in sys.modules
assert is_bnb_available() and is_bnb_4bit_available()
"""
    assert loaded_by(code) >= {"torch", "peft"}
