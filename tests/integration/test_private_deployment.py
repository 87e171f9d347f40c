"""Real clients that protect rows: what the server gets, each client's own ledger and limit."""

import io
import json
import re
from html import unescape
from pathlib import Path

import pytest
import tomli_w
from rich.console import Console

import silotune
from silotune.federation.client_privacy import released
from silotune.federation.ledger import lines
from silotune.federation.progress_lines import PlainProgress
from silotune.privacy.accountant import Epsilon, Steps, spent_in_all
from tests.conftest import hospital_rows, write_jsonl, write_tiny_recipe

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.engine,
    pytest.mark.slow,  # runtime/test_real_client.py asks a client the same without an engine
]

DELTA, NOISE = 1e-2, 1.0
CLIENTS = ("hospital-0", "hospital-1", "hospital-2")
NUM_ROWS = (6, 6, 8)
PRIVATE = [
    *("runtime.name=flower", "partition.by=none", "evaluate.every=0", "report.page=true"),
    *("privacy.unit=record", f"privacy.delta={DELTA}", f"privacy.noise_multiplier={NOISE}"),
    *("privacy.clip_norm=0.5", "train.max_length=36"),  # which cuts every client's rows
]
TOLD = {
    *("event", "round", "client", "status", "num_examples", "bytes_down", "bytes_up"),
    *("lr", "num_steps", "delta_norm"),
    *("noise_multiplier", "sampling_rate", "num_lots"),
}


def spent_by(ledger) -> Epsilon:
    return spent_in_all(released(ledger), delta=DELTA)


def of_rounds(count: int, num_rows: int) -> float:
    """Epsilon of so many rounds of the recipe: two lots of two rows in each."""
    return spent_in_all([Steps(NOISE, 2 * count, 2 / num_rows)], delta=DELTA).pld


def write_clients(folder: Path, model: Path) -> Path:
    """Hospital 1 allows what two rounds cost, and nothing more."""
    for n, name in enumerate(CLIENTS):
        own = folder / f"files-{n}"
        own.mkdir(parents=True)
        rows = [row for row in hospital_rows() if row["source"] == name]
        write_jsonl(own / "mine.jsonl", rows[: NUM_ROWS[n]])
        write_jsonl(own / "held.jsonl", rows[NUM_ROWS[n] :])
        limits = {"epsilon": 1.001 * of_rounds(2, NUM_ROWS[n]), "delta": DELTA} if n == 1 else {}
        table = {
            "name": name,
            "state": f"state-{n}",
            "model": str(model),
            "data": {"path": f"files-{n}/mine.jsonl", "eval_path": f"files-{n}/held.jsonl"},
            "limits": limits,
            "runtime": {"device": "cpu", "threads": 1},
        }
        (folder / f"{n}.toml").write_text(tomli_w.dumps(table))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("private")


@pytest.fixture(scope="module")
def runs(place, tiny_model):
    """Two runs on the same clients, and what a person sees of them."""
    clients, told = write_clients(place / "clients", tiny_model), io.StringIO()
    recipe = write_tiny_recipe(place, tiny_model)
    progress = PlainProgress(Console(file=told, width=1000))
    keys = [*PRIVATE, f"data.path={clients}"]
    one = silotune.run(recipe, [*keys, "rounds=2"], out=place / "one", progress=progress)
    # two are enough to see one go on alone, and every client is some processes more
    (clients / "2.toml").unlink()
    two = silotune.run(recipe, [*keys, "rounds=1"], out=place / "two", progress=progress)
    return one, two, told.getvalue()


def ledger_of(place: Path, n: int, run) -> list[dict]:
    run_id = (run.path / "run-id").read_text()
    found = lines(place / "clients" / f"state-{n}" / "privacy.jsonl")
    return [line for line in found if line["run"] == run_id]


def test_the_server_of_real_clients_gets_no_number_without_noise(runs, place):
    one, _, told = runs
    rows = one.metrics
    assert {row["event"] for row in rows} == {"train", "round"}
    trained = [row for row in rows if row["event"] == "train"]
    assert [row["status"] for row in trained] == ["ok"] * 6
    assert all(set(row) == TOLD for row in trained)
    for row in trained:  # noise of 2 steps of Adam, and not what the rows say
        assert row["num_steps"] == 2
    summary = one.summary
    assert summary["tokens_trained"] is summary["peak_memory_bytes"] is None
    assert "truncated to train.max_length" not in told
    assert not {"split.json", "samples.json", "engine.log"} & {p.name for p in one.path.iterdir()}
    assert not list(one.path.rglob("privacy.jsonl")), "the ledgers are the clients' own"
    secret = hospital_rows()[0]["question"].encode()
    assert not any(secret in p.read_bytes() for p in one.path.rglob("*") if p.is_file())


def test_what_the_server_received_adds_up_to_the_clients_own_ledgers(runs, place):
    one, _, _ = runs
    found = one.privacy
    assert found["promise"]["noise"] == "secure"
    for n, name in enumerate(CLIENTS):
        own = ledger_of(place, n, one)
        assert [(line["client"], line["round"]) for line in own] == [(name, 1), (name, 2)]
        received = [row for row in found["releases"] if row["client"] == name]
        cost = spent_by(own)
        assert spent_by(received) == cost
        assert cost.pld == of_rounds(2, NUM_ROWS[n])
        stated = {"num_released": 2, "epsilon": {"pld": cost.pld, "rdp": cost.rdp}}
        assert found["clients"][name] == stated
    worst = max(of_rounds(2, NUM_ROWS[n]) for n in range(3))
    assert found["epsilon"]["pld"] == worst == found["promise"]["epsilon"]["pld"]


def test_a_client_whose_own_limit_is_reached_declines_and_the_others_go_on(runs, place):
    one, two, told = runs
    status = {row["client"]: row["status"] for row in two.metrics if row["event"] == "train"}
    assert status == {"hospital-0": "ok", "hospital-1": "privacy budget spent"}
    why = "privacy budget spent: client 'hospital-1', round 1: its own privacy limit"
    assert f"hospital-1: {why}" in told
    assert [len(ledger_of(place, n, two)) for n in range(2)] == [1, 0]
    assert [len(ledger_of(place, n, one)) for n in range(3)] == [2, 2, 2]
    released_by = {name: own["num_released"] for name, own in two.privacy["clients"].items()}
    assert released_by == {"hospital-0": 1, "hospital-1": 0}
    assert two.summary["rounds"] == 1


def words_of(page: str) -> str:
    without = re.sub(r"<style.*?</style>", "", page, flags=re.DOTALL)
    return unescape(re.sub(r"<[^>]+>", " ", without))


def test_nothing_that_was_kept_back_is_shown_as_a_zero(runs, place):
    one, _, told = runs
    rows_sha256 = json.loads((one.path / "provenance.json").read_text())["data"]["sha256"]
    card, page = (one.path / "README.md").read_text(), (one.path / "report.html").read_text()
    for text in (card, words_of(page), (one.export() / "README.md").read_text()):
        assert "DP per record" in text
        assert rows_sha256 not in text, "who knows all rows but one could try that one out"
        for zero in ("0.000", "0 tokens", "memory 0", " nan", "None"):
            assert zero not in text
    for text in (card, words_of(page)):
        assert "Held-out loss was not measured" in text
        assert not re.search(r"(?i)training loss|held-out loss \(|the last line is weighted", text)
    assert "each with noise added by its client" in card
    assert 'aria-label="training loss' not in page.lower()
    assert "loss" not in told
    assert "round 2/2 done" in told
