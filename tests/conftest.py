"""Tiny real things for tests: a random Llama of 2 layers, width 16 and byte tokens; and rows."""

import contextlib
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tiny tensors: a second thread only waits, and processes of tests share the two cores.

    Runs set their own number, so that each file begins with this one again.
    """
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_question_to_the_hub():
    """Tests need no network: whether the hub answers is asked in tests of that question only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("silotune.core.hub._ask", lambda: None)
        yield


# A busy machine must not fail a property by its clock. In CI the examples are the same every time;
# elsewhere they are new ones, so that the properties keep being searched; `make slow` uses more.
settings.register_profile(
    "gate", deadline=None, max_examples=20, derandomize=bool(os.environ.get("CI"))
)
settings.register_profile("search", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gate"))

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(template: str | None = CHATML):
    """Bytes as tokens, and two for ChatML; pad is the end token, as in many chat models."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|im_start|>": 0, "<|im_end|>": 1, **{c: i + 2 for i, c in enumerate(alphabet)}}
    inner = Tokenizer(BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def build_tiny_model(
    folder: Path, *, seed: int = 0, template: str | None = CHATML, width: int = 16, **more
) -> Path:
    """A random Llama in Hugging Face format; `more` goes to its configuration."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer(template)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=True,
        **more,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory) -> Path:
    """Of width 64: 4 bits on a processor need rows of whole blocks."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "wide", width=64)


def hospital_rows(num_clients: int = 3, per_client: int = 8) -> list[dict]:
    """Short questions and answers of uneven length, a column that names the client."""
    return [
        {
            "source": f"hospital-{c}",
            "question": f"What is {chr(97 + c)}{i}?",
            "answer": f"It is {'very ' * (i % 4)}{chr(97 + c)}{i}.",
        }
        for c in range(num_clients)
        for i in range(per_client + c)
    ]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def changed(table: dict, changes: dict) -> dict:
    """A recipe's table with `section__key=value` changes put into it; None takes a key out."""
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if not key:
            table[section] = value
        elif value is None:
            table[section].pop(key)
        else:
            table.setdefault(section, {})[key] = value
    return table


def small_table(model: Path, data: Path) -> dict:
    """A recipe's table on the tiny model, to be `changed`: three rounds of one step each."""
    return {
        "seed": 3,
        "rounds": 3,
        "model": {"name": str(model), "dtype": "float32"},
        "adapter": {"rank": 2, "targets": ["q_proj", "v_proj"]},
        "data": {"path": str(data)},
        "partition": {"by": "source"},
        "train": {"batch_size": 2, "local_steps": 1, "lr": 1e-2, "max_length": 128},
        "runtime": {"device": "cpu", "threads": 1},
        "report": {"page": False, "samples": 0},
    }


@pytest.fixture
def hospital_file(tmp_path) -> Path:
    return write_jsonl(tmp_path / "hospitals.jsonl", hospital_rows())


def write_tiny_recipe(folder: Path, model: Path, *, algorithm: str = "fedavg") -> Path:
    """A whole recipe on the tiny model, and rows beside it: seconds, not minutes.

    In float32, so that it is the same on processors with and without bfloat16.
    """
    data = write_jsonl(folder / "hospitals.jsonl", hospital_rows())
    path = folder / "tiny.toml"
    path.write_text(
        f"""
seed = 3
rounds = 3
[model]
name = "{model}"
dtype = "float32"
[adapter]
rank = 2
alpha = 4
dropout = 0.1
targets = ["q_proj", "v_proj"]
[data]
path = "{data}"
[partition]
by = "source"
[train]
batch_size = 2
local_steps = 2
lr = 1e-2
max_length = 128
[algorithm]
name = "{algorithm}"
[runtime]
device = "cpu"
threads = 1
[report]
page = false
samples = 0
[compare]
tune = false
""",
        encoding="utf-8",
    )
    return path


@contextlib.contextmanager
def largest_file(size: int):
    """No file may grow beyond this: what a disk does that is full, for every library's writes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def open_to_others(place: Path) -> list[Path]:
    """Everything in a folder, itself included, that another user may enter or read."""
    found = [place, *place.rglob("*")]
    return [p for p in found if not p.is_symlink() and p.stat().st_mode & 0o077]
