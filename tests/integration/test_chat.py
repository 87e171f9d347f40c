"""`silotune chat` on real tiny runs: in a terminal, through a pipe, and as a page."""

import contextlib
import itertools
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

import silotune
from silotune.cli import app
from silotune.cli.frame import plain
from silotune.core.errors import ConfigError
from silotune.models.loading import num_base_loads
from silotune.recipes.parse import parse
from tests.conftest import build_tiny_model, changed, hospital_rows, write_jsonl

NUM = 8
HOSTILE = "<script>document.title = 'owned'</script> <b>bold</b> <img src=x> **stars** $x$"


def recipe_of(place, **changes):
    table = {
        "seed": 3,
        "rounds": 1,
        "model": {"name": str(place / "model"), "dtype": "float32"},
        "adapter": {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]},
        "data": {"path": str(place / "rows.jsonl"), "system": "Be brief."},
        "partition": {"by": "source"},
        "train": {"batch_size": 2, "local_steps": 2, "lr": 1e-1, "max_length": 128},
        "runtime": {"device": "cpu", "threads": 1},
        "report": {"page": False, "samples": 0},
    }
    return parse(changed(table, changes))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model that talks: with larger weights a random one says different things."""
    folder = tmp_path_factory.mktemp("chat")
    build_tiny_model(folder / "model", initializer_range=0.5)
    write_jsonl(folder / "rows.jsonl", hospital_rows())
    return folder


@pytest.fixture(scope="module")
def done(place):
    return silotune.run(recipe_of(place), out=place / "run")


@pytest.fixture(scope="module")
def whole(place):
    """Of this run all weights were trained, so its base is another model."""
    changes = {"adapter": {"kind": "full"}, "train__lr": 1e-2}
    return silotune.run(recipe_of(place, **changes), out=place / "whole")


@pytest.fixture(scope="module")
def labelling(place):
    rows = [
        {"source": f"client-{i % 2}", "text": f"{word} film {i}", "label": label}
        for i, (word, label) in enumerate([("good", "up"), ("bad", "down")] * 8)
    ]
    data = {"path": str(write_jsonl(place / "films.jsonl", rows)), "labels": ["up", "down"]}
    return silotune.run(recipe_of(place, task="classify", data=data), out=place / "labelling")


def asked(run, question):
    """What `Run.ask` answers, by speaker."""
    return {
        name: run.ask(question, base=name == "base", max_new_tokens=NUM)
        for name in ("base", "federated")
    }


# --- from Python


@pytest.mark.parametrize("kind", ["done", "whole"])
def test_the_first_answers_are_those_of_ask_for_base_and_federated(kind, request):
    run = request.getfixturevalue(kind)
    said = run.chat(max_new_tokens=NUM).say("What is a1?")
    assert said == asked(run, "What is a1?")
    assert list(said) == ["base", "federated"]
    assert said["base"] != said["federated"], "else the test says nothing"


@pytest.mark.parametrize(("kind", "loads"), [("done", 1), ("whole", 2)])
def test_models_are_loaded_once_and_not_for_each_message(kind, loads, request):
    run, before = request.getfixturevalue(kind), num_base_loads()
    chat = run.chat(max_new_tokens=2)
    for text in ("What is a1?", "Why?", "Really?"):
        chat.say(text)
    assert num_base_loads() - before == loads


@pytest.mark.parametrize("only", ["base", "federated"])
def test_one_may_be_left_out_and_of_full_training_its_model_too(whole, only):
    before = num_base_loads()
    chat = whole.chat(only=only, max_new_tokens=NUM)
    assert num_base_loads() - before == 1
    assert chat.say("What is a1?") == {only: asked(whole, "What is a1?")[only]}


def test_a_classifier_answers_with_label_and_share_and_its_base_not_at_all(labelling):
    chat = labelling.chat()
    (first,) = [chat.say("good film 4") for _ in range(2)][:1]
    assert first == {"federated": labelling.ask("good film 4")}
    assert re.fullmatch(r"(up|down) \(\d+\.\d%\)", first["federated"])
    assert chat.say("good film 4") == first, "what was said before does not count"
    with pytest.raises(ConfigError, match="no head for these labels"):
        labelling.chat(only="base")


# --- in a terminal


def converse(run, typed: str, *options: str):
    arguments = ["chat", str(run.path), "--max-new-tokens", str(NUM), *options]
    return CliRunner().invoke(app, arguments, input=typed)


def test_a_piped_conversation_prints_both_answers_and_ends_with_the_input(done):
    result = converse(done, "What is a1?\n\n  And b2?  \n")
    assert result.exit_code == 0, result.output
    chat = done.chat(max_new_tokens=NUM)
    expected = ""
    for text in ("What is a1?", "And b2?"):
        for name, said in chat.say(text).items():
            shown = plain(said).replace("\n", "\n" + " " * 11)
            expected += f"{name:<10} {shown}\n"
        expected += "\n"
    assert result.stdout == expected
    assert "loading" in result.stderr, "what is no answer is not on stdout"


def test_reset_and_quit_are_commands_and_what_is_none_is_said(done):
    result = converse(done, "What is a1?\n/reset\n/rest\nWhat is a1?\n/quit\nWhy?\n")
    assert result.exit_code == 0
    first, second, *rest = result.stdout.split("\n\n")
    assert first == second
    assert rest == [""], "nothing after /quit, and no answer to /rest"
    assert "new conversation" in result.stderr
    assert "unknown command /rest: " in result.stderr


def test_only_one_speaker_is_asked(done):
    result = converse(done, "What is a1?\n", "--only", "base")
    assert result.stdout.startswith("base       ")
    assert "federated" not in result.stdout


def test_an_end_without_a_message_or_line_break_is_no_error(done):
    assert converse(done, "").exit_code == 0
    unended = converse(done, "What is a1?")
    assert unended.stdout == converse(done, "What is a1?\n").stdout


def test_a_message_that_is_too_long_is_told_and_the_conversation_goes_on(done):
    result = converse(done, "x" * 600 + "\nWhat is a1?\n")
    assert result.exit_code == 0
    assert "the model's context has 512 tokens" in result.stderr
    assert result.stdout == converse(done, "What is a1?\n").stdout


def test_a_classifiers_terminal_says_that_the_base_has_no_head(labelling):
    result = converse(labelling, "good film 4\n")
    assert result.stdout == f"federated  {labelling.ask('good film 4')}\n\n"
    assert "the base has no head for these labels" in result.stderr
    refused = converse(labelling, "", "--only", "base")
    assert refused.exit_code == 2


def test_what_steers_a_terminal_leaves_answers_and_messages(done, monkeypatch):
    from silotune.results.chat import Speakers

    heard = []

    def answer(self, name, text, ids, tell=None):
        heard.append(text)
        return "\x1b]52;c;c2VjcmV0\x07\x1b[2Jred\x1b[0m\x08\nnext", True

    monkeypatch.setattr(Speakers, "_answer", answer)
    result = converse(done, "\x1b[AWhat\x07 is a1?\n", "--only", "federated")
    assert result.stdout == "federated  red\n           next\n\n"
    assert heard == ["What is a1?"]


def spawn(run, *options: str, **streams) -> subprocess.Popen:
    command = [sys.executable, "-m", "silotune", "chat", str(run.path), *options]
    return subprocess.Popen(
        [*command, "--max-new-tokens", str(NUM)],
        # a process ignores what its parent ignored, and tests may run under nohup
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **streams,
    )


def read_until(descriptor: int, text: str, *, timeout_s: float = 120) -> str:
    seen, end = "", time.monotonic() + timeout_s
    while text not in seen:
        assert time.monotonic() < end, f"waited for {text!r}, and saw {seen!r}"
        try:
            seen += os.read(descriptor, 4096).decode(errors="replace")
        except OSError:  # the other end of a terminal is closed
            break
    return seen


def interrupt(process: subprocess.Popen, *, timeout_s: float = 90) -> int:
    """Press Ctrl-C until it ends, as people do.

    Python's readline sleeps through a signal that comes between its prompt and its first look at
    the terminal. Not too soon again: Python takes a second one while it ends as a kill.
    """
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(20)
    raise AssertionError("it does not end")


def test_in_a_real_terminal_answers_stand_side_by_side_and_ctrl_c_ends_it_well(done):
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1"}
    process = spawn(done, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    try:
        read_until(ours, "> ")
        os.write(ours, b"What is a1?\n")
        seen = read_until(ours, "\n> ")
        head = next(line for line in plain(seen).splitlines() if "base" in line)
        assert re.search(r"base {20,}federated", head)
        assert interrupt(process) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_where_only_the_input_is_a_terminal_the_prompt_is_no_part_of_the_output(
    monkeypatch, capsys
):
    from silotune.cli.chat import _read

    ours, theirs = pty.openpty()
    with open(theirs, encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        os.write(ours, b"What is a1?\n")
        assert _read() == "What is a1?"
        os.write(ours, b"\x04")  # Ctrl-D, the end of the input
        assert _read() is None
    os.close(ours)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("> ")


def test_help_names_the_options():
    result = CliRunner().invoke(app, ["chat", "--help"])
    for option in ("--only", "--max-new-tokens", "--web", "--host", "--port"):
        assert option in result.stdout


# --- as a page

SERVE = """
import json, socket, sys
from pathlib import Path

run, seen, hostile = sys.argv[1:]
find, connect = socket.getaddrinfo, socket.socket.connect

def note(host):
    with open(seen, "a") as file:
        file.write(json.dumps(str(host)) + "\\n")

def spied_find(host, *rest, **named):
    note(host)
    return find(host, *rest, **named)

def spied_connect(self, address):
    note(address[0])
    return connect(self, address)

socket.getaddrinfo, socket.socket.connect = spied_find, spied_connect

from silotune.results.chat import Speakers

answer = Speakers._answer
Speakers._answer = lambda self, name, text, ids, tell=None: (
    (hostile, True) if text == "Be hostile." else answer(self, name, text, ids, tell)
)
from silotune.cli import app

app(["chat", run, "--web", "--port", "0", "--max-new-tokens", "8"])
"""
"""The real command in a process of its own, that writes down every host it looks up or connects
to, and whose models say something hostile when they are asked to."""


@pytest.fixture(scope="module")
def served(done, tmp_path_factory):
    """The address of the page, and the file with the hosts that its process turned to."""
    pytest.importorskip("uvicorn", reason="not installed: make env EXTRAS=web")
    seen = tmp_path_factory.mktemp("page") / "hosts.jsonl"
    seen.touch()
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(done.path), str(seen), HOSTILE], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        url = process.stdout.readline().decode().strip()
        yield url, seen
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0, "Ctrl-C is the way to end it"
        assert process.stdout.read() == b"", "only the address is on stdout"
    finally:
        process.kill()
        process.communicate()


class Visitor:
    """A page that is open, in the requests that its own program makes."""

    def __init__(self, url: str) -> None:
        self.url, self.history = url, {}

    def call(self, text: str) -> list[dict[str, Any]]:
        """The lines of one answer."""
        body = {"text": text, "history": self.history}
        with httpx.Client(trust_env=False, timeout=120) as client:
            said = client.post(f"{self.url}say", json=body)
        assert said.status_code == 200
        return [json.loads(line) for line in said.text.splitlines()]

    def say(self, text: str) -> dict[str, str]:
        """What both have said in the end."""
        last = self.call(text)[-1]
        self.history = last["history"]
        return last["answers"]


def said_by(chat, text: str) -> dict[str, str]:
    """What the page shows of an answer: without control characters, which a random model writes."""
    return {name: plain(said) for name, said in chat.say(text).items()}


def get(url: str, **headers: str) -> httpx.Response:
    return httpx.get(url, headers=headers, trust_env=False)


def test_the_page_shows_both_answers_and_each_visitor_has_a_conversation(served, done):
    chat, other = done.chat(max_new_tokens=NUM), done.chat(max_new_tokens=NUM)
    one, two = Visitor(served[0]), Visitor(served[0])
    assert one.say("What is a1?") == said_by(chat, "What is a1?")
    alone = said_by(other, "And b2?")
    assert two.say("And b2?") == alone, "it has not heard the other"
    second = said_by(chat, "And b2?")
    assert second != alone
    assert one.say("And b2?") == second
    one.history = {}
    assert one.say("And b2?") == alone, "a new conversation"


def test_an_answer_streams_and_says_whether_it_was_cut(served):
    *pieces, last = Visitor(served[0]).call("What is a1?")
    for name in ("base", "federated"):
        so_far = [piece["so_far"] for piece in pieces if piece["name"] == name]
        assert len(so_far) >= 2
        # the last letter may lack bytes: it is shown when they have come, or at the end
        assert so_far[-1].rstrip("\ufffd") == last["answers"][name].rstrip("\ufffd")
        assert all(len(a) <= len(b) for a, b in itertools.pairwise(so_far))
    assert last["cut"] == ["base", "federated"]  # a random model does not end by itself
    assert get(f"{served[0]}about").json()["most"] == NUM


def test_visitors_who_ask_at_once_are_answered_one_after_the_other(served, done):
    questions = [f"What is c{i}?" for i in range(4)]
    with ThreadPoolExecutor(len(questions)) as pool:
        found = list(pool.map(lambda text: Visitor(served[0]).say(text), questions))
    # the base speaks while the adapter is off: answers at once would be the wrong model's
    chat = done.chat(max_new_tokens=NUM)
    for text, shown in zip(questions, found, strict=True):
        chat.reset()
        assert shown == said_by(chat, text)


def test_a_message_that_is_too_long_is_an_error_on_the_page_too(served, done):
    visitor = Visitor(served[0])
    (only,) = visitor.call("x" * 600)
    assert "the model's context has 512 tokens" in only["error"]
    assert visitor.say("Why?") == said_by(done.chat(max_new_tokens=NUM), "Why?")


def test_what_a_model_says_arrives_as_it_is(served):
    assert Visitor(served[0]).say("Be hostile.") == {"base": HOSTILE, "federated": HOSTILE}


@pytest.mark.parametrize(
    "body",
    [
        *(
            b"",
            b"[]",
            b"{}",
            b'{"text": "", "history": {}}',
            b'{"text": 3, "history": {}}',
            b"\xff",
        ),
        *(b'{"text": "a", "history": {"base": [["b"]]}}', b'{"text": "a", "history": {"base": 1}}'),
    ],
)
def test_a_request_that_is_none_of_the_page_is_refused(served, body):
    said = httpx.post(f"{served[0]}say", content=body, trust_env=False)
    assert (said.status_code, said.content) == (400, b"")


def test_only_the_page_is_served_and_only_to_this_machine(served):
    url = served[0]
    said = get(url)
    assert "silotune chat" in said.text
    assert "default-src 'none'" in said.headers["content-security-policy"]
    root = url.rstrip("/").rpartition("/")[0]
    refused = [
        get(f"{root}/"),
        get(f"{root}/wrong/"),
        get(url, Host="evil.example"),
        get(f"{url}about", Origin="https://evil.example"),
        get(f"{url}say"),
        get(f"{url}../../etc/passwd"),
    ]
    assert {(said.status_code, said.content) for said in refused} == {(403, b"")}


def test_the_server_speaks_to_nobody(served):
    Visitor(served[0]).say("What is a1?")
    hosts = {json.loads(line) for line in served[1].read_text(encoding="utf-8").splitlines()}
    assert hosts <= {"127.0.0.1", "localhost"}


def test_what_a_model_says_is_text_in_the_browser_and_nothing_is_fetched(served):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium, url = shutil.which("chromium"), served[0]
    if chromium is None:
        pytest.skip("there is no chromium on this machine")
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        fetched, failed = [], []
        page.on("request", lambda request: fetched.append(request.url))
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.on("console", lambda said: failed.append(said.text))
        page.goto(url)
        page.get_by_label("message").fill("Be hostile.")
        page.keyboard.press("Enter")
        said = page.locator(".said:not(.waits)")
        for i in range(2):
            playwright.expect(said.nth(i)).to_have_text(HOSTILE, timeout=20_000)
        page.get_by_label("message").fill("What is a1?")
        page.get_by_role("button", name="Send").click()
        playwright.expect(page.get_by_text("cut at 8 tokens")).to_have_count(2, timeout=20_000)
        assert page.title() == "silotune chat: model, fine-tuned by 3 clients"
        for width, scheme, rows in ((1200, "light", 1), (390, "dark", 2)):
            page.set_viewport_size({"width": width, "height": 800})
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            tops = {said.nth(i).bounding_box()["y"] for i in range(2)}
            assert len(tops) == rows, "side by side, or stacked on a phone"
            if place := os.environ.get("SCREENSHOTS"):
                page.screenshot(path=f"{place}/chat-{scheme}-{width}.png", full_page=True)
        page.get_by_role("button", name="New conversation").click()
        playwright.expect(said).to_have_count(0)
        browser.close()
    assert failed == []
    assert [place for place in fetched if not place.startswith((url, "data:"))] == []


def test_without_the_extra_the_command_says_what_to_install(done, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "uvicorn" else real(name)
    )
    monkeypatch.setattr(silotune.Run, "chat", lambda *_, **__: pytest.fail("a model was loaded"))
    result = converse(done, "", "--web")
    assert result.exit_code == 2
    assert "make env EXTRAS=web" in result.stderr


def test_another_machines_address_is_refused_before_a_model_is_loaded(done, monkeypatch):
    monkeypatch.setattr(silotune.Run, "chat", lambda *_, **__: pytest.fail("a model was loaded"))
    result = converse(done, "", "--web", "--host", "0.0.0.0")
    assert result.exit_code == 2
    assert "the page has no encryption" in result.stderr
