"""llama.cpp itself reads our GGUF exports: its tokens, templates, probabilities and answers.

Through xllamacpp, which brings llama.cpp and its server ready built; without it these tests are
skipped. Keys and values are kept in f32 there, so that what is measured is the file.
"""

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import silotune
from silotune.recipes.parse import parse
from tests.conftest import hospital_rows, write_jsonl
from tests.integration.results.test_export import build_llama, make_run

xllamacpp = pytest.importorskip("xllamacpp", reason="not installed: pip install xllamacpp")
pytestmark = pytest.mark.slow

NUM = 8
QUESTIONS = (
    "What is glaucoma, and how are its 12 signs treated?",
    "What is the capital of Sweden?",
    "Name three causes of anaemia.",
)
TEXTS = (
    "the history is this: the hist, 1234.5",
    "  two blanks,\ttabs \n\n\n and lines  ",
    "Ünïcode, 漢字 and 👩‍⚕️, don't I'LL",
    "x" * 50,
)
LIMITS = {"f32": 1e-8, "f16": 1e-4, "q8_0": 0.1}
"""Largest Kullback-Leibler divergence of a next token's probabilities, in nats. Measured with
xllamacpp 2026.10.11549: 5e-11, 1e-5 and 4e-2; llama.cpp rounds activations to 8 bits too."""


@pytest.fixture(scope="module", params=["tiny", "smollm2"])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """The model's name, and a short run of it in float32, so that a merge rounds nothing."""
    place = tmp_path_factory.mktemp(request.param)
    if request.param == "tiny":
        return "tiny", make_run(place, build_llama(place / "model"))
    table = {
        "seed": 3,
        "rounds": 1,
        "model": {"name": "smollm2-135m-instruct", "dtype": "float32"},
        "data": {"path": str(write_jsonl(place / "rows.jsonl", hospital_rows(2, 3)))},
        "partition": {"by": "source"},
        "train": {"batch_size": 2, "local_steps": 2, "lr": 2e-3, "max_length": 128},
        "runtime": {"device": "cpu"},
        "report": {"page": False, "samples": 0},
    }
    return "smollm2", silotune.run(parse(table), out=place / "run")


@pytest.fixture(scope="module")
def merged(done):
    """The merged export as transformers reads it: what the GGUF files have to be."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = done[1].export("merged")
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(place)


@contextmanager
def served(file: Path) -> Iterator[Any]:
    """llama.cpp's server on a free port of loopback; a function that posts to it."""
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 512, 1, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    exact = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cache_type_k, params.cache_type_v = exact, exact
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    address = server.listening_address

    def post(path: str, **body: Any) -> dict[str, Any]:
        data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(address + path, data, kind)
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)

    yield post
    del server


def talk_of(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def ids_of(tokenizer: Any, question: str) -> list[int]:
    how = {"add_generation_prompt": True, "return_dict": False}
    return tokenizer.apply_chat_template(talk_of(question), **how)


def log_probabilities(post: Any, ids: list[int], size: int, letter: int) -> torch.Tensor:
    """Of every token after some ids, as llama.cpp has them.

    It says none where its own choice is an end, or no whole character. So it is made to choose a
    letter; the probabilities are those from before.
    """
    how = {"n_predict": 1, "temperature": 0, "n_probs": size, "logit_bias": [[letter, 1e4]]}
    found = post("/completion", prompt=ids, **how)["completion_probabilities"][0]["top_logprobs"]
    assert len(found) == size
    values = torch.full((size,), float("nan"), dtype=torch.float64)
    for one in found:
        values[one["id"]] = one["logprob"]
    return values.log_softmax(-1)  # its float32 sum over the vocabulary is off by some 1e-4


def greedy(model: Any, ids: list[int]) -> tuple[list[int], torch.Tensor]:
    """transformers' answer, and its log probabilities in front of each token of it."""
    said = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=NUM, do_sample=False)[0]
    with torch.inference_mode():
        logits = model(input_ids=said[None]).logits[0, len(ids) - 1 : -1]
    return said[len(ids) :].tolist(), logits.double().log_softmax(-1)


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_llama_cpp_has_our_tokens_template_probabilities_and_answers(done, merged, kind):
    (name, run), (model, tokenizer) = done, merged
    place = run.export("gguf", gguf_type=kind, to=run.path / "export" / f"gguf-{kind}")
    letter = tokenizer.convert_tokens_to_ids("a")
    apart, same = [], []
    with served(place / f"model-{kind}.gguf") as post:
        for text in TEXTS:
            its = post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
            assert its == tokenizer(text)["input_ids"], text
        for question in QUESTIONS:
            written = post("/apply-template", messages=talk_of(question))["prompt"]
            assert written == tokenizer.apply_chat_template(
                talk_of(question), add_generation_prompt=True, tokenize=False
            )
            ids = ids_of(tokenizer, question)
            answer, ours = greedy(model, ids)
            for i, expected in enumerate(ours):
                theirs = log_probabilities(post, ids + answer[:i], len(expected), letter)
                apart.append(float((expected.exp() * (expected - theirs)).sum()))
                same.append(int(theirs.argmax()) == answer[i])
            if name != "tiny" and kind != "q8_0":
                how = {"prompt": ids, "n_predict": len(answer), "temperature": 0}
                its = post("/completion", return_tokens=True, **how)["tokens"]
                assert its == answer
    assert max(apart) < LIMITS[kind]
    if kind != "q8_0":  # there a near tie may fall to the other side
        assert all(same)
