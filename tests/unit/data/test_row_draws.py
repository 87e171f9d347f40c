"""One row more or less in a holder's file changes nothing for the other rows, tried row by row."""

import hashlib
import json
from collections import Counter
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silotune.core.errors import DataError
from silotune.data.clients import load_client, load_clients
from silotune.data.files import PlacedRow
from silotune.data.partition import PartitionConfig
from silotune.data.reading import DataConfig
from silotune.data.row_draws import hold_out, keep_at_most, places, row_digests
from tests.unit.data.row_files import make_rows, write

TALKS = make_rows(57) + make_rows(3)
"""Three rows occur twice."""
TEXTS = [{"text": row["question"], "label": n % 2} for n, row in enumerate(TALKS)]


def load(path, *, seed=17, task="instruct", **settings):
    return load_client(DataConfig(path=str(path), **settings), "north", seed=seed, task=task)


def counted(rows):
    return Counter(json.dumps(row, sort_keys=True) for row in rows)


def distance(before, after):
    """How many rows have to be added or removed to make one part the other."""
    a, b = counted(before), counted(after)
    return (a - b).total() + (b - a).total()


def placed(rows):
    return [PlacedRow(f"row {n}", row) for n, row in enumerate(rows)]


# --- neighbours -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "task", "fraction", "seed"),
    [
        ("jsonl", "instruct", 0.05, 1),
        ("jsonl", "classify", 0.9, 4),
        ("csv", "classify", 0.1, 17),
        ("json", "instruct", 0.5, 3),
        ("parquet", "instruct", 0.1, 17),
        ("parquet", "classify", 0.05, 1),
    ],
)
def test_each_row_less_changes_at_most_that_row(tmp_path, ending, task, fraction, seed):
    """Bug: one row appended to 500 re-drew the held-out rows, and 97 train rows differed."""
    rows = TALKS if task == "instruct" else TEXTS
    settings = {"task": task, "seed": seed, "eval_fraction": fraction}
    whole = load(write(tmp_path / f"whole.{ending}", rows), **settings)
    for gone in range(len(rows)):
        fewer = rows[:gone] + rows[gone + 1 :]
        part = load(write(tmp_path / f"fewer.{ending}", fewer), **settings)
        train = distance(whole.train, part.train)
        held = distance(whole.evaluation, part.evaluation)
        assert (train, held) in [(1, 0), (0, 1), (1, 2)]
        if held == 2:  # the only row that was held out is gone, so a train row takes its place
            assert len(whole.evaluation) == len(part.evaluation) == 1


@pytest.mark.parametrize(("held", "validation", "seed"), [(0.05, 0.05, 1), (0.2, 0.3, 17)])
def test_with_validation_rows_each_row_less_changes_one_train_row_at_most(
    tmp_path, held, validation, seed
):
    """Three parts are two draws, and each draw passes on at most one row more or less."""
    settings = {"seed": seed, "eval_fraction": held, "validation_fraction": validation}
    whole = load(write(tmp_path / "whole.jsonl", TALKS), **settings)
    plain = load(write(tmp_path / "whole.jsonl", TALKS), seed=seed, eval_fraction=held)
    assert whole.evaluation == plain.evaluation, "the held-out rows are those without validation"
    assert counted([*whole.train, *whole.validation]) == counted(plain.train)
    assert whole.scored == whole.validation != ()
    assert plain.scored == plain.evaluation
    for gone in range(len(TALKS)):
        fewer = TALKS[:gone] + TALKS[gone + 1 :]
        part = load(write(tmp_path / "fewer.jsonl", fewer), **settings)
        assert distance(whole.train, part.train) <= 1


def test_a_client_with_too_few_rows_to_validate_is_named(tmp_path):
    with pytest.raises(DataError, match=r"'north' has 1 row[\s\S]*remove data.validation_fraction"):
        load(write(tmp_path / "two.jsonl", make_rows(2)), validation_fraction=0.5)


def test_the_groups_of_held_out_rows_tell_no_value(tmp_path):
    rows = [
        {**row, "disease": f"flu {n // 10}" if n < 40 else ""}
        for n, row in enumerate(make_rows(57))
    ]
    path = write(tmp_path / "rows.jsonl", rows)

    def grouped(column):
        cfg, split = DataConfig(path=str(path), eval_fraction=0.5), PartitionConfig(by="source")
        return load_clients(cfg, split, seed=17, group=column)

    for own in grouped("disease").values():
        asked = [talk[0]["content"] for talk in own.evaluation]
        disease = {row["question"]: row["disease"] for row in rows}
        assert len(own.groups) == len(asked)
        assert not any("flu" in name for name in own.groups)
        for i, a in enumerate(asked):
            for j, b in enumerate(asked[:i]):
                same = disease[a] == disease[b] != "" or a == b
                assert (own.groups[i] == own.groups[j]) == same
    with pytest.raises(DataError, match=r"compare.group = 'diseas'[\s\S]*Did you mean 'disease'"):
        grouped("diseas")


def test_one_row_appended_to_500_changes_one_train_row_at_most(tmp_path):
    before = load(write(tmp_path / "a.jsonl", make_rows(500)), eval_fraction=0.1)
    after = load(write(tmp_path / "b.jsonl", make_rows(501)), eval_fraction=0.1)
    assert distance(before.train, after.train) + distance(before.evaluation, after.evaluation) == 1
    front = load(write(tmp_path / "c.jsonl", make_rows(501)[::-1]), eval_fraction=0.1)
    assert distance(front.train, after.train) == 0


SMALL = st.lists(
    st.sampled_from([0.02, 0.1, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98]), min_size=2, max_size=9
)


def split(draw, fraction):
    train, held = hold_out(range(len(draw)), fraction, draw)
    return Counter(draw[n] for n in train), Counter(draw[n] for n in held)


@given(draw=SMALL, more=st.floats(0, 1), fraction=st.floats(0.01, 0.99), where=st.integers(0, 9))
def test_small_clients_with_equal_rows_train_on_one_row_more_or_less(draw, more, fraction, where):
    """The rule of at least one row on either side must not move others: rows are their places."""
    grown = [*draw[:where], more, *draw[where:]]
    (before, held), (after, grown_held) = split(draw, fraction), split(grown, fraction)
    assert min(before.total(), held.total(), after.total(), grown_held.total()) >= 1
    if min(before.total(), after.total()) >= 2:  # privacy for rows refuses a single train row
        assert (after - before).total() + (before - after).total() <= 1


@given(draw=st.lists(st.floats(0, 1), min_size=1, max_size=30), more=st.floats(0, 1))
def test_with_a_maximum_one_row_may_come_in_and_one_leave(draw, more):
    grown = [*draw, more]
    before = Counter(draw[n] for n in keep_at_most(range(len(draw)), 10, draw))
    after = Counter(grown[n] for n in keep_at_most(range(len(grown)), 10, grown))
    assert (before - after).total() <= 1
    assert (after - before).total() <= 1
    assert after.total() == min(10, len(grown))


@pytest.mark.parametrize("seed", range(4))
def test_splits_stay_as_they_are_while_rows_arrive(tmp_path, seed):
    rows, held = TALKS[:40][::-1], Counter()
    for size in (20, 25, 32, 40):
        found = load(write(tmp_path / "rows.jsonl", rows[:size]), seed=seed, eval_fraction=0.3)
        assert not held - counted(found.evaluation), "a row that was held out is trained on"
        assert not held & counted(found.train)
        held = counted(found.evaluation)


# --- what decides ---------------------------------------------------------------------------------


def test_the_held_out_rows_of_a_file_are_a_contract(tmp_path):
    # Runs resume and scores compare only if they stay. This is the slow and obvious way.
    found = load(write(tmp_path / "rows.jsonl", make_rows(50)), eval_fraction=0.3)
    held = []
    for row in make_rows(50):
        text = '{"answer": "%s", "question": "%s", "source": "north"}'
        digest = hashlib.sha256((text % (row["answer"], row["question"])).encode()).hexdigest()
        keyed = hashlib.sha256(f"17\x1fheld-out\x1f{digest}".encode()).digest()
        if int.from_bytes(keyed[:8], "big") < 0.3 * 2**64:
            held.append(row["question"])
    assert [talk[0]["content"] for talk in found.evaluation] == held


def test_equal_rows_have_one_fate(tmp_path):
    rows = [row for row in make_rows(30) for _ in range(3)]
    found = load(write(tmp_path / "rows.jsonl", rows))
    assert not counted(found.train) & counted(found.evaluation)


def test_the_format_of_the_file_and_the_order_of_columns_have_no_say(tmp_path):
    rows = [{"id": n, "weight": n / 4, **row, "note": ""} for n, row in enumerate(TALKS)]
    found = [load(write(tmp_path / f"a.{ending}", rows)) for ending in ("csv", "json", "parquet")]
    turned = [dict(reversed(row.items())) for row in rows]
    sparse = [{k: v for k, v in row.items() if v != ""} for row in rows]
    found += [load(write(tmp_path / "b.jsonl", turned)), load(write(tmp_path / "c.jsonl", sparse))]
    assert all(one == found[0] for one in found)


def test_what_a_recipe_makes_of_a_row_has_no_say(tmp_path):
    """With the text of a template, a recipe could count rows: equal texts would move together."""
    path = write(tmp_path / "rows.jsonl", TALKS)

    def held(**settings):
        return [talk[-1]["content"] for talk in load(path, **settings).evaluation]

    plain = held()
    assert held(system="Be brief.") == plain
    assert held(prompt="{source}", completion="{answer}") == plain
    assert len(held(prompt="{source}", completion="{source}")) == len(plain)


def test_cells_of_any_type_have_a_text_that_does_not_change():
    class Picture:
        """Its text names an address in memory."""

    def digests():
        cells = [b"\x00\xff", datetime(2026, 1, 2), [1, {"b": None, "a": "ü"}], Picture(), True]
        return row_digests(placed([{"cell": cell} for cell in cells]))

    assert digests() == digests()
    assert len(set(digests())) == 5


# --- how many -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_about_the_fraction_is_held_out(fraction):
    draw = places(row_digests(placed(make_rows(4000))), 17, "held-out")
    _, held = hold_out(range(4000), fraction, draw)
    five_deviations = 5 * (4000 * fraction * (1 - fraction)) ** 0.5
    assert len(held) == pytest.approx(4000 * fraction, abs=five_deviations)


def test_each_draw_is_independent_of_the_others():
    digests = row_digests(placed(make_rows(4000)))
    draws = [places(digests, 17, name) for name in ("server-rows", "held-out", "validation")]
    draws.append(places(digests, 18, "held-out"))
    for n, first in enumerate(draws):
        for second in draws[n + 1 :]:
            both = sum(a < 0.5 and b < 0.5 for a, b in zip(first, second, strict=True))
            assert both == pytest.approx(1000, abs=137), "five standard deviations"
