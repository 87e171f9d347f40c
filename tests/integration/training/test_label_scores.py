"""Scores of labels: against scikit-learn, over clients, with their intervals, and on the wire."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.core.crossed import (
    Scored,
    crossed_interval,
    minus,
    parts_of_labels,
    parts_of_mean,
)
from silotune.core.errors import UpdateError
from silotune.core.stats import Labelled, label_scores
from silotune.core.types import Failure, Score, ServerState, Update
from silotune.federation.acceptance import Known, check_scores, check_update, what_is_expected
from silotune.federation.metrics import overall_scores
from silotune.federation.round_rows import score_rows
from silotune.federation.spool import Spool
from silotune.recipes.parse import parse
from silotune.results.run_tables import round_table
from silotune.results.summary import (
    cost_lines,
    label_table,
    summarise,
)
from silotune.runtime import wire
from silotune.runtime.flower.records import from_record, to_record
from silotune.runtime.payload import Parcel, pack, unpack
from silotune.training.scoring import add_label_counts, metrics

GOLDEN = Path(__file__).parents[2] / "golden" / "update_parcel.json"
METRICS = ("accuracy", "macro_f1", "mcc")


def counts_of(given_, true, num_labels):
    """The slow obvious way: row by row, label by label."""
    counts = [[0, 0, 0] for _ in range(num_labels)]
    for a, b in zip(given_, true, strict=True):
        counts[a][0] += a == b
        counts[a][1] += 1
        counts[b][2] += 1
    return counts


def oracle(given_, true, *_):
    return {
        "accuracy": accuracy_score(true, given_),
        "macro_f1": f1_score(true, given_, average="macro"),  # over labels that are there
        # of a table with one label scikit-learn warns, and gives 0 as we do
        "mcc": matthews_corrcoef(true, given_) if len({*given_, *true}) > 1 else 0.0,
    }


@st.composite
def predictions(draw, max_rows=30):
    """(given, true, number of labels); often some labels are unused."""
    num_labels = draw(st.integers(2, 6))
    some = draw(st.lists(st.integers(0, num_labels - 1), min_size=1, max_size=num_labels))
    pairs = st.tuples(st.sampled_from(some), st.sampled_from(some))
    rows = draw(st.lists(pairs, min_size=1, max_size=max_rows))
    return [a for a, _ in rows], [b for _, b in rows], num_labels


# --- scores ---


@given(predictions())
def test_scores_are_those_of_scikit_learn(rows):
    assert label_scores(counts_of(*rows)) == pytest.approx(oracle(*rows), abs=1e-12)


def test_a_label_that_no_row_has_or_was_given_counts_nowhere():
    two = label_scores(counts_of([0, 1, 1], [0, 1, 0], 2))
    assert label_scores(counts_of([0, 1, 1], [0, 1, 0], 3)) == two


@pytest.mark.parametrize(
    ("given_", "true"), [([1, 1, 1], [1, 1, 1]), ([1, 1, 1], [0, 1, 1]), ([0, 1, 1], [1, 1, 1])]
)
def test_one_label_only_has_no_correlation(given_, true):
    assert label_scores(counts_of(given_, true, 2))["mcc"] == 0.0


@given(st.lists(st.integers(0, 3), min_size=8, max_size=30).filter(lambda t: set(t) >= {0, 1}))
def test_perfect_is_one_and_inverted_is_minus_one(true):
    perfect = label_scores(counts_of(true, true, 4))
    assert perfect["accuracy"] == 1.0
    assert perfect["macro_f1"] == 1.0
    assert perfect["mcc"] == pytest.approx(1.0, abs=1e-12)
    two = [n % 2 for n in true]
    inverted = label_scores(counts_of([1 - n for n in two], two, 2))
    assert (inverted["accuracy"], inverted["macro_f1"]) == (0.0, 0.0)
    assert inverted["mcc"] == pytest.approx(-1.0, abs=1e-12)


@given(predictions())
def test_names_and_order_of_labels_do_not_matter(rows):
    given_, true, num_labels = rows
    mirrored = [[num_labels - 1 - n for n in part] for part in (given_, true)]
    assert label_scores(counts_of(*mirrored, num_labels)) == pytest.approx(
        label_scores(counts_of(*rows)), abs=1e-12
    )


@given(predictions(), st.sampled_from([2, 1000, 10**6]))
def test_a_million_copies_of_the_rows_score_as_one(rows, times):
    one = counts_of(*rows)
    many = [[cell * times for cell in label] for label in one]
    assert label_scores(many) == pytest.approx(label_scores(one), abs=1e-9)


# --- over clients ---


@given(st.lists(predictions(), min_size=1, max_size=4))
def test_the_score_over_clients_is_that_of_all_rows_together(clients):
    tables = [counts_of(given_, true, 6) for given_, true, _ in clients]
    together = [[n for rows in clients for n in rows[part]] for part in (0, 1)]
    assert add_label_counts(tables) == counts_of(*together, 6)
    assert label_scores(add_label_counts(tables)) == pytest.approx(oracle(*together, 6), abs=1e-12)


NORTH = ([0, 0, 1, 2], [0, 1, 1, 2])
SOUTH = ([2, 2], [2, 0])


def score(client, rows, num_labels=3, **changes):
    counts = tuple(map(tuple, counts_of(*rows, num_labels)))
    hits = sum(a == b for a, b in zip(*rows, strict=True))
    num = len(rows[0])
    return replace(Score(client, 2.5, num, hits, num, label_counts=counts), **changes)


def row(round_, client, rows, **more):
    found = metrics([score(client, rows)])
    return {"event": "evaluate", "round": round_, "client": client, "status": "ok"} | found | more


def test_the_metrics_of_labels_are_of_all_rows_together_and_name_no_tokens():
    found = metrics([score("north", NORTH), score("south", SOUTH)])
    both = [a + b for a, b in zip(NORTH, SOUTH, strict=True)]
    assert found.keys() == {"loss", "num_tokens", "num_examples", *METRICS, "label_counts"}
    assert found["loss"] == 5.0 / 6
    assert (found["num_tokens"], found["num_examples"]) == (6, 6)
    assert {key: found[key] for key in METRICS} == pytest.approx(oracle(*both, 3))
    assert found["label_counts"] == counts_of(*both, 3)
    json.dumps(found)


def test_the_metrics_of_tokens_name_no_labels():
    found = metrics([Score("north", 2.0, 4, 3, 2)])
    assert found.keys() == {"loss", "num_tokens", "num_examples", "perplexity", "token_accuracy"}


def test_overall_scores_are_over_all_clients_by_rounds_and_not_a_mean_of_theirs():
    rows = [
        row(1, "north", NORTH),
        row(0, "south", SOUTH),
        {"event": "evaluate", "round": 0, "client": "east", "status": "no answer", "place": "x"},
        row(0, "north", NORTH),
        {"event": "train", "round": 1, "client": "north", "label_counts": None},
    ]
    both = [a + b for a, b in zip(NORTH, SOUTH, strict=True)]
    found = overall_scores(rows)
    assert list(found) == [0, 1]
    assert found[0] == pytest.approx(oracle(*both, 3))
    assert found[1] == pytest.approx(oracle(*NORTH, 3))
    mean = np.mean([label_scores(counts_of(*rows, 3))["accuracy"] for rows in (NORTH, SOUTH)])
    assert found[0]["accuracy"] != pytest.approx(mean)


def test_rows_of_another_task_have_no_overall_scores():
    found = metrics([Score("north", 2.0, 4, 3, 2)])
    assert overall_scores([{"event": "evaluate", "round": 0, "status": "ok", **found}]) == {}


# --- what people read ---

MEASURED = {"seconds_total": 9.0, "base_model_loads": 1, "peak_memory_bytes": 2**20}
TRAINED = {"num_tokens": 5, "num_targets": 4, "train_loss": 0.5, "seconds_training": 1.0}


def summary_of(rows, **changes):
    data = {"path": "x", "labels": ["a", "b", "c"]}
    run = parse({"rounds": 1, "task": "classify", "data": data})
    clients = {name: {"num_train": 4, "num_eval": 4} for name in ("south", "north")}
    return summarise(run, rows, clients, result_round=1, measured=MEASURED, **changes)


def test_the_table_of_labels_has_a_line_per_client_and_one_of_all_rows_together():
    better = (NORTH[1], NORTH[1])
    rows = [row(0, "north", NORTH), row(0, "south", SOUTH)]
    rows += [row(1, "north", better), row(1, "south", SOUTH)]
    table = label_table(summary_of(rows))
    assert table[0] == (
        "client",
        "accuracy: base",
        "accuracy: federated",
        "macro F1: base",
        "macro F1: federated",
        "Matthews: base",
        "Matthews: federated",
    )
    assert [line[0] for line in table[1:]] == ["north", "south", "all"]
    assert [line[1] for line in table[1:]] == ["0.750", "0.500", "0.667"]
    assert [line[2] for line in table[1:]] == ["1.000", "0.500", "0.833"]
    assert {len(line) for line in table} == {7}


def test_a_client_that_was_not_scored_has_dashes():
    table = label_table(summary_of([row(0, "north", NORTH), row(1, "north", NORTH)]))
    assert table[2] == ("south", *["-"] * 6)
    assert table[3][1:] == table[1][1:]


def test_another_task_has_no_table_of_labels():
    assert label_table({"task": "instruct"}) == []


def test_the_head_is_counted_in_every_message_that_carries_it_and_in_no_other():
    rows = [
        {"event": "train", "round": 1, "client": "north", "bytes_up": 100, "bytes_down": 90}
        | TRAINED,
        {"event": "train", "round": 1, "client": "south", "status": "no answer", "place": "x"},
        row(1, "north", NORTH, bytes_down=90),
        row(0, "north", NORTH, bytes_down=0),  # came with the training message
    ]
    found = summary_of(rows, head_bytes={"bytes_up": 20, "bytes_down": 20})
    assert (found["bytes_up"], found["bytes_down"]) == (100, 180)
    assert (found["head_bytes_up"], found["head_bytes_down"]) == (20, 40)
    assert cost_lines(found)[0] == (
        "sent to clients 180 B (head 40 B), sent by clients 100 B (head 20 B)"
    )
    assert "head" not in cost_lines(summary_of(rows))[0]


def test_the_table_of_rounds_shows_the_scores_of_the_adapter_that_a_round_made():
    rows = [
        row(0, "north", NORTH),
        {"event": "train", "round": 1, "client": "north", "bytes_up": 1, "bytes_down": 1} | TRAINED,
        {"event": "round", "round": 1, "seconds": 2.0},
        {"event": "round", "round": 2, "seconds": 2.0},
        row(1, "north", ([0, 1, 1, 2], [0, 1, 1, 2])),
    ]
    header, base, first, second = round_table(rows)
    assert header[3:6] == ("accuracy", "macro F1", "Matthews")
    assert (base[0], base[3]) == ("0 (base)", "0.750")
    assert first[3:6] == ("1.000", "1.000", "1.000")
    assert second[3:6] == ("-", "-", "-")
    assert {len(line) for line in (header, base, first, second)} == {len(header)}


# --- intervals ---


def labelled(seed, num_seeds=3, num_rows=40, num_labels=3, client="north", right=0.6):
    """Predictions that are right with some probability, else anything."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, num_labels, num_rows)
    luck = rng.random((num_seeds, num_rows)) < right
    given_ = np.where(luck, true, rng.integers(0, num_labels, luck.shape))
    return Labelled(client, given_, true, num_labels)


def interval(clients, metric, others=None):
    parts = [parts_of_labels(own, metric) for own in clients]
    if others is not None:
        parts = [minus(a, parts_of_labels(b, metric)) for a, b in zip(parts, others, strict=True)]
    return crossed_interval(parts)


def of_hits(rows):
    hits = (rows.given == rows.true).astype(float)
    return parts_of_mean(Scored(rows.client, hits, np.ones(len(rows.true))))


@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize("names", [("north",), ("north", "south", "east")])
def test_the_interval_of_accuracy_is_that_of_the_mean_of_hits(num_seeds, names):
    clients = [
        labelled(n, num_seeds, num_rows=20 + 10 * n, client=name) for n, name in enumerate(names)
    ]
    one, two = interval(clients, "accuracy"), crossed_interval(list(map(of_hits, clients)))
    assert vars(one) == pytest.approx(vars(two), abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_a_difference_turned_round_has_the_interval_turned_round(metric):
    clients = [labelled(n, num_rows=30, client=c) for n, c in enumerate(("north", "south"))]
    others = [
        replace(c, given=labelled(n + 9, num_rows=30, right=0.4).given)
        for n, c in enumerate(clients)
    ]
    one, back = interval(clients, metric, others), interval(others, metric, clients)
    assert (one.mean, one.low, one.high) == pytest.approx((-back.mean, -back.high, -back.low))


@pytest.mark.parametrize("metric", METRICS)
def test_the_estimate_is_the_mean_over_seeds_then_over_clients(metric):
    clients = [labelled(1, num_rows=50), labelled(2, num_rows=9, client="south")]
    slow = [
        np.mean([oracle(list(own), list(c.true), 3)[metric] for own in c.given]) for c in clients
    ]
    assert interval(clients, metric).mean == pytest.approx(np.mean(slow), abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_an_arm_minus_itself_is_nothing(metric):
    clients = [labelled(1)]
    found = interval(clients, metric, clients)
    assert (found.mean, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("metric", METRICS)
def test_an_interval_shrinks_with_rows(metric):
    few, many = (interval([labelled(3, num_rows=size)], metric) for size in (30, 480))
    for found in (few, many):
        assert found.low < found.mean < found.high
    # sixteen times the rows: a quarter of the width
    assert many.high - many.low == pytest.approx((few.high - few.low) / 4, rel=0.5)


@pytest.mark.parametrize("metric", METRICS)
def test_leaving_rows_out_gives_about_the_spread_that_new_rows_have(metric):
    drawn = [interval([labelled(seed, 1, num_rows=100)], metric) for seed in range(200)]
    real = 1.96 * np.std([found.mean for found in drawn])
    said = np.mean([(found.high - found.low) / 2 for found in drawn])
    assert said == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize("metric", METRICS)
def test_labels_that_are_rare_and_always_right_have_no_spread(metric):
    # 77 labels with two rows each, all right, as small clients of Banking77 are
    true = np.tile(np.arange(77), 2)
    found = interval([Labelled("north", true[None], true, 77)], metric)
    assert (found.low, found.high) == pytest.approx((found.mean, found.mean), abs=1e-12)


def test_one_draw_of_rows_counts_for_all_seeds():
    # the same predictions asked ten times are not more rows (docs/decisions/0013)
    once = labelled(4, num_seeds=1)
    often = replace(once, given=np.repeat(once.given, 10, axis=0))
    one, ten = (interval([c], "mcc") for c in (once, often))
    assert vars(one) == pytest.approx(vars(ten), abs=1e-12)


def test_the_interval_of_the_correlation_contains_the_true_value_nearly_as_often_as_it_claims():
    # two equally frequent labels, right in 80 of 100 cases for each: the correlation is 0.6
    rng, hits = np.random.default_rng(7), 0
    for _ in range(200):
        true = rng.integers(0, 2, 60)
        given_ = np.where(rng.random((1, 60)) < 0.8, true, 1 - true)
        rows = Labelled("north", given_, true, 2)
        found = interval([rows], "mcc")
        hits += found.low <= 0.6 <= found.high
    assert 0.89 <= hits / 200 <= 0.99


# --- on the wire ---

CARRIERS = {
    "itself": lambda parcel: parcel,
    "bytes": lambda parcel: unpack(pack(parcel)),
    "record": lambda parcel: from_record(to_record(parcel)),
}
UPDATE = Update(
    "north",
    1,
    {},
    3,
    {"train_loss": 1.0, "num_tokens": 5, "seconds_training": 0.1, "seconds": 0.2},
    score=score("north", NORTH),
)


@pytest.mark.parametrize("carrier", CARRIERS)
@given(rows=predictions())
def test_counts_of_labels_arrive_as_they_were_sent(carrier, rows):
    sent = score("north", rows[:2], rows[2])
    alone = CARRIERS[carrier](wire.encode_score(sent, 2))
    assert wire.decode_answer(alone, "north", bytes_down=8) == replace(sent, size_bytes=8)
    trained = CARRIERS[carrier](wire.encode_update(replace(UPDATE, score=sent)))
    got = wire.decode_answer(trained, "north", bytes_down=8)
    assert isinstance(got, Update)
    assert got.score == sent
    assert hash(got.score.label_counts) == hash(sent.label_counts), "tuples, not lists"


def test_a_score_without_counts_has_no_such_key_so_the_contract_is_kept():
    plain = replace(UPDATE, score=replace(UPDATE.score, label_counts=()))
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))["about"]["update"]["score"]
    for parcel in (
        wire.encode_update(plain).about["update"],
        wire.encode_score(plain.score, 1).about,
    ):
        assert parcel["score"].keys() == golden.keys()
        assert "label_counts" not in parcel["score"]
    assert wire.encode_score(UPDATE.score, 1).about["score"].keys() == {*golden, "label_counts"}
    got = wire.decode_answer(Parcel({"score": golden, "round": 1}), "north", bytes_down=0)
    assert got.label_counts == ()


def facts(**changes):
    """A good score's text with keys changed."""
    good = json.loads(json.dumps(wire.encode_score(score("north", NORTH), 1).about["score"]))
    return {**good, **changes}


def refusal(about):
    """Both as an answer of its own and beside an update."""
    texts = set()
    update = wire.encode_update(UPDATE).about["update"]
    for whole in ({"score": about, "round": 1}, {"update": {**update, "score": about}}):
        with pytest.raises(UpdateError) as caught:
            wire.decode_answer(Parcel(whole), "north", bytes_down=0)
        texts.add(str(caught.value))
    return texts


def test_the_hand_made_score_is_good_before_it_is_spoilt():
    got = wire.decode_answer(Parcel({"score": facts(), "round": 1}), "north", bytes_down=0)
    assert got == score("north", NORTH)


GOOD = counts_of(*NORTH, 3)  # [[1, 2, 1], [1, 1, 2], [1, 1, 1]]
LIES = {
    "more right than given": {"label_counts": [[2, 1, 2], [0, 2, 1], [1, 1, 1]]},
    "more right than there are": {"label_counts": [[2, 2, 1], [0, 1, 2], [1, 1, 1]]},
    "more right in sum than the score says": {"num_correct": 2},
    "fewer right in sum than the score says": {"num_correct": 4},
    "fewer rows than the score says": {"num_tokens": 5},
    "more rows than the score says": {"num_tokens": 3},
    "given does not add up": {"label_counts": [[1, 1, 1], *GOOD[1:]]},
    "true does not add up": {"label_counts": [[1, 2, 2], *GOOD[1:]]},
    "nothing but zeros": {"label_counts": [[0, 0, 0]]},
}


@pytest.mark.parametrize("kind", LIES)
def test_counts_that_contradict_the_score_are_refused_by_the_clients_name(kind):
    assert refusal(facts(**LIES[kind])) == {
        "client 'north': its label counts contradict its score."
    }


FORMS = {
    "negative": [[-1, 2, 1], *GOOD[1:]],
    "half a row": [[0.5, 2, 1], *GOOD[1:]],
    "too few numbers": [[1, 2], *GOOD[1:]],
    "too many numbers": [[1, 2, 1, 0], *GOOD[1:]],
    "more than a float can hold": [[2**60, 2**60, 2**60]],
    "not a number": [["many", 2, 1], *GOOD[1:]],
    "no list": 7,
    "nothing": None,
    "more labels than there can be": [[0, 0, 0]] * (wire.MAX_LABELS + 1),
}


@pytest.mark.parametrize("kind", FORMS)
def test_counts_of_another_form_are_refused_by_their_key(kind):
    for text in refusal(facts(label_counts=FORMS[kind])):
        assert text.startswith("a message cannot be read: ")
        assert "label_counts" in text
        assert "many" not in text


def test_a_loss_that_is_not_finite_is_reported_before_counts_are_checked():
    assert refusal(facts(loss_sum=float("nan"), num_correct=0)) == {
        "client 'north': its held-out loss is not finite."
    }


def test_counts_survive_a_crash_in_the_spool(tmp_path):
    Spool(tmp_path / "spool").add(UPDATE)
    (again,) = Spool(tmp_path / "spool")
    assert again.score == UPDATE.score
    assert metrics([again.score]) == metrics([UPDATE.score])


# --- a client that counts other labels ---


THREE_LABELS = Known(
    parse(
        {"rounds": 1, "task": "classify", "data": {"path": "rows.csv", "labels": ["a", "b", "c"]}}
    ),
    lambda: {key: {"num_train": 4, "num_eval": 4} for key in ("north", "south")},
)


def test_an_update_whose_score_counts_other_labels_is_refused_by_name():
    """Bug: it broke the overall score only after it was recorded, and again on every resume."""
    state = ServerState(0, {"a": torch.zeros(1)})
    asked = what_is_expected(fedavg(FedAvgConfig()), state, ["north"], THREE_LABELS)
    sent = Update("north", 1, {"a": torch.ones(1)}, 4, {}, score=score("north", NORTH))
    assert check_update(sent, asked, {"north"}).client == "north"
    for counts in (score("north", ([0, 1], [0, 1]), 2), Score("north", 2.5, 4, 3, 4)):
        with pytest.raises(UpdateError, match=r"'north': its score counts \d labels, the server"):
            check_update(replace(sent, score=counts), asked, {"north"})


def test_a_score_that_counts_other_labels_becomes_a_failure():
    good, bad = score("north", NORTH), score("south", ([0, 1], [0, 1]), 2)
    first, second = check_scores([good, bad], THREE_LABELS)
    assert first == good
    assert isinstance(second, Failure)
    assert (second.client, second.code) == ("south", "refused")
    assert score_rows(1, [first, second])[1]["status"] == "refused"
