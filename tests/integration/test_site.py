"""`make site`: docs/ as pages. Strict, complete, and without a request to anybody else."""

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import silotune

HOUSE = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium")
LOADED = re.compile(
    r"<(?:script|link|img|iframe|source|video|audio|object|embed|use)\b[^>]*?"
    r'\b(?:src|href|data|srcset|poster)="([^"]+)"'
)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The pages, built as `make site` builds them."""
    place = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", place],
        cwd=HOUSE,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return place


def test_every_page_of_docs_is_in_the_site(site):
    pages = [p.relative_to(HOUSE / "docs") for p in (HOUSE / "docs").rglob("*.md")]
    assert [p for p in pages if not (site / p.with_suffix(".html")).is_file()] == []
    assert not list(site.rglob("*.py"))


def test_no_page_loads_anything_from_elsewhere(site):
    outside = {
        (page.name, address)
        for page in site.rglob("*.html")
        for address in LOADED.findall(page.read_text(encoding="utf-8"))
        if re.match(r"(?:[a-z]+:)?//", address)
    }
    assert outside == set()
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", style.read_text("utf-8"))
    assert LOADED.findall('<script async src="https://example.org/x.js">'), "the pattern finds one"


def test_the_api_page_shows_every_public_name_and_no_other(site):
    page = (site / "api.html").read_text(encoding="utf-8")
    shown = set(re.findall(r'<h2 id="silotune\.(\w+)"', page))
    assert shown == set(silotune.__all__)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
def test_a_browser_asks_nobody_else_also_when_it_searches(site):
    """The theme's script knows two other hosts, for features that this site does not use."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    asked: list[str] = []
    handler = functools.partial(_Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        home = f"http://127.0.0.1:{server.server_port}/"
        with playwright.sync_playwright() as tools:
            browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page()
            page.on("request", lambda request: asked.append(request.url))
            for name in (
                "index.html",
                "api.html",
                "decisions/0001-flower-is-an-optional-engine.html",
            ):
                page.goto(home + name)
            page.locator("input[name=query]").fill("federated")
            page.locator(".md-search-result__item").first.wait_for(state="attached")
            browser.close()
        server.shutdown()
    assert any(url.endswith("search_index.json") for url in asked)
    assert [url for url in asked if not url.startswith((home, "data:", "blob:"))] == []


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """A test needs no log of requests."""
