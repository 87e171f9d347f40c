"""What is saved for others says which base it is for, and its card's code works, without paths."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import silotune
from silotune.core.checksums import list_files
from silotune.recipes.parse import parse
from silotune.training.tasks.classify import predictions
from tests.conftest import build_tiny_model, changed, hospital_rows, write_jsonl
from tests.tiny_encoders import build_tiny_encoder

TARGETS = ["v_proj", "q_proj", "up_proj", "k_proj", "down_proj", "o_proj"]
SECRET = "home-of-somebody"
LABELS = ("yes", "no", "perhaps")


def run_on(folder: Path, base: Path | str, rows: list[dict], **changes) -> silotune.Run:
    folder.mkdir(parents=True, exist_ok=True)
    table = {
        "seed": 3,
        "rounds": 1,
        "model": {"name": str(base), "dtype": "float32"},
        "adapter": {"rank": 2, "alpha": 4, "targets": TARGETS},
        "data": {"path": str(write_jsonl(folder / "rows.jsonl", rows))},
        "partition": {"by": "source"},
        "train": {"batch_size": 2, "local_steps": 1, "lr": 0.1, "max_length": 128},
        "runtime": {"device": "cpu", "threads": 1},
        "report": {"samples": 0},
    }
    return silotune.run(parse(changed(table, changes)), out=folder / "run")


def texts(*places: Path) -> dict[Path, str]:
    files = [f for p in places for f in (p.rglob("*") if p.is_dir() else [p]) if f.is_file()]
    return {file: file.read_bytes().decode("utf-8", errors="replace") for file in files}


def code_in(card: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text("utf-8"), re.DOTALL)
    return code


def execute(card: Path) -> dict:
    """What a reader of a card gets who pastes its code."""
    names: dict = {}
    exec(code_in(card), names)
    return names


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_no_path_of_this_machine_is_in_what_others_get(tmp_path, kind):
    """Regression: the card's header and title and adapter_config.json named the base's folder."""
    base = build_tiny_model(tmp_path / SECRET / "base")
    adapter = {"kind": "full"} if kind == "full" else {"rank": 2, "targets": TARGETS}
    done = run_on(tmp_path / SECRET, base, hospital_rows(2, 4), adapter=adapter)
    exported = done.export("merged" if kind == "full" else "peft", to=tmp_path / "export")
    given = texts(
        done.path / "adapter", done.path / "README.md", done.path / "report.html", exported
    )
    assert [str(file) for file, text in given.items() if SECRET in text] == []
    assert "base_model:" not in (done.path / "README.md").read_text().split("---")[1]
    assert done.ask("hi", max_new_tokens=2) is not None, "silotune itself still finds the base"


def test_the_cards_code_loads_a_base_in_a_folder_and_the_adapter_folder_is_sorted(
    tmp_path, monkeypatch
):
    base = build_tiny_model(tmp_path / "models" / "our-base")
    done = run_on(tmp_path, base, hospital_rows(2, 4))
    place = done.export(to=tmp_path / "theirs")
    loaded = done.load()
    ids = loaded.tokenizer("It is very a0.", return_tensors="pt").input_ids
    with torch.inference_mode():
        expected = loaded.model(input_ids=ids).logits
    for card in (done.path / "README.md", place / "README.md"):
        if not (card.parent / "our-base").exists():
            (card.parent / "our-base").symlink_to(base)  # as the card tells its reader
        monkeypatch.chdir(card.parent)
        found = execute(card)
        with torch.inference_mode():
            assert torch.equal(found["model"].eval()(input_ids=ids).logits, expected)
        assert found["tokenizer"].chat_template == loaded.tokenizer.chat_template
    from peft import AutoPeftModelForCausalLM

    with torch.inference_mode():
        model = AutoPeftModelForCausalLM.from_pretrained(".").eval()
        assert torch.equal(model(input_ids=ids).logits, expected)
    for folder in (place, done.path / "adapter"):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["target_modules"] == sorted(TARGETS)
        assert (config["base_model_name_or_path"], config["revision"]) == ("./our-base", None)


@pytest.mark.parametrize("head", ["train", "freeze"])
def test_a_classifiers_adapter_brings_its_classes_in_order(tmp_path, monkeypatch, head):
    """Regression: a plain reload of a base with a head had the base's order of the labels."""
    base = build_tiny_encoder(
        tmp_path / "enc",
        kind="AutoModelForSequenceClassification",
        id2label=dict(enumerate(("perhaps", "no", "yes", "unsure"))),
    )
    rows = [{"text": f"{x} {n}", "label": x, "source": n % 2} for n in range(6) for x in LABELS]
    done = run_on(
        tmp_path,
        base,
        rows,
        task="classify",
        data__labels=list(LABELS),
        adapter={"rank": 2, "targets": ["query", "value"], "head": head},
    )
    place = done.export(to=tmp_path / "theirs")
    assert json.loads((done.path / "adapter" / "labels.json").read_text()) == list(LABELS)
    (place / "enc").symlink_to(base)
    monkeypatch.chdir(place)
    found = execute(place / "README.md")
    config = found["model"].config
    assert config.id2label == dict(enumerate(LABELS))
    ids = found["tokenizer"]("maybe", return_tensors="pt")
    with torch.inference_mode():
        shares = found["model"].eval()(**ids).logits.softmax(-1)
    expected = predictions(done.load(), [{"text": "maybe"}], 64)
    torch.testing.assert_close(shares, expected)


def test_an_export_of_an_earlier_version_gets_what_its_adapter_folder_lacked(tmp_path):
    """Old run folders hold a path, no labels, no commit."""
    base = build_tiny_encoder(tmp_path / SECRET / "enc")
    rows = [{"text": f"{x} {n}", "label": x, "source": n % 2} for n in range(6) for x in LABELS]
    done = run_on(tmp_path, base, rows, task="classify", adapter={"rank": 2, "targets": ["query"]})
    config = done.path / "adapter" / "adapter_config.json"
    table = json.loads(config.read_text()) | {"base_model_name_or_path": str(base)}
    config.write_text(json.dumps(table))
    (done.path / "adapter" / "labels.json").unlink()
    provenance = done.path / "provenance.json"
    old = json.loads(provenance.read_text())
    del old["base"]["commit"]
    provenance.write_text(json.dumps(old))
    checksums = done.path / "checksums.sha256"
    kept = [line for line in checksums.read_text().splitlines() if "labels.json" not in line]
    checksums.write_text("".join(f"{line}\n" for line in kept))
    list_files(done.path, ["adapter/adapter_config.json", "provenance.json"])
    place = done.export()
    assert json.loads((place / "labels.json").read_text()) == sorted(LABELS)
    assert [file.name for file, text in texts(place).items() if SECRET in text] == []


ON_THE_HUB = """
import json, re, sys
from pathlib import Path
import silotune
from peft import AutoPeftModelForCausalLM, PeftModel
at = Path(sys.argv[1])
done = silotune.run(at / "recipe.toml", out=at / "run")
place = done.export(to=at / "peft")
loaded = done.load()
ids = loaded.tokenizer("It is very a0.", return_tensors="pt").input_ids
expected = loaded.model(input_ids=ids).logits
configs = [json.loads((p / "adapter_config.json").read_text()) for p in (at / "run/adapter", place)]
assert {c["revision"] for c in configs} == {"b" * 40}, configs
assert {c["base_model_name_or_path"] for c in configs} == {"acme/tiny"}
import os, torch
for card, folder in ((at / "run/README.md", at / "run"), (place / "README.md", place)):
    text = card.read_text()
    assert "base_model: acme/tiny\\n" in text
    (code,) = re.findall(r"```python\\n(.*?)```", text, re.DOTALL)
    assert "b" * 40 in code
    os.chdir(folder)
    names = {}
    exec(code, names)
    assert torch.equal(names["model"].eval()(input_ids=ids).logits, expected)
model = AutoPeftModelForCausalLM.from_pretrained(place).eval()
assert torch.equal(model(input_ids=ids).logits, expected)
print("the same logits")
"""


def test_a_base_at_a_revision_of_the_hub_is_named_with_its_commit(tmp_path):
    cache = tmp_path / "hub" / "models--acme--tiny"
    (cache / "refs").mkdir(parents=True)
    for name, seed, commit in (("main", 0, "a" * 40), ("v2", 1, "b" * 40)):
        build_tiny_model(cache / "snapshots" / commit, seed=seed)
        (cache / "refs" / name).write_text(commit)
    data = write_jsonl(tmp_path / "rows.jsonl", hospital_rows(2, 4))
    (tmp_path / "recipe.toml").write_text(
        f'rounds = 1\n[model]\nname = "acme/tiny"\nrevision = "v2"\ndtype = "float32"\n'
        f'[data]\npath = "{data}"\n[partition]\nby = "source"\n[train]\nlocal_steps = 1\n'
        f"max_length = 128\n[runtime]\nthreads = 1\n[report]\npage = false\nsamples = 0\n"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", ON_THE_HUB, str(tmp_path)],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the same logits" in done.stdout


def test_a_classifier_with_few_places_is_merged(tmp_path):
    """Regression: the probe was longer than the model, which ended in a RuntimeError."""
    base = build_tiny_encoder(tmp_path / "enc", max_position_embeddings=24)
    rows = [{"text": f"{x} {n}", "label": x, "source": n % 2} for n in range(6) for x in LABELS]
    done = run_on(
        tmp_path,
        base,
        rows,
        task="classify",
        adapter={"rank": 2, "targets": ["query"]},
        train__max_length=16,
    )
    assert (done.export("merged") / "model.safetensors").is_file()
