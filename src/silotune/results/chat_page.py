"""A conversation with a run on a page in the browser. For this machine only.

A model may repeat rows that it was trained on, and nothing is encrypted. So the page listens on
loopback, at an address with a token, answers only itself, loads nothing from elsewhere, and neither
accepts nor serves files. Answers stream as they are written, as text and never as markup. This file
knows conversations from `Speakers`; it does not know terminals.
"""

import json
import queue
import threading
from collections.abc import Iterator
from importlib import resources
from typing import Any

from silotune.core.errors import SilotuneError
from silotune.core.reading_back import parse_object
from silotune.core.safe_text import one_line, plain
from silotune.results.chat import NO_HEAD, History, Speakers
from silotune.results.loopback import Asgi, guarded

WHY = "the page has no encryption, and the model may repeat rows that it was trained on"
FILES = {
    "": ("chat.html", "text/html"),
    "style.css": ("style.css", "text/css"),
    "chat.css": ("chat.css", "text/css"),
    "chat.js": ("chat.js", "text/javascript"),
}
MOST_BYTES = 2_000_000
"""Largest request: a message, and the conversation so far, which each page keeps itself."""


def build_app(speakers: Speakers, token: str, *, title: str, run: str) -> Asgi:
    """Build the page.

    Args:
        speakers: Shared by all visitors, who are answered one at a time. Each visitor has a
            separate conversation, which ends when they close the page.
        token: The first part of every path.
        title: What the page is about.
        run: The name of the run.
    """
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    one_at_a_time = threading.Lock()  # the base answers while the shared model's adapter is off
    classifies = speakers.run.task == "classify"
    about = {
        "title": one_line(title),
        "run": one_line(run),
        "names": list(speakers.models),
        "note": f"Each text is classified separately. {NO_HEAD.capitalize()}."
        if classifies
        else "",
        "most": speakers.max_new_tokens,
    }

    def file(request: Request) -> Response:
        name, kind = FILES[request.url.path.removeprefix("/")]
        text = resources.files("silotune.results").joinpath("html", name).read_text("utf-8")
        return Response(text, media_type=kind)

    def say_what(request: Request) -> Response:  # noqa: ARG001
        return JSONResponse(about)

    async def say(request: Request) -> Response:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                return Response(status_code=413)
        try:
            text, history = _asked(body, list(speakers.models))
        except (ValueError, KeyError, TypeError):
            return Response(status_code=400)
        lines = _answering(speakers, text, history, one_at_a_time)
        return StreamingResponse(lines, media_type="application/x-ndjson")

    def nothing(request: Request, error: Exception) -> Response:  # noqa: ARG001
        return Response(status_code=403)

    routes = [Route(f"/{path}", file) for path in FILES]
    app = Starlette(
        routes=[Route("/about", say_what), Route("/say", say, methods=["POST"]), *routes],
        exception_handlers={404: nothing, 405: nothing},
    )
    return guarded(app, token)


def _asked(body: bytes, names: list[str]) -> tuple[str, History]:
    """The message, and the conversation that the page has kept.

    Raises:
        ValueError, KeyError, TypeError: It is not what the page sends.
    """
    given = parse_object(body.decode("utf-8"))
    text, history = given["text"], given["history"]
    if not isinstance(text, str) or not text.strip() or not isinstance(history, dict):
        raise ValueError
    found: dict[str, tuple[tuple[str, str], ...]] = {}
    for name in names:
        talk = [(asked, said) for asked, said in history.get(name, [])]
        if not all(isinstance(own, str) for pair in talk for own in pair):
            raise ValueError
        found[name] = tuple(talk)
    return text, found


def _answering(
    speakers: Speakers, text: str, history: History, one_at_a_time: threading.Lock
) -> Iterator[str]:
    """Lines of JSON: what each speaker has said so far, and in the end everything.

    The model works in a thread, which goes on to the end even if the page is closed meanwhile.
    """
    said: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            with one_at_a_time:
                reply = speakers.reply(
                    text,
                    history,
                    tell=lambda name, text: said.put({"name": name, "so_far": plain(text)}),
                )
            said.put(
                {
                    "answers": {name: plain(own) for name, own in reply.answers.items()},
                    "history": reply.history,
                    "cut": list(reply.cut),
                    "notes": list(reply.notes),
                }
            )
        except SilotuneError as error:
            said.put({"error": plain(str(error))})
        except Exception:
            said.put({"error": "This could not be answered; the terminal says why."})
            raise
        finally:
            said.put(None)

    threading.Thread(target=work, name="answer", daemon=True).start()
    while (line := said.get()) is not None:
        yield json.dumps(line, ensure_ascii=False) + "\n"
