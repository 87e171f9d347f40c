"""How a client reads the server's notice: through the proxy that `join` uses, or directly."""

import socket
import ssl
import threading

import pytest

from silotune.deployment.consortium.kit import Kit
from silotune.deployment.notice import read_notice


def first_line_at(proxy: socket.socket, found: list[bytes]) -> None:
    """Take one connection, remember what it asks for, and refuse it."""
    connection, _ = proxy.accept()
    with connection:
        found.append(connection.recv(4096).split(b"\r\n", 1)[0])
        connection.sendall(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")


def kit_for(host: str, port: int) -> Kit:
    return Kit.model_construct(
        consortium="demo", client="north", host=host, port=port, authority="", certificate=""
    )


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy"])
def test_a_server_elsewhere_is_asked_through_the_proxy(monkeypatch, name):
    """`join` went through it, and `doctor` said that the server cannot be reached."""
    for other in ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(other, raising=False)
    found: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        asked = threading.Thread(target=first_line_at, args=(proxy, found))
        asked.start()
        with pytest.raises(OSError, match="502"):
            read_notice(kit_for("fl.example.org", 8443), ssl.create_default_context())
        asked.join()
    assert found[0].startswith(b"CONNECT fl.example.org:8443 ")


def test_this_machine_is_asked_directly(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody listens there
    found: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        asked = threading.Thread(target=first_line_at, args=(server, found))
        asked.start()
        kit = kit_for("127.0.0.1", server.getsockname()[1])
        with pytest.raises(OSError):  # noqa: PT011  what answers here speaks no TLS
            read_notice(kit, ssl.create_default_context())
        asked.join()
    assert found, "the server itself was asked"
