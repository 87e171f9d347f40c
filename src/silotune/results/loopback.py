"""Pages for this machine's own browser: a port on loopback, who may ask, and a server.

This file knows neither runs nor models.
"""

import importlib.util
import secrets
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from silotune.core.errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""Of every answer: the browser loads nothing that this machine does not serve, keeps nothing, and
tells nobody the page's address."""


def take_port(host: str, port: int, *, why: str, what: str = "the page") -> socket.socket:
    """Open a page's port, so that problems show before anything is loaded.

    Args:
        host: One of `LOOPBACK`.
        port: 0 takes a free one.
        why: Why no other host will do.
        what: What needs the web extra, for the error.

    Returns:
        A listening socket for `serve`; the caller closes it.

    Raises:
        ConfigError: The web extra is not installed, the host is not this machine, or the port is
            taken.
    """
    if host not in LOOPBACK:
        raise ConfigError(
            f"--host '{host}' is refused: {why}.\n"
            "  Leave it at 127.0.0.1, and reach the page from elsewhere through SSH: "
            f"ssh -L {port}:127.0.0.1:{port} THIS-MACHINE"
        )
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{what} needs {' and '.join(missing)}, which is not installed.\n"
            "  Install it: make env EXTRAS=web"
        )
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"port {port} of {host} is not available: {error.strerror}.\n"
            "  Choose another --port, or 0 for any free one."
        ) from error


def address_of(port: socket.socket, token: str = "") -> str:
    """What to type into the browser."""
    host, number, *_ = port.getsockname()
    place = f"{token}/" if token else ""
    return f"http://[{host}]:{number}/{place}" if ":" in host else f"http://{host}:{number}/{place}"


def new_token() -> str:
    """The secret part of a page's address: 192 random bits."""
    return secrets.token_urlsafe(24)


def guarded(app: Asgi, token: str) -> Asgi:
    """Answer only requests that know the token, from this machine's own pages.

    Everything else gets 403 and no hint. The host is checked because a foreign name can point to
    this machine (DNS rebinding), the origin because a foreign page may be open in the same browser.
    """
    begin = f"/{token}/".encode()

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1"): v.decode("latin-1") for name, v in scope["headers"]}
        path = str(scope["path"]).encode("utf-8", "replace")
        ours = is_loopback(f"//{headers.get('host', '')}")
        ours &= "origin" not in headers or is_loopback(headers["origin"])
        ours &= headers.get("sec-fetch-site", "none") in ("none", "same-origin")
        ours &= secrets.compare_digest(path[: len(begin)], begin)
        extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
        if not ours:
            await send({"type": "http.response.start", "status": 403, "headers": extra})
            await send({"type": "http.response.body", "body": b""})
            return

        async def send_more(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        inner = {**scope, "path": path[len(begin) - 1 :].decode("utf-8", "replace")}
        await app(inner, receive, send_more)

    return guard


def is_loopback(url: str) -> bool:
    """Whether a URL's host is this machine, by name."""
    try:
        return urlsplit(url).hostname in LOOPBACK
    except ValueError:  # not an address
        return False


def server_of(app: Asgi) -> Any:
    """A `uvicorn.Server` for an app; `run(sockets=[port])` serves until a signal ends it."""
    import uvicorn

    # an open page keeps a connection open: do not wait for it, and do not report that it was closed
    how: dict[str, Any] = {"log_level": "critical", "timeout_graceful_shutdown": 1, "ws": "none"}
    how |= {"server_header": False, "proxy_headers": False, "lifespan": "off"}
    return uvicorn.Server(uvicorn.Config(app, **how))
