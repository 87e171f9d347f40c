"""One question to the hub, and what its libraries are told: against sockets of this machine."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import pytest
from huggingface_hub import constants

from silotune.core import hub

ASK = hub._ask
"""Before tests/conftest.py replaces it."""


@pytest.fixture(autouse=True)
def _as_a_new_process(monkeypatch):
    monkeypatch.setattr(hub, "_ask", ASK)
    monkeypatch.setattr(hub, "_last", None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)


@pytest.fixture
def deaf(monkeypatch):
    """A port on which nobody ever answers, as behind a firewall."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(hub, "TIMEOUT_S", 0.2)
        yield


@pytest.fixture
def closed(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")


@pytest.fixture
def refusing(monkeypatch):
    """Answers every question with 403, as the hub does without an account."""
    questions = []

    class Refusing(BaseHTTPRequestHandler):
        def do_HEAD(self):
            questions.append(self.path)
            self.send_response(403)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield questions
    server.shutdown()
    server.server_close()
    thread.join()


def options() -> tuple[bool, bool]:
    return constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE


def test_a_hub_that_never_answers_switches_the_libraries_to_their_caches(deaf):
    assert hub.why_offline() == "no answer within 0 s"
    assert options() == (True, True)


def test_a_hub_that_cannot_be_connected_to_is_said_in_one_line(closed):
    reason = hub.why_offline()
    assert reason
    assert "\n" not in reason
    assert options() == (True, True)


def test_a_refusal_is_an_answer_and_one_question_is_enough(refusing):
    assert [hub.why_offline() for _ in range(3)] == [None] * 3
    assert options() == (False, False)
    assert len(refusing) == 1


def test_a_process_that_lives_longer_asks_again(closed, refusing, monkeypatch):
    here = constants.ENDPOINT
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert hub.why_offline() is not None
    monkeypatch.setattr(constants, "ENDPOINT", here)  # the network is back
    assert hub.why_offline() is not None
    assert hub._last is not None
    monkeypatch.setattr(hub, "_last", (hub._last[0] - hub.REMEMBERED_S - 1, hub._last[1]))
    assert hub.why_offline() is None
    assert options() == (False, False)


def test_what_the_user_has_set_stays(refusing, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.why_offline() == "HF_HUB_OFFLINE is set"
    assert constants.HF_HUB_OFFLINE
    assert refusing == []


def test_a_users_choice_for_data_sets_alone_stays(closed, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
    assert hub.why_offline() is not None
    assert options() == (True, False)
