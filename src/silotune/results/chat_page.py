"""A conversation with a run on a page in the browser, through Gradio. For this machine only.

The page has no password and no encryption, and a model may repeat rows that it was trained on. So
it listens on loopback, answers only its own page, loads nothing from elsewhere, and neither accepts
nor serves files. This file knows conversations from `Speakers`; it does not know terminals.
"""

import importlib.util
import socket
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from silotune.core.errors import ConfigError, SilotuneError
from silotune.results.chat import NO_HEAD, Exchange, History, Speakers

LOOPBACK = ("127.0.0.1", "localhost", "::1")

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_Asgi = Callable[[_Scope, _Receive, _Send], Awaitable[None]]

# Gradio has many more: uploads, files, a proxy, a login, code editing. None is needed here.
_PLACES = ("/assets/", "/static/", "/gradio_api/heartbeat/")
_PATHS = (
    "/",
    "/config",
    "/theme.css",
    "/favicon.ico",
    "/gradio_api/info",
    "/gradio_api/queue/join",
    "/gradio_api/queue/data",
)
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "frame-ancestors 'none'; form-action 'none'; base-uri 'self'"
)
"""What the browser may load for the page: nothing that this machine does not serve."""


def take_port(host: str, port: int) -> socket.socket:
    """Open the page's port, so that problems show before a model is loaded.

    Args:
        host: One of `LOOPBACK`.
        port: 0 takes a free one.

    Returns:
        A listening socket for `serve`; the caller closes it.

    Raises:
        ConfigError: Gradio is not installed, the host is not this machine, or the port is taken.
    """
    if host not in LOOPBACK:
        raise ConfigError(
            f"--host '{host}' is refused: the page has neither a password nor encryption, and the "
            "model may repeat rows that it was trained on.\n"
            "  Leave it at 127.0.0.1, and reach the page from elsewhere through SSH: "
            "ssh -L 7860:127.0.0.1:7860 THIS-MACHINE"
        )
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError(
            "--web needs Gradio, which is not installed.\n  Install it: make env EXTRAS=web"
        )
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"port {port} of {host} is not available: {error.strerror}.\n"
            "  Choose another --port, or 0 for any free one."
        ) from error


def address_of(port: socket.socket) -> str:
    """What to type into the browser."""
    host, number, *_ = port.getsockname()
    return f"http://[{host}]:{number}/" if ":" in host else f"http://{host}:{number}/"


def build_page(speakers: Speakers) -> Any:
    """Build the page: a column per speaker, a text box, and a button for a new conversation.

    Args:
        speakers: Shared by all visitors, who are answered one at a time. Each visitor has a
            separate conversation, which ends when they close the page.

    Returns:
        A `gradio.Blocks`; see `serve`.
    """
    import gradio as gr

    one_at_a_time = threading.Lock()  # the base answers while the shared model's adapter is off
    names = list(speakers.models)

    def answer(text: str, history: History) -> list[Any]:
        if not text.strip():
            return ["", history, *columns(history)]
        try:
            with one_at_a_time:
                reply = speakers.reply(text, history)
        except SilotuneError as error:
            raise gr.Error(str(error), print_exception=False) from error
        for note in reply.notes:
            gr.Info(note)
        return ["", reply.history, *columns(reply.history)]

    def reset() -> list[Any]:
        return ["", {}, *columns({})]

    def columns(history: History) -> list[str]:
        return [_transcript(history.get(name, ())) for name in names]

    with gr.Blocks(title="silotune chat", analytics_enabled=False, fill_height=True) as page:
        history = gr.State({})
        if speakers.run.task == "classify":
            gr.Markdown(f"Each text is classified separately. {NO_HEAD.capitalize()}.")
        with gr.Row(scale=1):
            shown = [
                # not gr.Chatbot: it shows answers as (sanitized) HTML; here they are plain text
                gr.Textbox(label=name, lines=16, max_lines=16, interactive=False, buttons=["copy"])
                for name in names
            ]
        box = gr.Textbox(label="message", autofocus=True, submit_btn=True)
        button = gr.Button("New conversation")
        outputs = [box, history, *shown]
        how: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
        box.submit(answer, [box, history], outputs, api_name="answer", **how)
        button.click(reset, None, outputs, api_name="reset")
    return page


def _transcript(talk: tuple[Exchange, ...]) -> str:
    return "\n\n".join(f"> {asked}\n{said}" for asked, said in talk)


def serve(page: Any, port: socket.socket) -> None:
    """Serve a page until a signal ends it.

    This runs its own server, because Gradio's `launch` sends itself a request through any
    configured proxy and can open tunnels.

    Args:
        page: See `build_page`.
        port: See `take_port`.
    """
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI
    from gradio.themes import Base

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        app,
        page,
        path="",
        root_path="",
        footer_links=[],
        run_history=False,  # it would keep conversations in the browser
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    )
    # an open page keeps a connection open: do not wait for it, and do not report that it was
    # closed; Gradio prints errors that occur while answering
    how: dict[str, Any] = {"log_level": "critical", "timeout_graceful_shutdown": 1, "ws": "none"}
    uvicorn.Server(uvicorn.Config(guarded(app), **how)).run(sockets=[port])


def guarded(app: _Asgi) -> _Asgi:
    """Allow only the requests that the page needs, and only from this machine's own pages.

    Otherwise a foreign host name that points to this machine, or a foreign page that is open in the
    same browser, could reach the model too.
    """

    async def guard(scope: _Scope, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): v.decode("latin-1") for name, v in scope["headers"]}
        path = str(scope["path"])
        ours = _is_loopback(f"//{headers.get('host', '')}")
        ours &= "origin" not in headers or _is_loopback(headers["origin"])
        if not ours or not (path in _PATHS or path.startswith(_PLACES)):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return

        async def send_with_policy(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", _POLICY.encode())
                message["headers"] = [*message.get("headers", ()), policy]
            await send(message)

        await app(scope, receive, send_with_policy)

    return guard


def _is_loopback(url: str) -> bool:
    try:
        return urlsplit(url).hostname in LOOPBACK
    except ValueError:  # not an address
        return False
