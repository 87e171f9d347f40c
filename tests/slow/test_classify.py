"""Real encoders on real rows: MiniLM tells question types of MedQuAD apart. Minutes."""

from pathlib import Path

import pytest

import silotune

pytestmark = pytest.mark.slow
DATA = Path(__file__).parents[3] / "shared" / "data" / "medquad_types"
KEYS = [
    "model.name=minilm-l6",
    f"data.path={DATA / 'train.jsonl'}",
    f"data.eval_path={DATA / 'dev.jsonl'}",
    *("data.name=none", "data.split=none", "data.eval_split=none", "data.labels=none"),
    *("data.text=text", "data.label=label_name", "server.work=none"),
    *("rounds=3", "train.lr=1e-3", "report.page=false"),
]


@pytest.mark.timeout(1800)
def test_four_clients_learn_the_types_of_questions(tmp_path):
    if not DATA.is_dir():
        pytest.skip("medquad_types is not beside this repository")
    done = silotune.run("glue-cola", KEYS, out=tmp_path / "run")
    everyone = done.summary["scores"]["overall"]
    assert everyone["federated"]["accuracy"] > 0.6  # the commonest type: 0.31
    assert everyone["federated"]["mcc"] > everyone["base"]["mcc"] + 0.4
    lora, head = 6 * 2 * (384 * 8 + 8 * 384), 384 * 8 + 8
    messages = done.summary["rounds"] * 4
    assert done.summary["bytes_up"] == 4 * (lora + head) * messages
    assert done.summary["head_bytes_up"] == 4 * head * messages
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(
        silotune.base_folder("minilm-l6"), num_labels=8
    )
    PeftModel.from_pretrained(base, str(done.path / "adapter"))
