"""A page that shows what is going on and updates itself. It reads; it can change nothing.

Whoever serves it gives a function that looks. html/live.js draws what that says, as text.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import resources
from typing import Any, Literal

from silotune.core.errors import SilotuneError
from silotune.core.safe_text import one_line
from silotune.results.loopback import Asgi, guarded

FILES = {
    "": ("live.html", "text/html"),
    "style.css": ("style.css", "text/css"),
    "live.css": ("live.css", "text/css"),
    "live.js": ("live.js", "text/javascript"),
}
FRESH_S = 1.0
"""Two looks within this time share their answer: several pages cost no more than one."""


@dataclass(frozen=True)
class Part:
    """A section of the page: a table, charts or a list."""

    title: str
    kind: Literal["table", "charts", "list"]
    header: list[str] = field(default_factory=list[str])
    rows: list[list[str]] = field(default_factory=list[list[str]])
    marks: list[str] = field(default_factory=list[str])
    """For each row: busy, good, bad, or nothing."""
    charts: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Each has title, note, x (what its axis counts), last (where that ends) and lines with name,
    all (whether it stands for all clients) and points."""
    lines: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class Now:
    """All that the page shows."""

    kind: str
    title: str
    subtitle: str
    state: str
    headline: str = ""
    bar: tuple[int, int] | None = None
    """Rounds done, and all."""
    facts: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    parts: list[Part] = field(default_factory=list[Part])
    log: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    """Seconds since 1970, and a line."""


Look = Callable[[], Now]


def build_app(look: Look, token: str) -> Asgi:
    """The page and what it asks for, behind a token.

    Args:
        look: Called at most once a second, in a thread; one call at a time.
        token: The first part of every path.
    """
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    shared = _Shared(look)

    def state(request: Request) -> Response:  # noqa: ARG001
        return JSONResponse(shared.look())

    def file(request: Request) -> Response:
        name, kind = FILES[request.url.path.removeprefix("/")]
        text = resources.files("silotune.results").joinpath("html", name).read_text("utf-8")
        return Response(text, media_type=kind)

    def nothing(request: Request, error: Exception) -> Response:  # noqa: ARG001
        return Response(status_code=403)

    routes = [Route(f"/{path}", file) for path in FILES]
    app = Starlette(
        routes=[Route("/state", state), *routes],
        exception_handlers={404: nothing, 405: nothing},
    )
    return guarded(app, token)


class _Shared:
    """The last look, while it is fresh."""

    def __init__(self, look: Look) -> None:
        self._look, self._lock = look, threading.Lock()
        self._at, self._found = float("-inf"), dict[str, Any]()

    def look(self) -> dict[str, Any]:
        with self._lock:
            if time.monotonic() - self._at > FRESH_S:
                try:
                    self._found = _safe(asdict(self._look()))
                except SilotuneError as error:  # for example a file that is being replaced
                    self._found = {"error": one_line(str(error))}
                self._at = time.monotonic()
            return self._found


def _safe(value: Any) -> Any:
    """Every text as one line without control characters, and no number that JSON lacks."""
    if isinstance(value, str):
        return one_line(value)
    if isinstance(value, dict):
        return {key: _safe(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_safe(own) for own in value]
    return value
