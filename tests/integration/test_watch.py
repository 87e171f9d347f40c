"""The live page: over real HTTP, and in a browser. It shows foreign names as text, and tells nobody
without its token that it exists."""

import json
import os
import shutil
import time
from datetime import date

import httpx
import pytest

import silotune
from silotune.core.errors import ConfigError
from silotune.core.types import Update
from silotune.deployment.watch import look_of, page_in_background
from silotune.federation.live_file import read_live
from silotune.federation.live_writer import LiveFile
from silotune.federation.progress import Progress
from silotune.federation.run_folder import RunFolder
from silotune.recipes.parse import load_recipe
from tests.conftest import write_tiny_recipe
from tests.unit.results.page_values import HOSTILE

CHROMIUM = shutil.which("chromium")
NAMES = [*HOSTILE[:3], "north"]
METRICS = {"train_loss": 2.5, "num_tokens": 900, "seconds": 10.0}


def write_run(folder, model):
    """A run in its second round, whose clients' names mean harm."""
    made = RunFolder.create(folder / "run", load_recipe(write_tiny_recipe(folder, model)))
    rows = []
    for name in NAMES:
        train = {"event": "train", "round": 1, "client": name, "status": "ok", "train_loss": 3.0}
        rows.append({**train, "num_tokens": 5, "bytes_up": 1000, "bytes_down": 2000})
        score = {"event": "evaluate", "round": 0, "client": name, "status": "ok", "loss": 5.0}
        rows.append({**score, "num_tokens": 5})
    made.append_metrics([*rows, {"event": "round", "round": 1, "num_asked": 4, "seconds": 12.0}])
    return made.path


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model):
    """The run's folder and its live file, which keeps being written."""
    path = write_run(tmp_path_factory.mktemp("watched"), tiny_model)
    live = LiveFile(path)
    with live.writing():
        live.begin(3, 2)
        live.begin_round(2, NAMES)
        live.client_steps(NAMES[0], 0, 50, 0)
        live.client_steps(NAMES[0], 12, 50, 1234)
        yield path, live


@pytest.fixture(scope="module")
def address(run):
    told = []
    with page_in_background(run[0], 0, told.append):
        yield told[0].removeprefix("live page: ")


def ask(url, method="GET", **headers):
    with httpx.Client(trust_env=False, timeout=30) as client:
        return client.request(
            method, url, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )


def test_the_state_of_a_run_names_round_clients_losses_bytes_and_log(address):
    deadline = time.monotonic() + 20
    while True:
        now = ask(f"{address}state").json()
        if now["parts"] and any("step 12/50" in row[1] for row in now["parts"][0]["rows"]):
            break
        assert time.monotonic() < deadline, now
        time.sleep(0.2)
    assert (now["kind"], now["state"], now["bar"]) == ("run", "running", [1, 3])
    assert now["headline"].startswith("round 2/3")
    assert dict(now["facts"])["sent, both ways"] == "12.0 kB"
    clients, losses = now["parts"]
    busy = clients["rows"][clients["marks"].index("busy")]
    assert busy[1].startswith("step 12/50")
    assert {tuple(row[2:5]) for row in clients["rows"]} == {("1: ok", "3.000", "5.000")}
    assert [len(chart["lines"]) for chart in losses["charts"]] == [5, 4]
    assert any(text.startswith("round 2/3") for _, text in now["log"])
    assert all(c.isprintable() for c in json.dumps(now, ensure_ascii=False))


def test_without_the_token_from_elsewhere_or_to_write_there_is_only_a_bare_403(address):
    root, _, token = address.rstrip("/").rpartition("/")
    almost = token[:-1] + ("A" if token[-1] != "A" else "B")
    port = root.rpartition(":")[2]
    refused = [
        ask(f"{root}/"),
        ask(f"{root}/{token}"),
        ask(f"{root}/{almost}/"),
        ask(f"{root}/{token}x/state"),
        ask(f"{root}//{token}/state"),
        ask(f"{root}/favicon.ico"),
        ask(f"{root}/state?token={token}"),
        ask(address, host=f"evil.example:{port}"),
        ask(address, host="127.0.0.1.evil.example"),
        ask(address, origin="https://evil.example"),
        ask(address, sec_fetch_site="cross-site"),
        ask(f"{address}state", "POST"),
        ask(f"{address}state", "OPTIONS"),
        ask(f"{address}../state"),
        ask(f"{address}%2e%2e/%2e%2e/etc/passwd"),
        ask(f"{address}frame.html"),
    ]
    assert {(said.status_code, said.content) for said in refused} == {(403, b"")}
    assert "server" not in refused[0].headers
    assert len(token) == 32


def test_every_answer_forbids_what_the_page_does_not_need(address):
    for path in ("", "state", "live.js", "style.css", "live.css"):
        said = ask(address + path, host="localhost")
        assert said.status_code == 200, path
        policy = said.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert said.headers["cache-control"] == "no-store"
        assert said.headers["referrer-policy"] == "no-referrer"
        assert said.headers["x-content-type-options"] == "nosniff"
    page = ask(address).text
    assert "http://" not in page
    assert "https://" not in page


def test_a_port_that_is_taken_and_a_folder_of_nothing_are_errors(address, run, tmp_path):
    port = int(address.split(":")[2].split("/")[0])
    with (
        pytest.raises(ConfigError, match="is not available"),
        page_in_background(run[0], port, print),
    ):
        pass
    with pytest.raises(ConfigError, match="is the folder of no run, consortium or client"):
        look_of(tmp_path)


PRIVATE = ["privacy.unit=client", "privacy.delta=1e-3", "privacy.clip_norm=0.5"]
PRIVATE += ["privacy.noise_multiplier=2", "privacy.noise=seeded", "algorithm.weights=uniform"]


class Looking(Progress):
    """What another process would see before the first release, and in the second round."""

    def __init__(self, path):
        self.path, self.first, self.seen = path, None, None

    def begin_round(self, round_, cohort) -> None:
        if round_ == 1:
            self.first = look_of(self.path)()

    def client_done(self, update: Update) -> None:
        if update.round == 2 and self.seen is None:
            deadline = time.monotonic() + 20
            while not (found := read_live(self.path)) or found["round"] != 2:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            self.seen = look_of(self.path)()


def test_a_real_run_is_seen_while_it_goes_on_and_leaves_no_trace_of_it(tmp_path, tiny_model):
    looking = Looking(tmp_path / "run")
    recipe = write_tiny_recipe(tmp_path, tiny_model)
    silotune.run(recipe, ["rounds=2", *PRIVATE], out=looking.path, progress=looking)
    assert looking.first.state == looking.seen.state == "running"
    spent = {part.title: part.lines for part in looking.seen.parts}["Privacy spent"]
    assert "after 1 release; guaranteed for 2" in spent[0]
    assert looking.seen.bar == (1, 2)
    assert not (looking.path / "live.json").exists()
    now = look_of(looking.path)()
    assert (now.state, now.bar) == ("done", (2, 2))
    assert "report.html" in now.headline
    assert (looking.path / "recipe.toml").read_text().startswith("# recipe: tiny, 20")
    made = json.loads((looking.path / "provenance.json").read_text())
    assert made["recipe"] == "tiny"
    assert date.fromisoformat(made["date"]) <= date.today()


# --- in a browser ---------------------------------------------------------------------------------

PHONE, DESK = 390, 1200


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine")
    with playwright.sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def test_the_page_updates_itself_asks_only_itself_and_shows_names_as_text(browser, address, run):
    _, live = run
    view, asked, complaints = browser.new_page(), [], []
    view.on("request", lambda own: asked.append(own.url))
    view.on("console", lambda said: complaints.append(said.text))
    view.on("pageerror", lambda error: complaints.append(str(error)))
    view.on("dialog", lambda dialog: complaints.append(dialog.message))
    view.goto(address)
    view.wait_for_selector("table td")
    for width, scheme in ((PHONE, "dark"), (DESK, "light")):
        view.set_viewport_size({"width": width, "height": 800})
        view.emulate_media(color_scheme=scheme)
        assert view.evaluate("document.documentElement.scrollWidth") <= width
        if place := os.environ.get("SCREENSHOTS"):
            view.screenshot(path=f"{place}/watch-{scheme}-{width}.png", full_page=True)
    text = view.inner_text("body")
    for name in NAMES:
        assert " ".join(name.split()) in " ".join(text.split())
    assert view.evaluate("document.querySelectorAll('figure svg path').length") == 9
    assert view.evaluate("document.images.length") == 0
    live.client_steps(NAMES[0], 33, 50, 4321)
    view.get_by_text("step 33/50").wait_for(timeout=20_000)  # no eval: the policy forbids it
    assert all(url.startswith(address) for url in asked)
    assert complaints == []
    view.close()
