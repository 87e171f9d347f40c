"""A conversation: who sees what, what is left out, and what a terminal or a browser gets."""

import asyncio
import importlib.util

import pytest
import torch

from silotune.cli.frame import plain
from silotune.core.errors import ConfigError
from silotune.data.chat_templates import render
from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig
from silotune.models.loading import LoadedModel, base_only, load_model
from silotune.recipes.parse import parse
from silotune.recipes.schema import RunConfig
from silotune.results.chat import Chat, Speakers, positions
from silotune.results.loopback import address_of, guarded, take_port
from silotune.training.generate import answer, encode

SYSTEM = "Be brief."


def recipe(**data) -> RunConfig:
    data = {"path": "rows.jsonl", **data}
    return parse({"rounds": 1, "data": data, "partition": {"by": "source"}})


@pytest.fixture(scope="module")
def loaded(tiny_model) -> LoadedModel:
    found = load_model(
        ModelConfig(name=str(tiny_model), dtype="float32"),
        AdapterConfig(rank=2, targets=("q_proj", "v_proj")),
        seed=1,
        device="cpu",
    )
    gen = torch.Generator().manual_seed(7)
    with torch.no_grad():  # a random model repeats one token; a larger embedding makes it talk
        found.model.get_base_model().get_input_embeddings().weight.mul_(30)
        for parameter in found.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=gen))
    return found


def speakers(loaded: LoadedModel, *, max_new_tokens: int = 6, system: str | None = SYSTEM):
    run = recipe(system=system) if system else recipe()
    return Speakers(run, {"base": loaded, "federated": loaded}, max_new_tokens)


def spoken(loaded: LoadedModel, name: str, *texts: str, num: int = 6) -> str:
    """The oracle: a model's answer to the whole conversation, written out as messages."""
    roles = ["system", *("user", "assistant") * len(texts)]
    talk = tuple(
        {"role": role, "content": text} for role, text in zip(roles, (SYSTEM, *texts), strict=False)
    )
    if name == "federated":
        return answer(loaded, talk, max_new_tokens=num)
    with base_only(loaded):
        return answer(loaded, talk, max_new_tokens=num)


# --- who sees what


def test_each_speaker_sees_its_own_earlier_answers_and_not_the_others(loaded):
    chat = Chat(speakers(loaded))
    first, second, third = (chat.say(text) for text in ("What is flu?", "Why?", "And then?"))
    assert first["base"] != first["federated"], "else the test says nothing"
    for name in ("base", "federated"):
        own = ["What is flu?"]
        assert first[name] == spoken(loaded, name, *own)
        own += [first[name], "Why?"]
        assert second[name] == spoken(loaded, name, *own)
        own += [second[name], "And then?"]
        assert third[name] == spoken(loaded, name, *own)


def test_a_second_message_gets_another_answer_than_the_same_one_alone(loaded):
    chat = Chat(speakers(loaded))
    alone = chat.say("Why?")
    chat.say("What is flu?")
    assert chat.say("Why?") != alone


def test_after_a_reset_the_first_answer_comes_again(loaded):
    chat = Chat(speakers(loaded))
    first = chat.say("What is flu?")
    chat.say("Why?")
    chat.reset()
    assert chat.history == {}
    assert chat.say("What is flu?") == first


def test_a_conversation_is_a_value_that_the_models_do_not_keep(loaded):
    ours = speakers(loaded)
    before = ours.reply("What is flu?", {}).history
    one, other = ours.reply("Why?", before), ours.reply("Why?", before)
    assert one == other
    assert len(before["base"]) == 1, "what goes in is not modified"


def test_the_adapter_is_on_again_after_the_base_has_spoken(loaded):
    before = spoken(loaded, "federated", "What is flu?")
    Chat(speakers(loaded)).say("Hello?")
    assert spoken(loaded, "federated", "What is flu?") == before


# --- what does not fit


def test_the_oldest_exchanges_are_left_out_when_the_context_is_full_and_a_note_says_so(loaded):
    chat = Chat(speakers(loaded))
    said = [chat.say("x" * 150) for _ in range(2)]
    assert chat.notes == ()
    third = chat.say("Why?" + "y" * 140)
    assert chat.notes == tuple(
        f"{name} no longer sees the oldest 1 of 2 exchanges: its context is full"
        for name in ("base", "federated")
    )
    for name in ("base", "federated"):
        seen = ["x" * 150, said[1][name], "Why?" + "y" * 140]
        assert third[name] == spoken(loaded, name, *seen)
        assert len(chat.history[name]) == 3, "what was said is kept, for people"


def test_a_conversation_fills_the_context_to_the_last_token(loaded):
    empty = render(loaded.tokenizer, ({"role": "user", "content": ""},), ask=True)
    room = 512 - 6 - len(encode(loaded, [empty])[0])
    chat = Chat(speakers(loaded, system=None))
    chat.say("z" * room)
    with pytest.raises(ConfigError, match="507 tokens"):
        chat.say("z" * (room + 1))


def test_one_message_that_is_too_long_is_an_error_and_the_conversation_stays(loaded):
    chat = Chat(speakers(loaded))
    chat.say("What is flu?")
    before = chat.history
    with pytest.raises(ConfigError) as error:
        chat.say("x" * 600)
    assert "the model's context has 512 tokens, of which 6 are reserved for the answer" in str(
        error.value
    )
    assert "smaller --max-new-tokens" in str(error.value)
    assert chat.history == before


def test_trained_vectors_in_front_of_the_text_take_up_positions(tiny_model):
    places = {
        kind: positions(
            load_model(
                ModelConfig(name=str(tiny_model), dtype="float32"),
                AdapterConfig(kind=kind, **options),
                seed=1,
                device="cpu",
            )
        )
        for kind, options in {"lora": {"rank": 2}, "prompt": {"virtual_tokens": 5}}.items()
    }
    assert places == {"lora": 512, "prompt": 507}


# --- what a terminal is given


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("plain, with ä, 漢 and 👩‍⚕️\tand\nlines", "plain, with ä, 漢 and 👩‍⚕️\tand\nlines"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]52;c;c2VjcmV0\x1b\\text", "text"),
        ("\x1b]0;never ended", "0;never ended"),
        ("\x1bcreset", "reset"),
        ("one\r\ntwo\rthree", "one\ntwothree"),
        ("\x9b31m\x00\x07\x08\x7f", "31m"),
        ("safe \u202egnp.exe", "safe gnp.exe"),
        ("lone \udc1b surrogate", "lone  surrogate"),
    ],
)
def test_terminal_control_sequences_are_removed(given, shown):
    assert plain(given) == shown


def test_no_control_character_passes_except_line_breaks_and_tabs():
    every = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0)]))
    assert set(plain(every)) <= {"\n", "\t"} | set(map(chr, range(0x20, 0x7F)))


# --- who reaches a page


def port_of(host: str, port: int = 0):
    return take_port(host, port, why="the page has no encryption")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "::", "example.org", ""])
def test_a_page_for_other_machines_is_refused_with_the_way_to_reach_it(host):
    with pytest.raises(ConfigError, match="has no encryption") as error:
        port_of(host)
    assert "ssh -L" in str(error.value)


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        port_of("127.0.0.1")
    assert "make env EXTRAS=web" in str(error.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_port_that_is_taken_is_an_error_before_anything_is_loaded(host, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with port_of(host) as taken:
        number = taken.getsockname()[1]
        assert address_of(taken) == f"http://127.0.0.1:{number}/"
        assert address_of(taken, "secret") == f"http://127.0.0.1:{number}/secret/"
        with pytest.raises(ConfigError, match=f"port {number} of {host} is not available") as error:
            port_of(host, number)
    assert "--port" in str(error.value)


def status_of(path: str, **headers: str) -> tuple[int, dict[bytes, bytes]]:
    """What the guard lets an application answer, which would say 200 to everything."""
    sent = []

    async def app(scope, receive, send):
        assert scope["path"].startswith("/")
        assert "secret" not in scope["path"]
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    async def receive():
        return {}

    asked = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "path": path, "headers": asked}
    asyncio.run(guarded(app, "secret")(scope, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"])


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost", "[::1]:80", "LOCALHOST:1"])
def test_a_page_answers_by_this_machines_own_names(host):
    status, headers = status_of("/secret/", host=host)
    assert status == 200
    assert b"default-src 'none'" in headers[b"content-security-policy"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "127.0.0.1@evil.example"},
        {"host": "[broken"},
        {"host": "127.0.0.1", "origin": "https://evil.example"},
        {"host": "127.0.0.1", "origin": "null"},
        {"host": "127.0.0.1", "sec-fetch-site": "cross-site"},
    ],
    ids=str,
)
def test_pages_and_names_of_others_do_not_reach_the_model(headers):
    assert status_of("/secret/say", **headers)[0] == 403


@pytest.mark.parametrize(
    "path", ["/", "", "/secret", "/Secret/", "/secre/", "/secretx/", "//secret/", "/s\u00e9cret/"]
)
def test_nothing_is_said_without_the_token(path):
    assert status_of(path, host="127.0.0.1")[0] == 403


def test_an_answer_can_be_read_while_it_is_written_and_is_the_same(loaded):
    told = []
    both = speakers(loaded, max_new_tokens=6)
    reply = both.reply("What is scurvy?", {}, tell=lambda *piece: told.append(piece))
    whole = {name: said.removesuffix("\ufffd").strip() for name, said in reply.answers.items()}
    assert dict(told) == whole  # the last piece of each
    assert [name for name, _ in told] == sorted(name for name, _ in told)
    assert reply.answers == both.reply("What is scurvy?", {}).answers
    assert set(reply.cut) <= set(both.models)
