"""The server's test set: scored like clients' rows, told to nobody, chooses only if asked."""

import pytest

import silotune
from silotune.core.errors import ConfigError, DataError, RunFolderError
from silotune.federation.budget import read_spent
from silotune.federation.client_config import ClientConfig
from silotune.federation.client_recipe import own_recipe
from silotune.federation.metrics import held_out_losses, server_losses
from silotune.federation.progress import Progress
from silotune.federation.run_folder import RunFolder
from silotune.federation.server_scores import ServerTest
from silotune.recipes.parse import parse
from silotune.runtime.flower.submit import travelling
from tests.conftest import changed, hospital_rows, small_table, write_jsonl

TOLD = ("event", "round", "status", "part", "client", "bytes_down")


class Heard(Progress):
    def __init__(self, dies_after=0):
        self.notes, self.rounds, self.dies_after = [], {}, dies_after

    def note(self, text):
        self.notes.append(text)

    def end_round(self, round_, rows):
        self.rounds[round_] = rows
        if round_ == self.dies_after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model):
    """Rows of two clients, and at the server exactly those that the first client holds out."""
    here = tmp_path_factory.mktemp("server")
    write_jsonl(here / "rows.jsonl", hospital_rows(2))
    plain = parse(small_table(tiny_model, here / "rows.jsonl"))
    held = silotune.check(plain).rows["hospital-0"].evaluation
    write_jsonl(here / "own.jsonl", [{"messages": list(talk)} for talk in held])

    def make(**changes):
        table = small_table(tiny_model, here / "rows.jsonl")
        table["evaluate"] = {"server_path": str(here / "own.jsonl")}
        return parse(changed(table, changes))

    return make


@pytest.fixture(scope="module")
def done(place, tmp_path_factory):
    heard = Heard()
    out = tmp_path_factory.mktemp("done") / "run"
    return silotune.run(place(report__page=True), out=out, progress=heard), heard


def rows_of(run, event):
    return {row["round"]: row for row in run.metrics if row["event"] == event}


def test_the_same_rows_get_the_same_scores_as_at_a_client(done):
    run, heard = done
    at_client = {
        row["round"]: {k: v for k, v in row.items() if k not in TOLD}
        for row in run.metrics
        if row["event"] == "evaluate" and row["client"] == "hospital-0"
    }
    at_server = {
        round_: {k: v for k, v in row.items() if k not in TOLD}
        for round_, row in rows_of(run, "server-test").items()
    }
    assert at_server == at_client
    assert sorted(at_server) == [0, 1, 2, 3]
    assert server_losses(heard.rounds[2]) == {2: at_server[2]["loss"]}
    assert any("server's test set: loss" in text for text in heard.notes), "the base's"


def test_it_changes_nothing_else(done, place, tmp_path):
    plain = silotune.run(place(evaluate__server_path=None), out=tmp_path / "run")
    assert plain.summary["adapter_sha256"] == done[0].summary["adapter_sha256"]
    assert plain.summary["overall"] == done[0].summary["overall"]
    assert "server_test" not in plain.summary


def test_summary_card_and_page_call_it_by_its_name(done):
    run, _ = done
    found = run.summary["server_test"]
    assert found["name"] == "server's test set"
    assert found["federated"]["loss"] == rows_of(run, "server-test")[3]["loss"]
    line = f"loss {found['base']['loss']:.3f} for the base, {found['federated']['loss']:.3f}"
    card = (run.path / "README.md").read_text("utf-8")
    page = (run.path / "report.html").read_text("utf-8")
    for text in (card, page):
        assert line in text
        assert "oss on the server" in text
    exported = run.export(to=run.path / "export" / "peft")
    assert line in (exported / "README.md").read_text("utf-8")


def test_a_run_that_was_killed_scores_nothing_twice(done, place, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        silotune.run(place(), out=tmp_path / "run", progress=Heard(dies_after=2))
    resumed = silotune.run(resume=tmp_path / "run")
    for event in ("server-test", "evaluate"):
        found, whole = (
            [r for r in run.metrics if r["event"] == event] for run in (resumed, done[0])
        )
        assert found == whole


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_kill_while_the_server_scores_costs_nothing(place, tmp_path, monkeypatch, call):
    """The base, a round's adapter, and the last one, which evaluate.every does not select."""
    real, calls = ServerTest.score, []

    def dies(self, state):
        calls.append(state.round)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(self, state)

    run = place(evaluate__every=2)
    with monkeypatch.context() as patched:
        patched.setattr(ServerTest, "score", dies)
        with pytest.raises(KeyboardInterrupt):
            silotune.run(run, out=tmp_path / "run")
    resumed = silotune.run(resume=tmp_path / "run")
    events = [(r["event"], r["round"]) for r in resumed.metrics if "loss" in r]
    assert [r for event, r in events if event == "server-test"] == [0, 2, 3]
    assert sorted(r for event, r in events if event == "evaluate") == [0, 0, 2, 2, 3, 3]


def test_a_test_set_that_changed_is_refused_on_resume(place, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    own = write_jsonl(tmp_path / "own.jsonl", rows)
    run = place(evaluate__server_path=str(own))
    with pytest.raises(KeyboardInterrupt):
        silotune.run(run, out=tmp_path / "run", progress=Heard(dies_after=1))
    write_jsonl(own, [*rows, *rows])
    with pytest.raises(RunFolderError, match="the server's test set has changed"):
        silotune.run(resume=tmp_path / "run")


def test_every_round_or_those_that_the_recipe_selects_and_the_last(place, tmp_path):
    few = silotune.run(place(evaluate__every=2), out=tmp_path / "few")
    assert sorted(rows_of(few, "server-test")) == [0, 2, 3]
    assert few.summary["server_test"]["federated"]["loss"] > 0
    only = silotune.run(place(evaluate__every=0, rounds=2), out=tmp_path / "only")
    assert sorted(rows_of(only, "server-test")) == [0, 1, 2]
    assert rows_of(only, "evaluate") == {}


def test_it_chooses_the_round_and_the_end_only_if_the_recipe_says_so(place, tmp_path, monkeypatch):
    real, losses = ServerTest.score, {0: 9.0, 1: 5.0, 2: 7.0, 3: 8.0, 4: 1.0}

    def score(self, state):
        return {**real(self, state), "loss": losses[state.round]}

    monkeypatch.setattr(ServerTest, "score", score)
    # the rows must not be held-out rows then: other rows at the server
    rows = [{"question": f"Who is {i}?", "answer": f"Me {i}."} for i in range(3)]
    keys = {
        "rounds": 6,
        "evaluate__server_path": str(write_jsonl(tmp_path / "own.jsonl", rows)),
        "checkpoint__keep": "best",
    }
    said = Heard()
    asked = place(**keys, evaluate__choose_by="server", stop__patience=2, report__page=True)
    run = silotune.run(asked, out=tmp_path / "asked", progress=said)
    assert run.summary["rounds"] == 3, "the server knows its scores at once"
    assert run.summary["result_round"] == 1
    spent = read_spent(RunFolder.open(run.path))
    assert spent is not None
    assert spent["ended_by"] == "stop.patience"
    assert any(text.startswith("stop.patience ends the run after round 3") for text in said.notes)
    assert run.summary["server_test"]["name"] == "server's validation set"
    for name in ("README.md", "report.html"):
        text = (run.path / name).read_text("utf-8")
        assert "chose the round" in text
        assert "stop.patience ended the run after round 3 of 6: 2 scored rounds in a row" in text
    not_asked = silotune.run(place(**{**keys, "rounds": 2}), out=tmp_path / "not")
    held_out = {r: loss for r, loss in held_out_losses(not_asked.metrics).items() if r}
    assert not_asked.summary["result_round"] == min(held_out, key=held_out.__getitem__)


def test_a_private_run_may_show_it_because_no_client_has_its_rows(place, tmp_path):
    keys = {"unit": "client", "noise_multiplier": 1.0, "delta": 0.1, "noise": "seeded"}
    run = silotune.run(
        place(rounds=1, privacy=keys, algorithm={"name": "fedavg", "weights": "uniform"}),
        out=tmp_path / "run",
    )
    card = (run.path / "README.md").read_text("utf-8")
    assert "Held-out losses have no noise" in card
    assert "Server's test set (" in card


# --- who is told --------------------------------------------------------------------------------


def test_no_client_is_told_about_it(place, tmp_path, tiny_model):
    clients = tmp_path / "clients"
    clients.mkdir()
    write_jsonl(clients / "mine.jsonl", hospital_rows(1))
    own = {"name": "north", "model": str(tiny_model), "data": {"path": "mine.jsonl"}}
    (clients / "north.toml").write_text(
        f'name = "north"\nmodel = "{tiny_model}"\n[data]\npath = "mine.jsonl"\n'
    )
    asks = {"evaluate__choose_by": "server", "checkpoint__keep": "best", "stop__patience": 3}
    for data, name in (
        (str(clients), "flower"),
        (None, "flower"),
        (None, "flower-simulation"),
    ):
        run = place(**asks, runtime__name=name, **({"data__path": data} if data else {}))
        sent = travelling(run)
        assert "own.jsonl" not in sent.model_dump_json(serialize_as_any=True)
        assert sent.evaluate.choose_by == "clients"
        assert sent.evaluate.every == run.evaluate.every
    here = own_recipe(place(**asks), ClientConfig.model_validate(own))
    assert here.evaluate.server_path is None
    assert here.stop.patience is None


# --- mistakes ------------------------------------------------------------------------------------


def test_rows_that_are_trained_on_are_refused(place, tmp_path):
    own = write_jsonl(tmp_path / "own.jsonl", hospital_rows(2))
    with pytest.raises(DataError, match=r"of 17 are also among the train rows") as error:
        silotune.check(place(evaluate__server_path=str(own)))
    assert "What is" not in str(error.value), "no text of a row"
    asks = {"evaluate__choose_by": "server", "checkpoint__keep": "best"}
    with pytest.raises(DataError, match="also among the held-out rows: these must not choose"):
        silotune.check(place(**asks))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"evaluate__server_path": None, "evaluate__choose_by": "server"}, "needs evaluate.serv"),
        ({"evaluate__choose_by": "server"}, "only has an effect with checkpoint.keep = 'best'"),
        ({"evaluate__server_path": "mine", "data__path": "mine"}, "names rows that others have"),
        (
            {"evaluate__server_path": "a", "server": {"data_path": "a", "work": "fine-tune"}},
            "names rows that others have",
        ),
    ],
)
def test_contradictions_are_told(place, changes, says):
    with pytest.raises(ConfigError, match="evaluate") as error:
        place(**changes)
    assert says in " ".join(str(error.value).split())


def test_a_missing_file_and_an_unknown_label_are_told_before_a_model_is_loaded(place, tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        silotune.check(place(evaluate__server_path="nowhere.jsonl"))
    rows = [{"text": f"{'good' if i % 2 else 'bad'} {i}", "label": i % 2} for i in range(40)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    own = write_jsonl(tmp_path / "own.jsonl", [{"text": "so so", "label": 2}])
    table = {
        "rounds": 1,
        "task": "classify",
        "data": {"path": str(data)},
        "partition": {"kind": "iid", "num_clients": 2},
        "evaluate": {"server_path": str(own)},
    }
    with pytest.raises(DataError, match="column 'label' has the unknown label '2'"):
        silotune.check(parse(table))
