"""Reports as a reader meets them: in a browser, on a phone and a desk, by day, by night, on paper.

Needs the system's chromium; without it these tests are skipped.
"""

import shutil

import pytest

import silotune
from silotune.federation.run_folder import RunFolder
from silotune.results.page import run_page
from silotune.workflows.compare.page import comparison_page
from tests.conftest import hospital_rows, write_jsonl, write_tiny_recipe
from tests.unit.results.page_values import HOSTILE, comparison_of, samples_of, split_of

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")

PHONE, DESK = 390, 1200
NAMES = HOSTILE[:3]

DRAWN = """() => [...document.querySelectorAll("svg.chart")].map(svg => {
  const box = svg.getBoundingClientRect();
  const inside = r => r.left >= box.left - 1 && r.right <= box.right + 1
    && r.top >= box.top - 1 && r.bottom <= box.bottom + 1;
  const real = e => { const r = e.getBoundingClientRect(); return r.width + r.height > 2; };
  return {
    name: svg.getAttribute("aria-label"),
    width: box.width,
    height: box.height,
    paths: [...svg.querySelectorAll("g path, g use")].filter(real).length,
    outside: [...svg.querySelectorAll("text")]
      .filter(t => !inside(t.getBoundingClientRect())).map(t => t.textContent),
  };
})"""
OVERLAPS = """() => [...document.querySelectorAll("svg.chart")].flatMap(svg => {
  const boxes = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBBox(), t]);
  return boxes.flatMap(([a, p, s], i) => boxes.slice(i + 1).filter(([b, q, t]) => {
    if (s.getAttribute("transform").startsWith("rotate(-90")) return false;
    if (t.getAttribute("transform").startsWith("rotate(-90")) return false;
    const wide = Math.min(p.x + p.width, q.x + q.width) - Math.max(p.x, q.x);
    const high = Math.min(p.y + p.height, q.y + q.height) - Math.max(p.y, q.y);
    return wide > 1 && high > 4;
  }).map(([b]) => [a, b]));
})"""
COLOURS = """() => {
  const probe = selector => getComputedStyle(document.querySelector(selector));
  return {
    paper: probe("body").backgroundColor,
    ink: probe("body").color,
    letters: probe("svg.chart text").fill,
    verdict: probe(".verdict").backgroundColor,
  };
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory, tiny_model):
    """The page of a real run whose clients' names mean harm, and that of a comparison."""
    place = tmp_path_factory.mktemp("pages")
    recipe = write_tiny_recipe(place, tiny_model)
    rows = [{**row, "source": NAMES[int(row["source"][-1])]} for row in hospital_rows()]
    write_jsonl(place / "hospitals.jsonl", rows)
    done = silotune.run(recipe, ["rounds=2"], out=place / "run")
    shared = {"split": split_of(NAMES, num_labels=14), "samples": samples_of(NAMES)}
    provenance = RunFolder.open(done.path).read_json("provenance.json")
    run = run_page(done.config, done.summary, done.metrics, provenance, **shared)
    compared = comparison_page(
        comparison_of(HOSTILE), run=done.config, provenance=provenance, **shared
    )
    files = {"run": place / "run.html", "comparison": place / "comparison.html"}
    files["run"].write_text(run, encoding="utf-8")
    files["comparison"].write_text(compared, encoding="utf-8")
    return files


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def views(pages, browser):
    """Both pages, opened once; every request and complaint of them is noted."""
    opened = {}
    for name, file in pages.items():
        view = opened[name] = browser.new_page()
        view.asked, view.complaints = [], []
        view.on("request", lambda asked, view=view: view.asked.append(asked.url))
        view.on("console", lambda said, view=view: view.complaints.append(said.text))
        view.on("pageerror", lambda error, view=view: view.complaints.append(str(error)))
        view.on("dialog", lambda dialog, view=view: view.complaints.append(dialog.message))
        view.goto(file.as_uri())
    return opened


@pytest.fixture(params=["run", "comparison"])
def view(request, views):
    return views[request.param]


def look(view, width=DESK, scheme="light", media="screen"):
    view.set_viewport_size({"width": width, "height": 800})
    view.emulate_media(media=media, color_scheme=scheme)


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_charts_are_drawn_whole_and_the_page_is_as_wide_as_the_window(view, width, scheme):
    look(view, width, scheme)
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    charts = view.evaluate(DRAWN)
    assert len(charts) >= 7
    for chart in charts:
        assert chart["width"] > 300, chart
        assert chart["height"] > 80, chart
        assert chart["paths"] > 10, chart
        assert chart["outside"] == [], chart


def test_no_two_texts_of_a_chart_lie_on_each_other(view):
    look(view, PHONE)
    assert view.evaluate(OVERLAPS) == []


def test_letters_of_charts_are_readable_on_a_phone(view):
    look(view, PHONE)
    size = "parseFloat(getComputedStyle(svg.querySelector('text')).fontSize)"
    scale = "svg.getBoundingClientRect().width / svg.viewBox.baseVal.width"
    sizes = f"[...document.querySelectorAll('svg.chart')].map(svg => {size} * {scale})"
    assert min(view.evaluate(sizes)) > 9


def test_scripts_in_names_and_answers_are_text(view):
    assert view.evaluate("document.scripts.length") == 0
    assert view.evaluate("document.images.length") == 0
    assert NAMES[0] in view.inner_text("body")


def test_page_and_charts_follow_the_theme(view):
    seen = {}
    for scheme in ("light", "dark"):
        look(view, scheme=scheme)
        seen[scheme] = view.evaluate(COLOURS)
    for colours in seen.values():
        assert contrast(colours["paper"], colours["ink"]) > 7
        assert contrast(colours["paper"], colours["letters"]) > 7
        assert contrast(colours["verdict"], colours["ink"]) > 7
    assert brightness(seen["light"]["paper"]) > 0.9 > 0.1 > brightness(seen["dark"]["paper"])


def test_print_is_light_and_holds_what_is_folded_on_the_screen(view):
    look(view, scheme="dark")
    recipe = view.locator("#recipe details")
    on_screen = recipe.bounding_box()["height"]
    assert not recipe.locator("pre").is_visible()
    look(view, scheme="dark", media="print")
    assert recipe.locator("pre").is_visible()
    assert recipe.bounding_box()["height"] > 10 * on_screen
    assert brightness(view.evaluate(COLOURS)["paper"]) > 0.9
    assert brightness(view.evaluate(COLOURS)["letters"]) < 0.1
    assert all(chart["outside"] == [] for chart in view.evaluate(DRAWN))


def test_a_page_asks_for_nothing_but_itself_and_has_no_complaint(pages, views):
    for name, view in views.items():  # last: after all that the tests above did with it
        view.reload()
        assert set(view.asked) == {pages[name].as_uri()}
        assert view.complaints == []


def brightness(colour: str) -> float:
    """Relative luminance of "rgb(r, g, b)", as in WCAG 2.2."""
    parts = [int(p) / 255 for p in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    dark, light = sorted((brightness(one), brightness(other)))
    return (light + 0.05) / (dark + 0.05)
