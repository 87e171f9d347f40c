"""Whole runs on models whose chat templates end turns, refuse rows or read the clock."""

import json
from datetime import date

import pytest
from typer.testing import CliRunner

import silotune
from silotune.cli import app
from silotune.core.errors import ConfigError
from silotune.core.tree import sha256
from silotune.federation.progress import Progress
from silotune.results.run import Run
from tests.chat_templates import FAMILIES, tokenizer_for
from tests.conftest import CHATML, hospital_rows, write_jsonl

DATED = "<|im_start|>system\nToday: {{ strftime_now('%Y-%m-%d') }}<|im_end|>\n" + CHATML


def build_model(folder, template, eos, bos=None):
    """A random Llama for a template's tokenizer; its generation settings know only `eos`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer_for(template, eos, bos)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_recipe(folder, model, rows, *, train="local_steps = 1", adapter="rank = 2", **top):
    data = write_jsonl(folder / "rows.jsonl", rows)
    path = folder / "recipe.toml"
    values = "".join(f"{key} = {value}\n" for key, value in {"rounds": 1, **top}.items())
    path.write_text(
        f'seed = 3\n{values}[model]\nname = "{model}"\ndtype = "float32"\n[adapter]\n{adapter}\n'
        f'[data]\npath = "{data}"\n[partition]\nby = "source"\n[train]\nbatch_size = 2\n'
        f'max_length = 256\n{train}\n[runtime]\ndevice = "cpu"\nthreads = 1\n'
        "[report]\npage = false\nsamples = 0\n",
        "utf-8",
    )
    return path


class Told(Progress):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


# --- the end of an answer

GREETING = [{"source": c, "question": "Say hi", "answer": "hi"} for c in "ab" for _ in range(4)]
ENDS = {
    "a base model with ChatML": ("<|endoftext|>", "<|im_end|>"),
    "GLM-4": ("<|endoftext|>", "<|user|>"),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_taught_end_is_where_answers_stop_and_is_saved(tmp_path, name):
    """Bug: after learning "hi", the model said hi until its limit, and so did the exported one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    eos, end = ENDS[name]
    base = build_model(tmp_path / "base", FAMILIES[name].template, eos)
    full, train = 'kind = "full"', "local_steps = 60\nlr = 0.01"
    recipe = write_recipe(tmp_path, base, GREETING, train=train, adapter=full, rounds=2)
    run = silotune.run(recipe, out=tmp_path / "run")
    assert run.ask("Say hi", max_new_tokens=16) == "hi"
    for folder in (run.path / "adapter", run.export("merged", to=tmp_path / "plain")):
        saved = AutoTokenizer.from_pretrained(folder)
        assert saved.eos_token == end
        model = AutoModelForCausalLM.from_pretrained(folder)
        asked = [{"role": "user", "content": "Say hi"}]
        ids = saved.apply_chat_template(
            asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        new = model.generate(**ids, max_new_tokens=16, do_sample=False)
        assert saved.decode(new[0, ids["input_ids"].shape[1] :]) == f"hi{end}"


def test_a_merged_adapter_is_exported_with_the_taught_end(tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    base = build_model(tmp_path / "base", CHATML, "<|endoftext|>")
    run = silotune.run(write_recipe(tmp_path, base, GREETING), out=tmp_path / "run")
    plain = run.export("merged", to=tmp_path / "plain")
    both = tokenizer_for(CHATML, "<|endoftext|>").convert_tokens_to_ids(
        ["<|endoftext|>", "<|im_end|>"]
    )
    assert set(GenerationConfig.from_pretrained(plain).eos_token_id) == set(both)
    for folder in (run.path / "adapter", plain):
        assert AutoTokenizer.from_pretrained(folder).eos_token == "<|im_end|>"


def test_a_model_that_knows_its_end_is_saved_as_it_came(tmp_path, tiny_model):
    recipe = write_recipe(tmp_path, tiny_model, hospital_rows(), adapter='kind = "full"')
    run = silotune.run(recipe, out=tmp_path / "run")
    old, new = (
        json.loads((folder / "generation_config.json").read_text("utf-8"))
        for folder in (tiny_model, run.path / "adapter")
    )
    assert new["eos_token_id"] == old["eos_token_id"] == 1


# --- rows that a template refuses or changes

ALTERNATES = [
    {
        "source": c,
        "messages": [{"role": "user", "content": "Hm?"}] * n
        + [{"role": "assistant", "content": f"So {i}."}],
    }
    for c in "ab"
    for i in range(4)
    for n in [2 if (c, i) == ("b", 1) else 1]
]
WITH_SYSTEM = [
    {
        "source": c,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"Why {c}{i}?"},
            {"role": "assistant", "content": "So."},
        ],
    }
    for c in "ab"
    for i in range(4)
]


@pytest.mark.parametrize("command", ["data", "run"])
def test_a_row_that_the_template_refuses_is_named_by_file_and_line(tmp_path, command):
    """Bug: a traceback of Jinja that named no row."""
    gemma = FAMILIES["Gemma, Gemma 2"]
    base = build_model(tmp_path / "base", gemma.template, gemma.eos, gemma.bos)
    recipe = write_recipe(tmp_path, base, ALTERNATES)
    where = ["--out", str(tmp_path / "run")] if command == "run" else []
    done = CliRunner().invoke(app, [command, str(recipe), *where])
    assert done.exit_code == 2
    assert "rows.jsonl:6: the chat template refuses this conversation: roles must alternate" in (
        " ".join(done.output.split())
    )


def test_a_system_text_is_moved_where_the_template_takes_none_and_that_is_said_once(tmp_path):
    gemma = FAMILIES["Gemma, Gemma 2"]
    base = build_model(tmp_path / "base", gemma.template, gemma.eos, gemma.bos)
    recipe, told = write_recipe(tmp_path, base, WITH_SYSTEM), Told()
    silotune.run(recipe, out=tmp_path / "run", progress=told)
    said = [text for text in told.notes if "in front of the first question" in text]
    assert said == [
        "warning: the chat template takes no system text, so it is put in front of the first "
        "question (8 rows)"
    ]
    seen = silotune.preview(recipe, num_samples=1)
    assert said[0].removeprefix("warning: ") in seen.warnings
    assert "Be brief." in "".join(piece for _, piece in seen.samples[0].pieces)


# --- the date


def on_day(monkeypatch, day):
    class Day(date):
        @classmethod
        def today(cls):
            return date.fromisoformat(day)

    monkeypatch.setattr("silotune.workflows.check.date", Day)


def test_a_run_keeps_the_day_on_which_it_began(tmp_path, monkeypatch):
    """Bug: a run that was resumed on the next day went on with other texts."""

    class Stop(Progress):
        def end_round(self, round_, rows):
            raise KeyboardInterrupt

    base = build_model(tmp_path / "base", DATED, "<|im_end|>")
    recipe, told = write_recipe(tmp_path, base, hospital_rows(), rounds=2), Told()
    on_day(monkeypatch, "2026-03-01")
    whole = silotune.run(recipe, out=tmp_path / "whole", progress=told)
    assert any("2026-03-01 (data.date)" in text for text in told.notes)
    with pytest.raises(KeyboardInterrupt):
        silotune.run(recipe, out=tmp_path / "cut", progress=Stop())
    on_day(monkeypatch, "2026-03-02")
    resumed = silotune.run(recipe, resume=tmp_path / "cut")  # the recipe names no day
    assert sha256(resumed.adapter()) == sha256(whole.adapter())
    assert Run(tmp_path / "cut").config.data.date == "2026-03-01"
    other = silotune.run(recipe, out=tmp_path / "other")
    assert sha256(other.adapter()) != sha256(whole.adapter())
    again = silotune.run(recipe, ["data.date=2026-03-01"], out=tmp_path / "again")
    assert sha256(again.adapter()) == sha256(whole.adapter())
    with pytest.raises(ConfigError, match=r"differs.*data\.date"):
        silotune.run(recipe, ["data.date=2026-03-05"], resume=tmp_path / "cut")


def test_a_preview_shows_the_day_of_the_recipe(tmp_path):
    base = build_model(tmp_path / "base", DATED, "<|im_end|>")
    recipe = write_recipe(tmp_path, base, hospital_rows())
    seen = silotune.preview(recipe, ["data.date=2001-02-03"], num_samples=1)
    assert "Today: 2001-02-03" in "".join(piece for _, piece in seen.samples[0].pieces)
    assert any("2001-02-03" in text for text in seen.warnings)


@pytest.mark.parametrize("task", ["instruct", "text"])
def test_a_token_without_an_embedding_in_a_row_is_named_before_training(tmp_path, task):
    """Bug: an index error in the first forward pass."""
    base = build_model(tmp_path / "base", CHATML, "<|im_end|>")
    tokenizer = tokenizer_for(CHATML, "<|im_end|>")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(base)  # as Gemma 3 has it: a token that no text should use
    rows = [*hospital_rows()]
    rows[5] = {**rows[5], "question": "What is <image>?"}
    more = {"task": '"text"'} if task == "text" else {}
    recipe = write_recipe(tmp_path, base, rows, **more)
    keys = ["data.text=question"] * (task == "text")
    out = tmp_path / "run"
    done = CliRunner().invoke(app, ["run", str(recipe), *keys, "--out", str(out)])
    assert done.exit_code == 2
    said = " ".join(done.output.split())
    assert "rows.jsonl:6: the text contains the tokenizer's token '<image>'" in said
    assert not out.exists()
    if task == "instruct":
        write_jsonl(tmp_path / "rows.jsonl", hospital_rows())
        run = silotune.run(recipe, out=out)
        with pytest.raises(silotune.SilotuneError, match="the prompt: the text contains"):
            run.ask("What is <image>?")


def test_what_a_template_does_to_rows_is_in_a_plan(tmp_path):
    gemma = FAMILIES["Gemma, Gemma 2"]
    base = build_model(tmp_path / "base", gemma.template, gemma.eos, gemma.bos)
    notes = silotune.plan(write_recipe(tmp_path, base, WITH_SYSTEM)).notes
    assert sum("in front of the first question (8 rows)" in note for note in notes) == 1


def test_a_broken_template_is_one_error_before_training(tmp_path):
    base = build_model(tmp_path / "base", CHATML, "<|im_end|>")
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }", "utf-8")
    recipe = write_recipe(tmp_path, base, hospital_rows())
    for command in (["data", str(recipe)], ["run", str(recipe), "--out", str(tmp_path / "run")]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 2
        assert "own chat template cannot be used" in " ".join(done.output.split())
        assert isinstance(done.exception, SystemExit)
