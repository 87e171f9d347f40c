"""The server's half with stand-in clients that are plain functions: order, refusals, quorum."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from silotune.algorithms import ALGORITHMS
from silotune.core.algorithm import starting_state
from silotune.core.errors import QuorumError, RunFolderError
from silotune.core.tree import sha256
from silotune.core.types import AdapterState, Broadcast, Failure, Score, Update
from silotune.federation.progress import Progress
from silotune.federation.rounds import run_rounds
from silotune.federation.run_folder import RunFolder
from silotune.recipes.parse import parse
from tests.conftest import changed

NAMES = ("east", "north", "south", "west")
START = {"lora_A": torch.zeros(2, 3), "lora_B": torch.ones(3, 2)}


def recipe(**changes):
    table = {"rounds": 3, "data": {"path": "medquad_mini"}, "partition": {"by": "source"}}
    return parse(changed(table, changes))


def delta_of(client: str, round_: int, received: AdapterState = START) -> dict:
    gen = torch.Generator().manual_seed(NAMES.index(client) * 100 + round_)
    names = [*START, *sorted(received.keys() - START.keys())]
    return {n: torch.randn(received[n].shape, generator=gen) for n in names}


class StandInClients:
    """Answers without training: the delta is a function of client and round."""

    def __init__(self, order=None, spoil=None):
        self.order = order or (lambda names: list(names))
        self.spoil = spoil or {}
        self.asked = []

    def names(self):
        return list(NAMES)

    def num_rows(self):
        return {name: {"num_train": 4, "num_eval": 1} for name in self.names()}

    def train(self, messages: Mapping[str, Broadcast]):
        for round_ in {broadcast.round for broadcast in messages.values()}:
            self.asked.append((round_, tuple(messages)))
        for name in self.order(list(messages)):
            broadcast = messages[name]
            update = Update(
                client=name,
                round=broadcast.round,
                delta=delta_of(name, broadcast.round, broadcast.adapter),
                num_examples=NAMES.index(name) + 1,
                metrics={"train_loss": 1.0, "num_tokens": 5, "seconds_training": 0.1, "seconds": 1},
                score=Score(name, 2.0, 2, 1, 1) if broadcast.score else None,
                bytes_down=48,
                bytes_up=48,
            )
            yield self.spoil.get(name, lambda u: u)(update)

    def evaluate(self, messages: Mapping[str, Broadcast]):
        for name in messages:
            yield Score(name, 3.0, 2, 1, 1, size_bytes=48)


class Heard(Progress):
    def __init__(self):
        self.failures = []

    def client_failed(self, failure):
        self.failures.append(failure)


def built_for_four(algorithm):
    """An algorithm that four clients are enough for."""
    cfg, build = ALGORITHMS[algorithm]
    return build(cfg(**({"attackers": 0} if "attackers" in cfg.model_fields else {})))


def answers(algorithm):
    """What makes a stand-in's update one of this algorithm."""
    built = built_for_four(algorithm)
    rule = built.local

    def answer(update):
        sent = {
            n: t
            for n, t in update.delta.items()
            if rule.trains(n, update.round) and not rule.personal(n)
        }
        more = {"control": sent} if built.extra_layout else {}
        return replace(update, settings=dict(rule.settings), delta=sent, extra=more)

    return dict.fromkeys(NAMES, answer)


def go(tmp_path, run, clients, *, algorithm="fedavg", progress=None, folder=None):
    built = built_for_four(algorithm)
    folder = folder or RunFolder.create(tmp_path / "run", run)
    state = folder.load_state() or starting_state(built, START, len(NAMES))
    return run_rounds(
        run,
        state,
        algorithm=built,
        clients=clients,
        folder=folder,
        progress=progress or Progress(),
    ), folder


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_arrival_order_cannot_change_a_bit_of_the_result(tmp_path, algorithm):
    echo = answers(algorithm)
    results = set()
    for i, order in enumerate(itertools.islice(itertools.permutations(range(4)), 0, 24, 5)):
        clients = StandInClients(lambda names, o=order: [names[j] for j in o], echo)
        state, _ = go(tmp_path / str(i), recipe(), clients, algorithm=algorithm)
        results.add(sha256(state.adapter))
    assert len(results) == 1


def test_the_mean_is_weighted_by_examples(tmp_path):
    state, _ = go(tmp_path, recipe(rounds=1), StandInClients())
    expected = START["lora_A"].double()
    for name, weight in zip(NAMES, (1, 2, 3, 4), strict=True):
        expected = expected + weight / 10 * delta_of(name, 1)["lora_A"].double()
    torch.testing.assert_close(state.adapter["lora_A"].double(), expected)


SPOILT = {
    "NaN": (
        lambda u: replace(u, delta={**u.delta, "lora_B": u.delta["lora_B"] * float("nan")}),
        "client 'south', round 1: 'lora_B' contains NaN or infinity",
    ),
    "wrong rank": (
        lambda u: replace(u, delta={**u.delta, "lora_A": torch.zeros(4, 3)}),
        "client 'south', round 1: 'lora_A' has shape (4, 3), the server expects (2, 3)",
    ),
    "half precision": (
        lambda u: replace(u, delta={n: t.half() for n, t in u.delta.items()}),
        "'lora_A' has dtype torch.float16, the server expects torch.float32",
    ),
    "missing tensor": (
        lambda u: replace(u, delta={"lora_A": u.delta["lora_A"]}),
        "client 'south', round 1: tensor 'lora_B' is missing",
    ),
    "unknown tensor": (
        lambda u: replace(u, delta={**u.delta, "lora_C": torch.zeros(1)}),
        "tensor 'lora_C' is unknown to the server",
    ),
    "no examples": (
        lambda u: replace(u, num_examples=0),
        "no examples, so its update has no weight",
    ),
    "another mu": (
        lambda u: replace(u, settings={"mu": 9.0}),
        "trained with {'mu': 9.0}, the server's algorithm has none",
    ),
    "another round": (
        lambda u: replace(u, round=7),
        "answers round 7, the server is in round 1",
    ),
    "a failure": (lambda u: Failure(u.client, u.round, "out of memory", "step 3"), "step 3"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_spoilt_update_is_refused_by_name_and_the_round_goes_on(tmp_path, kind):
    spoil, text = SPOILT[kind]
    heard = Heard()
    clients = StandInClients(spoil={"south": spoil})
    state, folder = go(tmp_path, recipe(rounds=1), clients, progress=heard)
    (failure,) = heard.failures
    assert failure.client == "south"
    assert text in failure.place
    rows = [r for r in folder.metrics() if r["event"] == "train" and r["client"] == "south"]
    assert rows[0]["status"] != "ok"
    assert text in rows[0]["place"]
    others = [n for n in NAMES if n != "south"]
    weights = torch.tensor([NAMES.index(n) + 1.0 for n in others]).double()
    mean = sum(
        w * delta_of(n, 1)["lora_B"].double() for w, n in zip(weights, others, strict=True)
    ) / float(weights.sum())
    torch.testing.assert_close(state.adapter["lora_B"].double(), START["lora_B"].double() + mean)


def test_an_update_under_a_name_that_was_not_asked_is_refused(tmp_path):
    heard = Heard()
    clients = StandInClients(spoil={"south": lambda u: replace(u, client="mallory")})
    go(tmp_path, recipe(rounds=1), clients, progress=heard)
    assert "was not asked in this round" in heard.failures[0].place


def test_a_second_update_of_one_client_is_refused(tmp_path):
    heard = Heard()
    clients = StandInClients(spoil={"south": lambda u: replace(u, client="north")})
    go(tmp_path, recipe(rounds=1), clients, progress=heard)
    assert "has answered already" in heard.failures[0].place


def fail(update):
    return Failure(update.client, update.round, "out of memory", "step 3")


def test_a_broken_quorum_stops_the_run_and_names_who_is_missing(tmp_path):
    clients = StandInClients(spoil={"north": fail, "south": fail, "west": fail})
    with pytest.raises(QuorumError) as caught:
        go(tmp_path, recipe(), clients)
    text = str(caught.value)
    assert "round 1: 1 usable updates of 4, and sampling.quorum = 0.5 needs 2" in text
    assert all(f"{name}: out of memory: step 3" in text for name in ("north", "south", "west"))
    assert "resume" in text


def test_when_all_clients_fail_no_checkpoint_exists(tmp_path):
    run = recipe(sampling__quorum=0.01)
    with pytest.raises(QuorumError, match="0 usable updates of 4"):
        go(tmp_path, run, StandInClients(spoil=dict.fromkeys(NAMES, fail)))
    assert RunFolder.open(tmp_path / "run").load_state() is None


def test_after_a_broken_quorum_only_the_missing_clients_are_asked_again(tmp_path):
    run = recipe(sampling__quorum=1.0)
    with pytest.raises(QuorumError):
        go(tmp_path, run, StandInClients(spoil={"north": fail}))
    again = StandInClients()
    resumed, _ = go(tmp_path, run, again, folder=RunFolder.open(tmp_path / "run"))
    assert again.asked[0] == (1, ("north",))
    whole, _ = go(tmp_path / "other", run, StandInClients())
    assert sha256(resumed.adapter) == sha256(whole.adapter)


def test_a_client_that_did_not_move_is_named_in_the_metrics(tmp_path):
    still = {n: torch.zeros_like(t) for n, t in START.items()}
    clients = StandInClients(spoil={"east": lambda u: replace(u, delta=still)})
    _, folder = go(tmp_path, recipe(rounds=1), clients)
    status = {r["client"]: r["status"] for r in folder.metrics() if r["event"] == "train"}
    assert status == {"east": "did not move", "north": "ok", "south": "ok", "west": "ok"}


def test_all_clients_are_scored_although_only_some_train(tmp_path):
    run = recipe(sampling__fraction=0.5, rounds=4)
    clients = StandInClients()
    _, folder = go(tmp_path, run, clients)
    assert all(len(cohort) == 2 for _, cohort in clients.asked)
    for round_ in range(5):
        scored = {r["client"] for r in folder.metrics() if scores(r) and r["round"] == round_}
        assert scored == set(NAMES), round_
    # a score that came with a training message costs no bytes of its own
    down = {r["bytes_down"] for r in folder.metrics() if scores(r)}
    assert down == {0, 48}


def scores(row) -> bool:
    return row["event"] == "evaluate"


def test_evaluate_every_names_the_rounds_that_are_scored(tmp_path):
    _, folder = go(tmp_path, recipe(rounds=5, evaluate__every=2), StandInClients())
    assert sorted({r["round"] for r in folder.metrics() if scores(r)}) == [0, 2, 4, 5]


def test_evaluate_every_zero_scores_nothing(tmp_path):
    _, folder = go(tmp_path, recipe(evaluate__every=0), StandInClients())
    assert not [r for r in folder.metrics() if scores(r)]


@pytest.mark.parametrize(("keep", "left"), [("last", [3]), ("all", [1, 2, 3])])
def test_checkpoints_are_kept_as_the_recipe_says(tmp_path, keep, left):
    _, folder = go(tmp_path, recipe(checkpoint__keep=keep), StandInClients())
    names = sorted(p.name for p in (folder.path / "checkpoints").iterdir())
    assert names == [f"round-{r:05d}" for r in left]
    assert not list((folder.path / "spool").iterdir())


class Improving(StandInClients):
    """Scores best after round 2, worse before and after."""

    def train(self, messages):
        for update in super().train(messages):
            loss = {0: 4.0, 1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0}[update.round - 1]
            yield replace(update, score=Score(update.client, loss, 1, 0, 1))


def test_keep_best_keeps_the_round_with_the_lowest_held_out_loss(tmp_path):
    _, folder = go(tmp_path, recipe(rounds=5, checkpoint__keep="best"), Improving())
    assert folder.best_round() == 2
    names = sorted(p.name for p in (folder.path / "checkpoints").iterdir())
    assert names == ["round-00002", "round-00005"]


@pytest.mark.parametrize(
    ("algorithm", "every"),
    [
        *((name, every) for name in ("fedavgm", "fedadam") for every in (1, 2)),
        *((name, 2) for name in ("diloco", "scaffold", "feddyn", "fedsvd")),
    ],
)
def test_stopping_after_any_round_and_going_on_is_running_through(tmp_path, algorithm, every):
    run, echo = recipe(rounds=5, checkpoint__every=every), answers(algorithm)
    whole, _ = go(tmp_path / "whole", run, StandInClients(spoil=echo), algorithm=algorithm)

    class Dies(StandInClients):
        def train(self, messages):
            if any(broadcast.round == 4 for broadcast in messages.values()):
                raise KeyboardInterrupt
            return super().train(messages)

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, run, Dies(spoil=echo), algorithm=algorithm)
    folder = RunFolder.open(tmp_path / "run")
    state = folder.load_state()
    assert state is not None
    folder.rewind(state.round)
    again = StandInClients(spoil=echo)
    resumed, _ = go(tmp_path, run, again, algorithm=algorithm, folder=folder)
    assert sha256(resumed.adapter) == sha256(whole.adapter)
    asked = [(r, cohort) for r, cohort in again.asked if cohort]
    assert [r for r, _ in asked] == [4, 5]  # round 3 is taken from the spool where it was kept
    rows = [(r["event"], r["round"], r.get("client")) for r in folder.metrics()]
    assert len(rows) == len(set(rows))


# --- the run folder


def test_an_existing_folder_is_never_overwritten(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").touch()  # a run's folder: it can be gone on with
    with pytest.raises(RunFolderError, match=r"exists and is not overwritten[\s\S]*--resume"):
        RunFolder.create(tmp_path / "run", recipe())


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match=r"not a run folder: it has no recipe\.toml"):
        RunFolder.open(tmp_path)


def test_two_processes_cannot_work_in_one_folder(tmp_path):
    folder = RunFolder.create(tmp_path / "run", recipe())
    with (
        folder.locked(),
        pytest.raises(RunFolderError, match="in use by another process"),
        RunFolder.open(tmp_path / "run").locked(),
    ):
        pass


def test_a_half_written_metrics_line_is_dropped_on_resume(tmp_path):
    _, folder = go(tmp_path, recipe(), StandInClients())
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "rou')
    folder.rewind(2)
    rows = folder.metrics()
    assert {r["round"] for r in rows if r["event"] == "train"} == {1, 2}
    assert {r["round"] for r in rows if scores(r)} == {0, 1}


def test_a_damaged_checkpoint_is_named(tmp_path):
    _, folder = go(tmp_path, recipe(), StandInClients())
    (folder.path / "checkpoints" / "round-00003" / "adapter.safetensors").write_bytes(b"x")
    with pytest.raises(RunFolderError, match=r"adapter.safetensors is damaged[\s\S]*resume"):
        folder.load_state()


def test_client_names_that_are_no_file_names_get_safe_folders(tmp_path):
    folder = RunFolder.create(tmp_path / "run", recipe())
    odd = ["St. John's / Paris", "../../etc", "", "北京", "a" * 300, "..", "con/../x"]
    places = [folder.client_folder(name) for name in odd]
    assert len(set(places)) == len(odd)
    assert all(p.parent == folder.path / "clients" for p in places)
    assert all(len(p.name) < 100 for p in places)


def test_the_keys_of_saved_files_are_fixed(tmp_path):
    """A contract: changing one is a decision with a migration."""
    _, folder = go(tmp_path, recipe(rounds=1), StandInClients(), algorithm="fedadam")
    saved = folder.load_state()
    assert saved is not None
    assert set(saved.extra) == {"first_moment", "second_moment"}
    train = next(r for r in folder.metrics() if r["event"] == "train")
    assert set(train) >= {
        *("event", "round", "client", "status", "num_examples", "delta_norm"),
        *("bytes_down", "bytes_up", "train_loss", "num_tokens", "seconds_training"),
    }
    score = next(r for r in folder.metrics() if scores(r))
    assert set(score) == {
        *("event", "round", "client", "status", "loss", "perplexity", "token_accuracy"),
        *("num_tokens", "num_examples", "bytes_down"),
    }
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert all(isinstance(json.loads(line), dict) for line in lines)
