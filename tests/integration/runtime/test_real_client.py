"""What a server can learn by asking: about counts, columns and the client's machine.

Each test plays a curious server: it asks a real client in every way that the protocol has, and
looks at all that leaves.
"""

import json
import os
import platform
import re
from dataclasses import replace

import pytest
import tomli_w
import torch

from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.compression.config import WireConfig
from silotune.core.lora import at_rank
from silotune.core.types import Broadcast, Failure, ServerState
from silotune.federation.downlink import settle
from silotune.federation.ledger import lines
from silotune.federation.outbound_log import FILE as OUTBOUND
from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig
from silotune.models.loading import load_model, read_adapter
from silotune.privacy.base import PrivacyConfig
from silotune.recipes.parse import parse
from silotune.runtime import wire
from silotune.runtime.client_host import FAILED
from silotune.runtime.flower.submit import travelling
from silotune.runtime.payload import Parcel, pack
from silotune.runtime.real_client import Deployed
from tests.conftest import write_jsonl

RECORD = {"unit": "record", "noise_multiplier": 1.0, "delta": 1e-2, "clip_norm": 0.5}
WHOLE = {**RECORD, "unit": "client", "noise_at": "client"}
BUDGET = {"epsilon": 1000.0, "delta": 1e-2}
ADAPTER = {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]}


def patients(sexes: str, positive: str, noted: str) -> list[dict]:
    """Rows with what a hospital would not tell: a letter or sign for each patient."""
    return [
        {
            "question": f"What has patient {n}?",
            "answer": f"It is a{n}.",
            "sex": {"m": "male", "f": "female"}[sex],
            "hiv": "positive" if sign == "+" else "negative",
            "note": "seen twice" if note == "x" else "",
        }
        for n, (sex, sign, note) in enumerate(zip(sexes, positive, noted, strict=True))
    ]


ONE = patients("mfmfmfmfmfmf", "+-----------", "x.x.x.x.x.x.")
OTHER = patients("mmmmmmmmmmmm", "------------", "xxxxxxxxxxxx")
NEITHER = patients("ffffffffffff", "++++++++++++", "............")


@pytest.fixture
def client(tmp_path, tiny_model):
    """Call it with rows and limits for a client in a folder of its own.

    The last rows are held out in a file: otherwise each client's secret decides how many are.
    """

    def build(rows, name="a", held=2, **limits) -> Deployed:
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        write_jsonl(place / "rows.jsonl", rows[: len(rows) - held])
        data = {"path": "rows.jsonl"}
        if held:
            write_jsonl(place / "held.jsonl", rows[-held:])
            data["eval_path"] = "held.jsonl"
        table = {
            "name": "north",
            "model": str(tiny_model),
            "data": data,
            "runtime": {"device": "cpu", "threads": 1},
            "limits": limits,
        }
        (place / "client.toml").write_text(tomli_w.dumps(table), encoding="utf-8")
        return Deployed(place / "client.toml")

    return build


def recipe(model="copy:tiny", privacy=None, **sections):
    table = {
        "rounds": 3,
        "model": {"name": "owner/tiny", "dtype": "float32"},
        "adapter": ADAPTER,
        "data": {"path": "x"},
        "algorithm": {"name": "fedavg", "weights": "uniform"},
        "train": {"batch_size": 2, "local_steps": 2, "max_length": 128},
        "runtime": {"device": "cpu", "threads": 1},
    }
    for section, keys in sections.items():
        table[section] = {**table[section], **keys} if isinstance(keys, dict) else keys
    run = parse(table)
    changes = {"model": run.model.model_copy(update={"name": model})}
    if privacy is not None:
        changes["privacy"] = PrivacyConfig.model_validate(privacy)
    return run.model_copy(update=changes)


def message(run, kind="query", parcel=None, run_id="a1", **more):
    parcel = parcel or Parcel({})
    asked = {"kind": kind, "recipe": run.model_dump_json(serialize_as_any=True), "run": run_id}
    return Parcel({**asked, **more, "parcel": parcel.about}, parcel.values)


@pytest.fixture(scope="module")
def adapter(tiny_model):
    model = ModelConfig(name=str(tiny_model), dtype="float32")
    return read_adapter(load_model(model, AdapterConfig(**ADAPTER), seed=17, device="cpu"))


# --- counts --------------------------------------------------------------------------------------

FILTERED = {"data": {"path": "x", "skip_empty": True, "prompt": "{note}", "completion": "{hiv}"}}
BY_LENGTH = {"path": "x", "prompt": "{sex}", "completion": "a{sex}", "template": "plain"}
LABELS = {"path": "x", "label": "hiv", "labels": ["negative", "other"], "text": "question"}
ATTACKS = {
    "rows with a note": FILTERED,
    **{
        f"rows below {n} tokens": {"data": BY_LENGTH, "train": {"max_length": n}}
        for n in (2, 31, 32)
    },
    "is a note missing": {"data": {"path": "x", "prompt": "{note}", "completion": "{hiv}"}},
    "a column that is not there": {"data": {"path": "x", "prompt": "{no}", "completion": "{hiv}"}},
    "all fields split": {"data": {**FILTERED["data"], "eval_fraction": 0.6}},
}
PRIVACY = {"rows": RECORD, "the client": WHOLE, "noise at the server": {**RECORD, "unit": "client"}}


def told(about):
    """What an answer says, without the process and its clock."""
    found = {k: v for k, v in about.items() if k != "process"}
    if "update" in found:
        metrics = found["update"]["metrics"]
        found["update"]["metrics"] = {k: v for k, v in metrics.items() if "seconds" not in k}
    return json.dumps(found, sort_keys=True)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("unit", PRIVACY)
def test_no_query_counts_rows_under_privacy(client, attack, unit):
    """Regression: `num_train` was the number of rows that the recipe's filters let through.

    The three clients have as many rows each; nothing else may show, errors included.
    """
    run = recipe(privacy=PRIVACY[unit], **ATTACKS[attack])
    limits = BUDGET if unit != "noise at the server" else {}
    answers = {
        told(client(rows, name, **limits).answer(message(run)).about)
        for name, rows in (("a", ONE), ("b", OTHER), ("c", NEITHER))
    }
    assert len(answers) == 1
    report = json.loads(answers.pop())["report"]
    assert (report["num_train"], report["num_eval"]) == (10, 2)


@pytest.mark.parametrize("labels", [["negative", "other"], ["positive", "other"], ["a", "b"]])
def test_no_label_counts_rows_under_privacy(client, labels):
    run = recipe(privacy=RECORD, task="classify", data={**LABELS, "labels": labels})
    answers = {
        told(client(rows, name, **BUDGET).answer(message(run)).about)
        for name, rows in (("a", ONE), ("b", OTHER), ("c", NEITHER))
    }
    assert len(answers) == 1
    assert json.loads(answers.pop())["report"]["num_train"] == 10


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("unit", ["rows", "the client"])
def test_no_update_counts_rows_under_privacy(client, adapter, attack, unit):
    run = recipe(privacy=PRIVACY[unit], **ATTACKS[attack])
    sent = wire.encode_broadcast(Broadcast(1, adapter))
    answers = {
        told(client(rows, name, **BUDGET).answer(message(run, "train", sent)).about)
        for name, rows in (("a", ONE), ("b", OTHER), ("c", NEITHER))
    }
    assert len(answers) == 1
    (answer,) = answers
    assert "update" in json.loads(answer), "it takes part, with as many rows as it has"


def test_the_size_of_the_split_does_not_depend_on_a_seed_that_the_server_chooses(client, tmp_path):
    """It would be a sum over the rows for every seed, and many sums say which rows are there."""
    counts = set()
    for seed in range(5):
        run = recipe(privacy=RECORD, seed=seed, data={"path": "x", "split_seed": seed})
        counts.add(client(ONE, held=0, **BUDGET).answer(message(run)).about["report"]["num_train"])
    assert len(counts) == 1
    assert (tmp_path / "a" / "state" / "split.key").stat().st_mode & 0o077 == 0


BROKEN = {
    "a cell that is no text": [*ONE[:5], {**ONE[5], "question": ["x"]}, *ONE[6:]],
    "half a character": [*ONE[:5], {**ONE[5], "question": "\ud800"}, *ONE[6:]],
    "a number with 5000 digits": [*ONE[:5], {**ONE[5], "question": 10**4299}, *ONE[6:]],
    "nothing": ONE,
}


def test_what_may_not_be_meant_is_in_the_clients_own_log_and_nowhere_else(client, capsys, tmp_path):
    there = client(ONE, held=0)
    rows = tmp_path / "a" / "rows"
    rows.mkdir()
    for part in ("train", "validation", "test"):
        write_jsonl(rows / f"{part}.jsonl", ONE)
    config = tmp_path / "a" / "client.toml"
    config.write_text(config.read_text("utf-8").replace("rows.jsonl", "rows"), "utf-8")
    answer = there.answer(message(recipe()))
    said = capsys.readouterr().err
    assert "warning:" in said
    assert "validation" in said
    assert "validation" not in json.dumps(answer.about)


def test_a_row_that_cannot_be_read_is_not_told(client, capsys):
    run = recipe(privacy=RECORD)
    answers = {
        told(client(rows, name.replace(" ", "-"), **BUDGET).answer(message(run)).about)
        for name, rows in BROKEN.items()
    }
    assert len(answers) == 1
    assert "1 of 12 rows cannot be used" in capsys.readouterr().err, "the client's log says so"


class _Unreadable:
    def __init__(self, error):
        self.error = error

    def __call__(self, *_, **__):
        raise self.error


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyError("y"), MemoryError(), AssertionError()], ids=repr
)
def test_every_failure_of_a_private_client_is_the_same(client, monkeypatch, error):
    """Regression: code and line of an error answered questions about rows, at epsilon 0."""
    monkeypatch.setattr("silotune.federation.client_recipe.load_client_quietly", _Unreadable(error))
    answer = client(ONE, **BUDGET).answer(message(recipe(privacy=RECORD)))
    failure = wire.decode_answer(answer, "north", bytes_down=0)
    assert isinstance(failure, Failure)
    assert (failure.code, failure.place, failure.fix) == FAILED


def test_every_query_is_written_down_with_what_was_asked(client, tmp_path):
    run = recipe(privacy=RECORD, **FILTERED)
    own = client(ONE, **BUDGET)
    for _ in range(3):
        own.answer(message(run))
    own.answer(message(recipe(), run_id="b2"))  # declined, which is an answer too
    found = lines(tmp_path / "a" / "state" / OUTBOUND)
    answers = [line for line in found if "run" in line]
    assert [line["asked"] for line in answers] == ["query"] * 4
    texts = {line["recipe_sha256"]: line["text"] for line in found if "text" in line}
    assert [json.loads(texts[line["recipe"]])["data"]["prompt"] for line in answers] == [
        *["{note}"] * 3,
        None,
    ]


# --- columns, tasks and small counts -------------------------------------------------------------

HISTOGRAM = {
    "task": "classify",
    "adapter": {**ADAPTER, "head": "train"},
    "data": {
        "path": "x",
        "label": "hiv",
        "labels": ["negative", "positive"],
        "text": "question",
        "eval_fraction": 0.5,
    },
}


def score_of(own: Deployed, run, tiny_model):
    """The score that a client sends for a fresh adapter, or its failure."""
    loaded = load_model(
        ModelConfig(name=str(tiny_model), dtype="float32"),
        run.adapter,
        seed=run.seed,
        device="cpu",
        labels=run.data.labels or (),
    )
    sent = wire.encode_broadcast(Broadcast(2, read_adapter(loaded)))
    answer = own.answer(message(run, "evaluate", sent))
    return wire.decode_answer(answer, "north", bytes_down=0)


def test_without_limits_a_score_is_a_histogram_of_any_column(client, tiny_model):
    """What the limits are for: the fifth attack of the review, which works on purpose here."""
    found = score_of(client(ONE, held=6), recipe(**HISTOGRAM), tiny_model)
    assert sum(true for _, _, true in found.label_counts) == 6


def test_a_column_that_is_not_allowed_is_not_used(client, tiny_model):
    own = client(ONE, held=6, columns=["question", "answer"])
    failure = score_of(own, recipe(**HISTOGRAM), tiny_model)
    assert isinstance(failure, Failure)
    assert failure.code == "declined"
    assert "data.label uses column 'hiv', which is not in limits.columns" in failure.place
    for key, data in {
        "prompt": {"prompt": "{sex}: {question}", "completion": "{answer}"},
        "completion": {"prompt": "{question}", "completion": "{answer} {hiv}"},
    }.items():
        said = own.answer(message(recipe(data={"path": "x", **data}))).about["failure"]
        assert f"data.{key} uses column" in said["place"]
    assert "report" in own.answer(message(recipe())).about, "question and answer are allowed"
    free = client([{"messages": [], **row} for row in ONE], "b", columns=["question", "answer"])
    assert "report" in free.answer(message(recipe())).about, "other columns are not even read"


def test_a_task_that_is_not_allowed_is_refused(client, tiny_model):
    failure = score_of(client(ONE, held=6, tasks=["instruct"]), recipe(**HISTOGRAM), tiny_model)
    assert isinstance(failure, Failure)
    assert "task = 'classify' is not in limits.tasks" in failure.place


def test_a_small_count_does_not_leave(client, tiny_model):
    """One or two positive patients among twelve held out."""
    run = recipe(**HISTOGRAM)
    few = patients("m" * 24, ("+" + "-" * 11) * 2, "x" * 24)
    failure = score_of(client(few, held=12, min_count=5), run, tiny_model)
    assert isinstance(failure, Failure)
    assert "fewer of one kind, than limits.min_count = 5" in failure.place
    tiny = score_of(client(ONE, "b", held=6, min_count=7), run, tiny_model)
    assert isinstance(tiny, Failure), "six held-out rows are too few for any score"


def test_rows_that_cannot_be_used_count_and_add_nothing(client, adapter):
    """To training they are rows whose gradient is zero: the sum is the same, its divisor is not."""
    silent = recipe(
        privacy={**RECORD, "noise_multiplier": 0.0},
        train={"batch_size": 99, "local_steps": 1, "optimizer": "sgd", "lr": 1.0},
    )
    sent = wire.encode_broadcast(Broadcast(1, adapter))
    found = {}
    for name, rows in (("a", ONE), ("b", [*ONE, *({**row, "answer": ""} for row in ONE[:8])])):
        own = client(rows, name, held=0)
        write_jsonl(own.config.parent / "held.jsonl", ONE)
        table = own.config.read_text().replace("[data]", '[data]\neval_path = "held.jsonl"')
        own.config.write_text(table)
        answer = own.answer(message(silent, "train", sent))
        found[name] = wire.decode_answer(answer, "north", bytes_down=0)
    plain, half = found["a"], found["b"]
    assert (plain.num_examples, half.num_examples) == (12, 20)
    assert half.metrics["sampling_rate"] == 1.0
    for tensor, value in plain.delta.items():
        torch.testing.assert_close(20 * half.delta[tensor], 12 * value, rtol=1e-4, atol=1e-7)


def test_a_client_with_too_few_rows_takes_no_part(client):
    said = client(ONE, min_count=11).answer(message(recipe())).about["failure"]
    assert (said["code"], "fewer rows than limits.min_count = 11" in said["place"]) == (
        "declined",
        True,
    )
    report = client(ONE, "b", min_count=10).answer(message(recipe())).about["report"]
    assert (report["num_train"], report["num_eval"]) == (10, 0), "two held-out rows are too few"


@pytest.mark.parametrize("attack", ATTACKS)
def test_with_a_smallest_count_no_difference_of_queries_is_smaller(client, attack):
    """Otherwise two queries that differ by one row would tell that row."""
    answers = {
        told(client(rows, name, min_count=2).answer(message(recipe(**ATTACKS[attack]))).about)
        for name, rows in (("a", ONE), ("b", OTHER), ("c", NEITHER))
    }
    assert len(answers) == 1


# --- the machines --------------------------------------------------------------------------------


def test_no_answer_tells_the_machine_and_no_question_the_servers_paths(client, adapter, tiny_model):
    """Regression: `process.id` was host name and process id; `model.name` was the server's path."""
    run = recipe(model=str(tiny_model))
    flower = run.runtime.model_copy(update={"name": "flower"})
    told_recipe = travelling(run.model_copy(update={"runtime": flower}))
    assert told_recipe.model.name == f"copy:{tiny_model.name}"
    asked = [
        message(told_recipe),
        message(told_recipe, "train", wire.encode_broadcast(Broadcast(1, adapter))),
        message(told_recipe, "evaluate", wire.encode_broadcast(Broadcast(2, adapter))),
        message(told_recipe, "train", Parcel({"round": 1})),
        message(told_recipe, run_id="../.."),
        message(told_recipe.model_copy(update={"rounds": 99})),
    ]
    own = client(ONE, max_rounds=50)
    answers = [own.answer(question) for question in asked]
    assert {next(iter(answer.about)) for answer in answers} >= {"report", "update", "score"}
    for question in asked:
        assert str(tiny_model.parent).encode() not in pack(question)
    log = own.config.parent / "state" / OUTBOUND
    for text in [*(json.dumps(answer.about) for answer in answers), log.read_text()]:
        assert not re.search(rf"\b{re.escape(platform.node())}\b", text)
        assert not re.search(rf"(?<![0-9a-f.]){os.getpid()}(?![0-9a-f.])", text)
        assert str(tiny_model.parent) not in text
        assert str(own.config.parent) not in text
    ids = {answer.about["process"]["id"] for answer in answers if "process" in answer.about}
    assert len(ids) == 1, "one process, by a random name"


def test_the_servers_fingerprint_finds_a_copy_with_other_content(client):
    own = client(ONE)
    said = own.answer(message(recipe(), base_sha256="ab" * 32)).about["failure"]
    assert said["code"] == "declined"
    assert "get the same files" in said["place"]
    right = own.answer(message(recipe())).about["report"]["base_sha256"]
    assert "report" in own.answer(message(recipe(), base_sha256=right)).about


def test_a_folder_of_the_server_is_never_looked_up_here(client, tmp_path):
    own = client(ONE)
    table = own.config.read_text().replace("model =", "# model =")
    own.config.write_text(table)
    said = own.answer(message(recipe(model="copy:tiny"))).about["failure"]
    assert said["code"] == "declined"
    assert "set model to this client's own copy" in said["place"]


# --- rank ----------------------------------------------------------------------------------------


def test_a_client_trains_at_its_own_rank_and_refuses_a_higher_one(client, adapter):
    """The server learns the rank from the report, and truncates what it sends."""
    own = client(ONE, rank=1)
    run = recipe(algorithm={"name": "flora"})
    report = wire.decode_report(own.answer(message(run)), "north")
    assert report["rank"] == 1
    assert own._station.worker.run.adapter.rank == 1
    low = at_rank(adapter, 1)
    sent = own.answer(message(run, "train", wire.encode_broadcast(Broadcast(1, low))))
    update = wire.decode_answer(sent, "north", bytes_down=0)
    assert {n: t.shape for n, t in update.delta.items()} == {n: t.shape for n, t in low.items()}
    refused = own.answer(message(run, "train", wire.encode_broadcast(Broadcast(2, adapter))))
    assert "arrives at rank 2, this client trains at rank 1" in refused.about["failure"]["place"]
    plain = own.answer(message(recipe())).about["failure"]
    assert plain["code"] == "declined"
    assert "adapter.rank = 2 is above limits.rank = 1" in plain["place"]


# --- news -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("down", ["float32", "int8"])
def test_news_lead_to_the_update_of_the_whole_adapter_or_are_refused(client, adapter, down):
    run = recipe().model_copy(update={"wire": WireConfig(down=down)})
    before = ServerState(0, adapter)
    moved = {name: tensor + 0.01 for name, tensor in adapter.items()}
    after = settle(run, fedavg(FedAvgConfig()), before, ServerState(1, moved))
    first = wire.encode_broadcast(Broadcast(1, adapter, score=False))
    whole = wire.encode_broadcast(Broadcast(2, after.adapter, score=False))
    news = wire.encode_broadcast(Broadcast(2, {}, news=after.news, score=False))
    one = client(ONE, "a")

    def asked(parcel, run_id):
        return one.answer(message(run, "train", parcel, run_id))

    for run_id in ("r1", "r2"):
        assert "update" in asked(first, run_id).about
    told_whole, told_news = asked(whole, "r1"), asked(news, "r2")
    assert told_news.values.tobytes() == told_whole.values.tobytes()
    # one that has lost what it held, or joined later
    last = settle(run, fedavg(FedAvgConfig()), after, replace(after, round=2, adapter=adapter))
    later = wire.encode_broadcast(Broadcast(3, {}, news=last.news, score=False))
    refused = asked(later, "r3").about["failure"]
    assert "this client holds no adapter" in refused["place"]
    assert "update" in asked(whole, "r3").about
