"""Tasks of lm-eval on a tiny model; without lm-eval, what the message says."""

import importlib.util

import pytest

from silotune.core.errors import ConfigError
from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig
from silotune.models.loading import load_model
from silotune.workflows.evaluate.suites.lm_eval_tasks import run_lm_eval
from tests.conftest import write_jsonl

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed")

TASK = """
task: silotune_tiny
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: answer
metric_list:
  - metric: acc
"""


@pytest.fixture
def loaded(tiny_model):
    return load_model(
        ModelConfig(name=str(tiny_model)), AdapterConfig(rank=2), seed=0, device="cpu"
    )


@pytest.fixture
def task_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": f"Is {n} even?", "answer": "no" if n % 2 else "yes"} for n in range(5)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(TASK.format(file=file), encoding="utf-8")
    return folder


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")  # the harness's own
@pytest.mark.parametrize("chat", [False, True])
def test_a_task_of_the_harness_runs_on_a_loaded_adapter(loaded, task_folder, chat):
    found = run_lm_eval(loaded, ["silotune_tiny"], 4, chat=chat, include_path=task_folder)
    assert 0 <= found["results"]["silotune_tiny"]["acc,none"] <= 1
    assert found["n-samples"]["silotune_tiny"]["effective"] == 4
    assert found["lm_eval"]


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_an_unknown_task_is_named_with_the_nearest(loaded, task_folder):
    with pytest.raises(ConfigError, match=r"silotune_tini.*\n.*Did you mean 'silotune_tiny'"):
        run_lm_eval(loaded, ["silotune_tini"], include_path=task_folder)


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_lm_eval_the_message_says_how_to_get_it(loaded):
    with pytest.raises(ConfigError, match="pip install lm-eval"):
        run_lm_eval(loaded, ["hellaswag"])
