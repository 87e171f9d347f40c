"""How a conversation becomes text: the exact words, what is learned from them, own templates."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import silotune
from silotune.core.errors import ConfigError, ModelError
from silotune.core.tree import sha256
from silotune.data.chat_templates import PLAIN, TEMPLATES, render, resolve_template, set_template
from silotune.data.clients import load_clients
from silotune.data.conversations import conversation
from silotune.federation.client_config import load_client_config
from silotune.federation.client_recipe import own_recipe, own_rows
from silotune.federation.progress import Progress
from silotune.federation.recipe_model import give_template
from silotune.federation.simulated_clients import write_client_configs
from silotune.recipes.arms import federated_arms
from silotune.recipes.parse import parse
from silotune.results.run import Run
from silotune.training.tasks.instruct import prepare, trained_spans
from tests.conftest import CHATML, build_tokenizer, changed, hospital_rows, write_jsonl

END = "<|im_end|>"
OWN = sorted(name for name, text in TEMPLATES.items() if text is not None)


def joining_tokenizer(kind: str):
    """Characters as tokens, and a blank joins the letter behind it, as in GPT-2's and Llama's."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    bytes_ = kind == "bytes"
    signs = pre_tokenizers.ByteLevel.alphabet() if bytes_ else {*string.printable, "é", "▁"}
    merges = [("Ġ" if bytes_ else "▁", letter) for letter in string.ascii_letters]
    words = ["<|im_start|>", END, *sorted(signs), *(a + b for a, b in merges)]
    inner = Tokenizer(BPE(vocab={w: i for i, w in enumerate(words)}, merges=merges))
    if bytes_:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        inner.decoder = decoders.Metaspace()
    inner.add_special_tokens(["<|im_start|>", END])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=END)


TOKENIZERS = {
    "a byte a token": build_tokenizer(),
    "bytes, joined": joining_tokenizer("bytes"),
    "characters, joined": joining_tokenizer("characters"),
}


def given_template(name: str, tokenizer=None, *, end_token: bool = True):
    tokenizer = tokenizer or build_tokenizer()
    set_template(tokenizer, name, end_token=end_token)
    return tokenizer


def talk(*texts: str, system: str | None = None):
    roles = ["user", "assistant"] * len(texts)
    turns = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    return (*([{"role": "system", "content": system}] if system else []), *turns)


# --- the exact words

TASK = "Below is an instruction that describes a task"
REQUEST = "Write a response that appropriately completes the request."
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
ADD = conversation({"instruction": "Add.", "input": "1, 2", "output": "3"}, where="rows:1")
TEXTS = [
    (
        "alpaca",
        talk("Why?", "So."),
        f"{TASK}. {REQUEST}\n\n### Instruction:\nWhy?\n\n### Response:\nSo.{END}\n\n",
    ),
    (
        "alpaca",
        ADD,
        f"{TASK}, paired with an input that provides further context. {REQUEST}\n\n"
        f"### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n3{END}\n\n",
    ),
    (
        "alpaca",
        ({"role": "system", "content": "Be true."}, *ADD),
        "Be true.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n3" + END + "\n\n",
    ),
    (
        "alpaca",
        talk("Why?", "So.", "And?", "No."),
        f"{TASK}. {REQUEST}\n\n### Instruction:\nWhy?\n\n### Response:\nSo.{END}\n\n"
        f"{TASK}. {REQUEST}\n\n### Instruction:\nAnd?\n\n### Response:\nNo.{END}\n\n",
    ),
    # FastChat, ADD_COLON_TWO: a blank behind the question, the end token behind the answer
    ("vicuna", talk("Why?", "So."), f"{VICUNA} USER: Why? ASSISTANT: So.{END}"),
    (
        "vicuna",
        talk("Why?", "So.", "And?", "No."),
        f"{VICUNA} USER: Why? ASSISTANT: So.{END}USER: And? ASSISTANT: No.{END}",
    ),
    ("vicuna", talk("Why?", "So.", system="Be true."), f"Be true. USER: Why? ASSISTANT: So.{END}"),
    (
        "flowertune",
        talk("Why?", "So."),
        f"{TASK}. {REQUEST}\n### Instruction:\nWhy?\n### Response: So.{END}",
    ),
    (
        "flowertune",
        talk("Why?", "So.", system="Be true."),
        f"Be true.\n### Instruction:\nWhy?\n### Response: So.{END}",
    ),
    (
        "plain",
        talk("Why?", "So.", system="Be true."),
        f"### System:\nBe true.\n\n### User:\nWhy?\n\n### Assistant:\nSo.{END}\n\n",
    ),
    (
        "three-block",
        talk("Why?", " So. ", system="Be true."),
        f"### Instruction:\nBe true.\n\n### Input:\nWhy?\n\n### Response:\nSo.{END}",
    ),
]


@pytest.mark.parametrize(("name", "row", "text"), TEXTS)
def test_a_template_writes_exactly_these_words(name, row, text):
    tokenizer = given_template(name)
    assert render(tokenizer, row, ask=False) == text
    answers = [turn["content"].strip() for turn in row if turn["role"] == "assistant"]
    (example,) = prepare([row], tokenizer, 2048).examples
    # vicuna and flowertune put a blank in front, which a model that is asked has to write too
    blank = " " if name in ("vicuna", "flowertune") else ""
    learned = tokenizer.decode(example.ids[example.trained])
    assert learned == "".join(f"{blank}{answer}{END}" for answer in answers)


words = st.text(alphabet="abcé 1?\n", min_size=1, max_size=20).filter(str.strip)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", OWN)
@given(question=words, reply=words, system=st.none() | words)
@settings(max_examples=15)
def test_what_is_asked_has_the_ids_of_training_and_all_behind_it_is_learned(
    name, kind, question, reply, system
):
    tokenizer = given_template(name, TOKENIZERS[kind])
    row = talk(question, reply, system=system)
    (example,) = prepare([row], tokenizer, 2048).examples
    asked = tokenizer(render(tokenizer, row[:-1], ask=True), add_special_tokens=False)["input_ids"]
    ids, end = example.ids.tolist(), tokenizer.eos_token_id
    assert ids[: len(asked)] == asked
    assert ids.count(end) == 1
    learned = example.trained.nonzero()[:, 0].tolist()
    assert learned == list(range(len(asked), ids.index(end) + 1))
    text, ((start, stop),) = trained_spans(tokenizer, row)
    blank = " " if name in ("vicuna", "flowertune") else ""
    reply = reply.strip() if name == "three-block" else reply
    assert text[start:stop] == blank + reply + END


def test_a_model_without_chat_template_gets_the_plain_one():
    bare = build_tokenizer(None)
    assert set_template(bare)
    assert bare.chat_template == PLAIN


def test_a_recipe_may_ask_for_the_plain_template_of_a_chat_model():
    asked = build_tokenizer()
    assert not set_template(asked, "plain")
    assert asked.chat_template == PLAIN


def test_a_models_own_chat_template_is_left_alone():
    own = build_tokenizer()
    assert not set_template(own)
    assert own.chat_template == CHATML


def test_a_models_own_template_that_does_not_write_the_answer_is_refused():
    deaf = build_tokenizer("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(ConfigError, match="the answer does not follow"):
        set_template(deaf)


def test_a_tokenizer_without_end_token_is_refused():
    bare = build_tokenizer()
    bare.eos_token = None
    with pytest.raises(ModelError, match=r"no end token[\s\S]*defines eos_token"):
        set_template(bare)


# --- without an end token, as published systems trained


@pytest.mark.parametrize("name", OWN)
def test_no_end_token_takes_out_the_end_token_and_nothing_else(name):
    row = talk("Why?", "So.", "And?", "No.", system="Be true.")
    with_, without = given_template(name), given_template(name, end_token=False)
    text = render(with_, row, ask=False)
    assert text.count(END) == 2
    assert render(without, row, ask=False) == text.replace(END, "")
    assert render(without, row[:-1], ask=True) == render(with_, row[:-1], ask=True).replace(END, "")


RECIPE = {"rounds": 1, "data": {"path": "rows.jsonl"}}


@pytest.mark.parametrize("template", ["auto", "own.jinja", CHATML])
def test_no_end_token_is_refused_where_the_template_is_not_silotunes(template):
    table = changed({**RECIPE}, {"data": {"path": "x", "template": template}})
    with pytest.raises(ConfigError, match=r"train.compat: 'no-end-token' needs data.template") as e:
        parse(changed(table, {"train__compat": ["no-end-token"]}))
    assert all(name in str(e.value) for name in OWN)


def test_a_client_cannot_lose_no_end_token_by_a_template_of_its_own(tmp_path):
    """Bug: a client's own template was taken, and trained with the end token it should not have."""
    run = parse(
        {
            "rounds": 1,
            "data": {"path": "x", "template": "flowertune"},
            "train": {"compat": ["no-end-token"]},
        }
    )
    place = tmp_path / "client.toml"
    place.write_text('name = "north"\n[data]\npath = "rows"\ntemplate = "auto"\n', "utf-8")
    with pytest.raises(ConfigError, match="no-end-token"):
        give_template(build_tokenizer(), own_recipe(run, load_client_config(place)))


def test_an_arm_of_a_comparison_cannot_lose_the_end_token_alone():
    """Bug: such an arm trained on the rows as all arms share them, end tokens included."""
    table = {
        "rounds": 1,
        "data": {"path": "x", "template": "alpaca"},
        "compare": {"arms": {"endless": {"train": {"compat": ["no-end-token"]}}}},
    }
    with pytest.raises(ConfigError, match=r"compare\.arms\.endless[\s\S]*all arms share"):
        federated_arms(parse(table))
    table["compare"] = {"arms": {"same rows": {"train": {"compat": ["same-samples"]}}}}
    assert len(federated_arms(parse(table))) == 2


# --- a template of one's own

MINE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}\n{{ 'Q: ' + m['content'] + '\\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'A: ' + m['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}\n"
)


def recipe_of(model, folder, **changes):
    data = write_jsonl(folder / "rows.jsonl", hospital_rows())
    table = {
        "seed": 3,
        "rounds": 2,
        "model": {"name": str(model), "dtype": "float32"},
        "adapter": {"rank": 2, "targets": ["q_proj"]},
        "data": {"path": str(data)},
        "partition": {"by": "source"},
        "train": {"batch_size": 2, "local_steps": 1, "max_length": 128},
        "runtime": {"device": "cpu", "threads": 1},
        "report": {"page": False, "samples": 0},
    }
    return parse(changed(table, changes))


def test_an_own_template_belongs_to_the_run_and_may_go_meanwhile(tmp_path, tiny_model):
    class Stop(Progress):
        def end_round(self, round_, rows):
            raise KeyboardInterrupt

    file = tmp_path / "mine.jinja"
    file.write_text(MINE, encoding="utf-8")
    run = recipe_of(tiny_model, tmp_path, data__template=str(file))
    whole = silotune.run(run, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        silotune.run(run, out=tmp_path / "run", progress=Stop())
    file.unlink()
    resumed = silotune.run(resume=tmp_path / "run")
    assert sha256(resumed.adapter()) == sha256(whole.adapter())
    assert Run(tmp_path / "run").config.data.template == MINE
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter")
    row = talk("Why?", "So.")
    for tokenizer in (saved, resumed.load().tokenizer):
        assert render(tokenizer, row, ask=False) == f"Q: Why?\nA: So.{END}"
        assert render(tokenizer, row[:1], ask=True) == "Q: Why?\nA:"
    assert isinstance(resumed.ask("Why?", max_new_tokens=2), str)


WITHOUT_ANSWER = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}A: "
BAD = {
    "no such name": ("alpacca", r"no template has this name[\s\S]*Did you mean 'alpaca'\?"),
    "no such file": (
        "mine.jinja",
        r"'mine.jinja': no template has this name, and there is no such file",
    ),
    "a name that is too long for a file": ("x" * 300, "no template has this name"),
    "a slip": ("{% for m in messages %}{{ m.content }", "not a Jinja chat template"),
    "a wrong type": ("{{ messages[0].content + 1 }}", "not a Jinja chat template"),
    "no answer": (WITHOUT_ANSWER, "the answer does not follow"),
    "the answer first": (
        "{{ messages[-1].content }} is the answer to {{ messages[0].content }}",
        "the answer does not follow",
    ),
    "the answer behind other words": (
        "{{ messages[0].content }}{% if add_generation_prompt %}A:{% endif %}"
        "{% if messages[1:] %}\nThis is what was said then: {{ messages[1].content }}{% endif %}",
        "after the same text",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_template_that_cannot_be_learned_from_is_told_before_a_model_is_loaded(kind):
    template, text = BAD[kind]
    with pytest.raises(ConfigError, match=text) as caught:
        resolve_template(template)
    assert str(caught.value).startswith("data.template")


def test_a_template_file_that_is_no_text_is_told(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_bytes(b"\xff\xfe{{ messages }}")
    with pytest.raises(ConfigError, match=r"data\.template.*mine\.jinja"):
        resolve_template(str(file))


def test_a_template_may_use_the_tokenizers_own_tokens():
    """As those of Llama 2 and Mistral do; a tokenizer gives them all to its template."""
    mistral = (
        "{{ bos_token + '[INST] ' + messages[0].content + ' [/INST]' }}"
        "{% if messages[1:] %}{{ ' ' + messages[1].content + eos_token }}{% endif %}"
    )
    assert resolve_template(mistral) == mistral


def test_a_clients_own_template_is_found_from_its_file(tmp_path, monkeypatch):
    place = tmp_path / "clinic"
    place.mkdir()
    (place / "mine.jinja").write_text(MINE, encoding="utf-8")
    (place / "client.toml").write_text(
        'name = "north"\n[data]\npath = "rows.jsonl"\ntemplate = "mine.jinja"\n', encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    here = own_recipe(parse(RECIPE), load_client_config(place / "client.toml"))
    tokenizer = build_tokenizer()
    give_template(tokenizer, here)
    assert render(tokenizer, talk("Why?", "So."), ask=False) == f"Q: Why?\nA: So.{END}"


def test_a_folder_with_the_name_of_a_template_is_not_one(tmp_path):
    """Bug: next to such a folder, the server's template was replaced by the folder's path."""
    (tmp_path / "auto").mkdir()
    place = tmp_path / "client.toml"
    place.write_text('name = "north"\n[data]\npath = "rows.jsonl"\n', encoding="utf-8")
    run = parse({"rounds": 1, "data": {"path": "x", "template": "alpaca"}})
    assert own_recipe(run, load_client_config(place)).data.template == "alpaca"


# --- rows of instruction and input


def test_only_alpaca_gives_the_input_a_place_of_its_own():
    joined = talk("Add.\n\n1, 2", "3")
    for name in OWN:
        tokenizer = given_template(name)
        apart, together = (render(tokenizer, row, ask=False) for row in (ADD, joined))
        assert (apart == together) == (name != "alpaca")
    assert [turn["content"] for turn in ADD] == [turn["content"] for turn in joined]


@pytest.mark.parametrize("empty", ["", "  ", None])
def test_an_empty_input_is_none(empty):
    row = conversation({"instruction": "Add.", "input": empty, "output": "3"}, where="rows:1")
    assert row == talk("Add.", "3")


def test_the_leaderboards_input_rules_are_prompts_of_a_recipe():
    """Finance and code join instruction and input with a blank; medical asks the input alone."""
    row = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    tokenizer = given_template("flowertune")
    for prompt, asked in (("{instruction} {input}", "Add. 1, 2"), ("{input}", "1, 2")):
        found = conversation(row, where="rows:1", prompt=prompt, completion="{output}")
        text = f"{TASK}. {REQUEST}\n### Instruction:\n{asked}\n### Response: 3{END}"
        assert render(tokenizer, found, ask=False) == text


def test_instruction_and_input_stay_apart_at_clients_of_a_deployment(tmp_path):
    """Bug: they were joined on the way, so that alpaca wrote another text there than in process."""
    rows = [{"instruction": f"Add {i}.", "input": "1, 2", "output": "3"} for i in range(6)]
    table = {"path": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "template": "alpaca"}
    cut = {"kind": "iid", "num_clients": 2}
    run = parse({"rounds": 1, "data": table, "partition": cut})
    clients = load_clients(run.data, run.partition, seed=run.seed)
    paths = write_client_configs(
        tmp_path / "clients", clients, run, model=None, state=lambda name: tmp_path / name
    )
    there = {name: own_rows(run, load_client_config(path)) for name, path in paths.items()}
    assert there == clients
