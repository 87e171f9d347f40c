"""A client behind a proxy: `join` and `doctor` take the same way to the server."""

import json
import shutil
import socket
import subprocess
import threading
import urllib.request

import pytest

from silotune.core.errors import ConfigError
from silotune.deployment.consortium.caddy import find_caddy
from silotune.deployment.consortium.certificates import write_own_certificate
from silotune.deployment.consortium.folder import Consortium
from silotune.deployment.consortium.gate import LOOPBACK, client_gate
from silotune.deployment.consortium.kit import read_kit
from silotune.deployment.join import init
from silotune.deployment.outbound_proxy import proxy_for
from silotune.runtime.flower.engine import free_port

PROXY = "http://proxy.example.org:3128"


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy", "ALL_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_variable_the_way_is_direct():
    assert proxy_for("fl.example.org", 8443) is None


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy"])
@pytest.mark.parametrize(
    ("given", "used"),
    [
        (PROXY, PROXY),
        ("proxy.example.org:3128", PROXY),
        ("https://p:1", "https://p:1"),
        ("HTTP://p:1", "HTTP://p:1"),
    ],
)
def test_both_spellings_and_an_address_without_a_scheme_are_read(monkeypatch, name, given, used):
    monkeypatch.setenv(name, given)
    assert proxy_for("fl.example.org", 8443) == used


def test_other_variables_and_other_kinds_of_proxies_are_not_used(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", PROXY)
    monkeypatch.setenv("HTTP_PROXY", PROXY)
    assert proxy_for("fl.example.org", 8443) is None
    monkeypatch.setenv("HTTPS_PROXY", "socks5://user:secret@p:1080")
    with pytest.raises(ConfigError, match="begins with socks5://") as caught:
        proxy_for("fl.example.org", 8443)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
@pytest.mark.parametrize(
    ("exempt", "host", "direct"),
    [
        ("fl.example.org", "fl.example.org", True),
        ("example.org", "fl.example.org", True),
        (".example.org", "fl.example.org", True),
        ("a.org, example.org", "fl.example.org", True),
        ("fl.example.org:8443", "fl.example.org", True),
        ("fl.example.org:443", "fl.example.org", False),
        ("le.org", "fl.example.org", False),
        ("*", "fl.example.org", True),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("10.1.2.3", "10.1.2.3", True),
        ("fd00::/8", "fd00::1", True),
        ("", "fl.example.org", False),
    ],
)
def test_exempt_hosts_are_reached_directly(monkeypatch, name, exempt, host, direct):
    monkeypatch.setenv("HTTPS_PROXY", PROXY)
    monkeypatch.setenv(name, exempt)
    assert proxy_for(host, 8443) == (None if direct else PROXY)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.0.5", "::1"])
def test_this_machine_is_never_reached_through_a_proxy(monkeypatch, host):
    monkeypatch.setenv("HTTPS_PROXY", PROXY)
    assert proxy_for(host, 8443) is None


# --- the proxy of `join` does what it is told -----------------------------------------------------


def heard_at_the_proxy(tmp_path, monkeypatch, *, told: bool) -> bytes:
    """What a client's gate sends to a proxy for its first request; the proxy refuses it."""
    Consortium.create(tmp_path / "fl", name="demo", address="fl.example.invalid")
    request, _ = init("north", tmp_path / "north")
    kit_file, _ = Consortium.open(tmp_path / "fl").approve(request)
    kit, port = read_kit(kit_file), free_port()
    trusted = write_own_certificate(tmp_path / "own", LOOPBACK)
    (tmp_path / "certificate.pem").write_text(kit.certificate)
    (tmp_path / "authority.pem").write_text(kit.authority)
    found: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(20 if told else 2)
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        monkeypatch.setenv("HTTPS_PROXY", address)
        config = client_gate(
            kit,
            port=port,
            own=tmp_path / "own",
            key=tmp_path / "north" / "key.pem",
            certificate=tmp_path / "certificate.pem",
            authority=tmp_path / "authority.pem",
            proxy=address if told else None,
        )
        (tmp_path / "gate.json").write_text(json.dumps(config))

        def refuse() -> None:
            try:
                connection, _ = proxy.accept()
            except TimeoutError:
                return
            with connection:
                found.append(connection.recv(4096).split(b"\r\n", 1)[0])
                connection.sendall(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")

        listening = threading.Thread(target=refuse)
        listening.start()
        words = [find_caddy(), "run", "--config", str(tmp_path / "gate.json")]
        with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as gate:
            try:
                lines = iter(gate.stderr.readline, "")
                assert any("serving initial configuration" in line for line in lines)
                url = f"https://{LOOPBACK}:{port}/v1/fleet/pull-messages"
                words = ["curl", "-s", "--noproxy", "*", "--cacert", str(trusted), "-d", "x", url]
                done = subprocess.run(words, capture_output=True, text=True)
                assert done.returncode in (0, 92), done  # answered, or the stream was ended
            finally:
                gate.kill()
        listening.join()
    return found[0] if found else b""


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@needs_curl
def test_a_clients_gate_connects_through_the_proxy_that_it_is_told(tmp_path, monkeypatch):
    line = heard_at_the_proxy(tmp_path, monkeypatch, told=True)
    assert line.startswith(b"CONNECT fl.example.invalid:8443 ")


@needs_curl
def test_a_clients_gate_that_is_told_none_ignores_the_variable(tmp_path, monkeypatch):
    """`doctor` found that NO_PROXY exempts the server, and the gate must not find otherwise."""
    assert heard_at_the_proxy(tmp_path, monkeypatch, told=False) == b""
    assert urllib.request.getproxies()["https"], "otherwise this shows nothing"
