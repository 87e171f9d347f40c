"""Real clients whose preferences are measured against the adapter that the run started from."""

import pytest
import tomli_w

import silotune
from silotune.core.processors import usable_threads
from silotune.core.tree import sha256
from silotune.core.types import Broadcast, Failure, Update
from silotune.federation.client import take_part
from silotune.federation.client_data import Worker
from silotune.federation.first_adapter import FILE
from silotune.federation.prepared_rows import prepare_client
from silotune.federation.recipe_model import load_for
from silotune.models.start import read_start
from silotune.recipes.parse import load_recipe
from silotune.runtime import wire
from silotune.runtime.flower.strategy import algorithm_of
from silotune.runtime.flower.submit import travelling
from silotune.runtime.payload import Parcel, pack, unpack
from silotune.runtime.real_client import Deployed
from silotune.training.tasks import build_task
from tests.conftest import write_jsonl, write_tiny_recipe
from tests.integration.test_prefer_run import pairs

LATE = 5
ONE_AT_A_TIME = ["sampling.num_clients=1", "evaluate.every=0", "seed=3"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model):
    """Pairs of two clients, and a start that another run has left."""
    place = tmp_path_factory.mktemp("prefer")
    path = write_tiny_recipe(place, tiny_model)
    plain = path.read_text().replace("dropout = 0.1", "dropout = 0")
    path.write_text(plain)
    before = silotune.run(path, ["rounds=2", "train.lr=0.05"], out=place / "before")
    write_jsonl(place / "pairs.jsonl", pairs(num_clients=2))
    own = plain.replace("hospitals.jsonl", "pairs.jsonl")
    own = own.replace("[adapter]", f"[adapter]\nstart = '{before.path}'")
    path.write_text(f'task = "prefer"\n{own}')
    return path


@pytest.mark.engine
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("engine", "keys"),
    [("flower-simulation", []), ("flower", []), ("flower", ONE_AT_A_TIME)],
    ids=["simulation", "real clients", "one at a time"],
)
def test_engines_give_the_same_adapter_and_scores_and_send_as_much(recipe, tmp_path, engine, keys):
    """With one client a round and no scores, the other one receives the start in a later round."""
    keys = ["rounds=3", *keys]
    here = silotune.run(recipe, keys, out=tmp_path / "here")
    cpus = [f"runtime.client_cpus={usable_threads()}"] * engine.endswith("simulation")
    there = silotune.run(recipe, [*keys, f"runtime.name={engine}", *cpus], out=tmp_path / "there")
    for key in ("adapter_sha256", "scores", "bytes_down", "bytes_up"):
        assert there.summary.get(key) == here.summary.get(key), key


@pytest.mark.engine
@pytest.mark.slow  # runtime/flower/test_secure_sums.py has real clients with masks in every run
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "keys",
    [
        ["secure_sum.kind=masks", "secure_sum.range=0.25", "secure_sum.min_cohort=3"],
        ["privacy.unit=record", "privacy.noise_multiplier=1e-9", "privacy.delta=1e-2"],
    ],
    ids=["masks", "record-level privacy"],
)
def test_protected_updates_of_real_clients_begin_at_the_start(recipe, tmp_path, keys):
    four = write_jsonl(tmp_path / "four.jsonl", pairs(num_clients=4))
    keys = [*keys, "rounds=1", "evaluate.every=0", f"data.path={four}"]
    there = silotune.run(recipe, [*keys, "runtime.name=flower"], out=tmp_path / "there")
    assert sum(row["event"] == "train" for row in there.metrics) == 4
    if keys[0].startswith("secure_sum"):
        here = silotune.run(recipe, [*keys, "secure_sum.simulate=true"], out=tmp_path / "here")
        assert there.summary["adapter_sha256"] == here.summary["adapter_sha256"]
    start = read_start(load_recipe(recipe).adapter.start)
    after = there.adapter()
    assert after.keys() == start.keys()
    for name, before in start.items():
        assert 0 < (after[name] - before).abs().max() < 0.1, f"{name} began elsewhere"


def test_a_plan_counts_the_start_for_the_client_that_comes_later(recipe, tmp_path):
    keys = ["rounds=3", *ONE_AT_A_TIME]
    done = silotune.run(recipe, keys, out=tmp_path / "run")
    planned = silotune.plan(recipe, keys, measured=False).traffic
    sent = [done.summary[key] for key in ("bytes_down", "bytes_up")]
    assert [planned.bytes_down, planned.bytes_up] == sent
    assert len({row["client"] for row in done.metrics if row["event"] == "train"}) == 2
    again = silotune.run(recipe, [*keys, "adapter.start=none"], out=tmp_path / "plain")
    more = 2 * planned.down  # the first adapter to one client, and later the start to the other
    assert sent[0] == again.summary["bytes_down"] + more


# --- one client at a time ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(recipe):
    """The recipe as real clients are told it."""
    return travelling(load_recipe(recipe, ["runtime.name=flower"]))


@pytest.fixture(scope="module")
def worker(recipe):
    """What answers in process: the oracle."""
    run = load_recipe(recipe)
    task = build_task(run.task, cfg=run.prefer)
    return Worker(load_for(run), task, run, algorithm_of(run.algorithm))


@pytest.fixture
def client(tmp_path, tiny_model):
    """A real client's configuration, and its resident worker each time it is called."""
    rows = [row for row in pairs(num_clients=2) if row["source"] == "hospital-0"]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    table = {
        "name": "north",
        "model": str(tiny_model),
        "data": {"path": "rows.jsonl"},
        "runtime": {"device": "cpu", "threads": 1},
    }
    (tmp_path / "client.toml").write_text(tomli_w.dumps(table), encoding="utf-8")
    return lambda: Deployed(tmp_path / "client.toml")


def ask(client, run, kind, broadcast=None):
    parcel = wire.encode_broadcast(broadcast) if broadcast else Parcel({})
    about = {"kind": kind, "recipe": run.model_dump_json(serialize_as_any=True), "run": "a1"}
    asked = Parcel({**about, "parcel": parcel.about}, parcel.values)
    answer = client.answer(unpack(pack(asked)))
    if kind == "query":
        return answer.about["report"]
    return wire.decode_answer(answer, "north", bytes_down=parcel.values.nbytes)


def moved(adapter):
    return {name: tensor + 0.01 for name, tensor in adapter.items()}


def test_a_client_that_joins_late_measures_against_the_start_that_comes_along(
    client, told, worker, tmp_path
):
    start = worker.loaded.start
    assert start is not None
    late = Broadcast(LATE, moved(start))
    report = ask(client(), told, "query")
    assert (report["num_train"] > 0, report["num_eval"] > 0) == (True, True)
    missing = ask(client(), told, "train", late)
    assert isinstance(missing, Failure)
    assert "measured against it" in missing.place
    assert "the server sends it with the next message" in missing.place
    north = client()
    ask(north, told, "query")
    got = ask(north, told, "train", Broadcast(LATE, moved(start), start=start))
    assert isinstance(got, Update)
    # the same rows, split as this client splits them, in the plain loop
    rows = north._station.place.rows("north")
    want = take_part(worker, prepare_client(rows, worker), late, tmp_path / "plain")
    assert sha256(got.delta) == sha256(want.delta)
    assert got.score == want.score
    assert got.num_examples == report["num_train"]


def test_a_client_keeps_the_start_over_a_restart_and_checks_it(client, told, worker, tmp_path):
    start = worker.loaded.start
    first = ask(client(), told, "train", Broadcast(1, start))
    assert isinstance(first, Update)
    assert first.score.margin_sum == 0, "the start is the reference"
    again = ask(client(), told, "train", Broadcast(2, moved(start)))
    assert isinstance(again, Update)
    (kept,) = tmp_path.glob(f"state/runs/a1/*/{FILE}")
    kept.write_bytes(kept.read_bytes()[:-4])
    gone = ask(client(), told, "evaluate", Broadcast(3, moved(start)))
    assert isinstance(gone, Failure)
    assert "is not here" in gone.place
    back = ask(client(), told, "evaluate", Broadcast(3, moved(start), start=start))
    assert not isinstance(back, Failure)


def test_a_wrong_start_is_refused_whenever_it_comes(client, told, worker):
    start = worker.loaded.start
    for sent, what in (
        (Broadcast(1, moved(start)), "the first adapter"),
        (Broadcast(LATE, moved(start), start=moved(start)), "the adapter to start from"),
    ):
        for kind in ("train", "evaluate"):
            refused = ask(client(), told, kind, sent)
            assert isinstance(refused, Failure)
            assert refused.code == "declined"
            assert f"{what} has the SHA-256" in refused.place


def test_the_reference_is_the_start_and_not_the_base(client, told, worker):
    """With the base as the reference, the first scores would have margins."""
    start = worker.loaded.start
    assert any(bool((tensor != 0).any()) for n, tensor in start.items() if "lora_B" in n)
    got = ask(client(), told, "evaluate", Broadcast(1, start))
    assert (got.margin_sum, got.num_preferred) == (0, 0)
    after = ask(client(), told, "evaluate", Broadcast(2, moved(start)))
    assert after.margin_sum != 0
