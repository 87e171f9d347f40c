"""SmolLM2 as it is exported: read back by transformers, with its answers and logits."""

from pathlib import Path

import pytest
import torch

import silotune
from silotune.recipes.parse import parse
from tests.conftest import hospital_rows, write_jsonl

pytestmark = pytest.mark.slow

QUESTIONS = (
    "What is glaucoma, and how are its 12 signs treated?",
    "What is the capital of Sweden?",
    "Name three causes of anaemia.",
)
LIMITS = {"f32": 1e-5, "f16": 2e-3, "q8_0": 6e-2}
"""Largest difference of logits, of the largest one; measured 2e-6, 5e-4 and 3e-2."""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> silotune.Run:
    place = tmp_path_factory.mktemp("smollm2")
    table = {
        "seed": 3,
        "rounds": 1,
        "model": {"name": "smollm2-135m-instruct", "dtype": "bfloat16"},
        "data": {"path": str(write_jsonl(place / "rows.jsonl", hospital_rows(2, 3)))},
        "partition": {"by": "source"},
        "train": {"batch_size": 2, "local_steps": 2, "lr": 2e-3, "max_length": 128},
        "runtime": {"device": "cpu"},
        "report": {"page": False, "samples": 0},
    }
    return silotune.run(parse(table), out=place / "run")


def prompts(tokenizer) -> list:
    talks = [[{"role": "user", "content": question}] for question in QUESTIONS]
    how = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return [tokenizer.apply_chat_template(talk, **how) for talk in talks]


def logits_of(model, inputs) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs).logits


def answers(model, tokenizer) -> list[list[int]]:
    how = {"max_new_tokens": 16, "do_sample": False}
    return [model.generate(**inputs, **how)[0].tolist() for inputs in prompts(tokenizer)]


@pytest.fixture(scope="module")
def expected(done: silotune.Run):
    """Prompts, logits and answers of base and adapter in float32, and the run's tokenizer."""
    loaded = done.load()
    model, tokenizer = loaded.model.float(), loaded.tokenizer
    inputs = prompts(tokenizer)
    logits = [logits_of(model, one) for one in inputs]
    return inputs, logits, answers(model, tokenizer), tokenizer


def difference(model, inputs, expected: torch.Tensor) -> float:
    """The largest of the logits, as a share of the largest."""
    return float((logits_of(model, inputs) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", LIMITS)
def test_a_gguf_export_has_the_runs_logits_and_answers(done, expected, tmp_path: Path, kind):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    inputs, logits, said, tokenizer = expected
    place = done.export("gguf", gguf_type=kind, to=tmp_path / "out")
    how = {"gguf_file": f"model-{kind}.gguf"}
    read = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **how)
    its = AutoTokenizer.from_pretrained(place, **how)
    assert its.chat_template == tokenizer.chat_template
    for ours, theirs, scores in zip(inputs, prompts(its), logits, strict=True):
        assert torch.equal(theirs["input_ids"], ours["input_ids"])
        assert difference(read, ours, scores) < LIMITS[kind]
    if kind != "q8_0":  # there a near tie may fall to the other side
        assert answers(read, its) == said


def test_a_merged_export_has_the_runs_logits_and_answers(done, expected, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    inputs, logits, said, _ = expected
    place = done.export("merged", to=tmp_path / "out")
    read = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    for ours, scores in zip(inputs, logits, strict=True):
        # its changed weights are rounded to bfloat16; measured 7e-3
        assert difference(read, ours, scores) < 2e-2
    assert answers(read, AutoTokenizer.from_pretrained(place))[1] == said[1]
