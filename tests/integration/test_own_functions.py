"""The how-to page about metrics and losses, followed word for word; a metric over both wires."""

import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

import silotune
from silotune.core.types import Score
from silotune.federation.acceptance import Known, check_scores
from silotune.recipes.parse import load_recipe
from silotune.runtime.wire import decode_answer, encode_score
from tests.conftest import hospital_rows, write_jsonl, write_tiny_recipe

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "add-a-metric-or-a-loss.md"


@pytest.fixture
def place(tmp_path, tiny_model, monkeypatch):
    """A recipe, and the module of the page beside it."""
    path = write_tiny_recipe(tmp_path, tiny_model)
    write_jsonl(tmp_path / "hospitals.jsonl", hospital_rows(per_client=12))
    text = PAGE.read_text(encoding="utf-8")
    (name, code), *rest = re.findall(r"^```py\n# (\S+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert not rest
    (tmp_path / name).write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield path
    sys.modules.pop("my_rules", None)


def keys_of_the_page() -> list[str]:
    block = re.findall(r"^```toml\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)[
        0
    ]
    sections = tomllib.loads(block)
    return [f"{s}.{key}={value}" for s, own in sections.items() for key, value in own.items()]


def test_the_page_trains_with_its_loss_and_reports_its_metric(place, tmp_path):
    few = ["rounds=1", "data.eval_fraction=0.4"]
    plain = silotune.run(place, few, out=tmp_path / "plain")
    keys = keys_of_the_page()
    assert [key.partition("=")[0] for key in keys] == ["train.loss", "evaluate.metric"]
    done = silotune.run(place, [*keys, *few], out=tmp_path / "own")
    assert done.summary["adapter_sha256"] != plain.summary["adapter_sha256"]
    scored = [r for r in done.metrics if r["event"] == "evaluate"]
    gaps = [r["metric"] - r["loss"] for r in scored]  # the worst tenth is not below the mean
    assert min(gaps) > -1e-5
    assert max(gaps) > 1e-3
    base = {r["client"]: r["loss"] for r in scored if r["round"] == 0}
    likelihoods = [r for r in plain.metrics if r["event"] == "evaluate" and r["round"] == 0]
    assert {r["client"]: r["loss"] for r in likelihoods} == base, "held-out losses stay as they are"
    metric = done.summary["metric"]
    assert metric["name"] == "python:my_rules:worst_tenth"
    for arm, round_ in (("base", 0), ("federated", 1)):
        rows = [r for r in scored if r["round"] == round_]
        assert {n: own[arm] for n, own in metric["clients"].items()} == {
            r["client"]: r["metric"] for r in rows
        }
        total = sum(r["num_examples"] for r in rows)
        mean = sum(r["metric"] * r["num_examples"] for r in rows) / total
        assert metric["overall"][arm] == pytest.approx(mean)
    assert list(done.rounds()["metric"]) == pytest.approx(
        [metric["overall"]["base"], metric["overall"]["federated"]]
    )
    assert "own metric" in (tmp_path / "own" / "README.md").read_text(encoding="utf-8")
    saved = json.loads((tmp_path / "own" / "summary.json").read_text(encoding="utf-8"))
    assert saved["metric"] == metric


def test_a_metric_alone_changes_no_bit_of_the_result(place, tmp_path):
    plain = silotune.run(place, ["rounds=1"], out=tmp_path / "plain")
    own = silotune.run(place, [keys_of_the_page()[1], "rounds=1"], out=tmp_path / "own")
    assert own.summary["adapter_sha256"] == plain.summary["adapter_sha256"]


def test_a_metric_crosses_the_wire_and_one_that_nobody_asked_for_is_refused(place):
    score = Score("north", 1.0, 4, 2, 3, metric=-0.5)
    got = decode_answer(encode_score(score, 1), "north", bytes_down=0)
    assert isinstance(got, Score)
    assert got.metric == -0.5
    known = Known(load_recipe(place), lambda: {"north": {"num_train": 3, "num_eval": 3}})
    (failure,) = check_scores([score], known)
    assert failure.code == "refused"
    assert "contains a metric" in failure.place
    asks = Known(load_recipe(place, keys_of_the_page()), known.num_rows)
    (failure,) = check_scores([Score("north", 1.0, 4, 2, 3)], asks)
    assert "contains no metric of the recipe's evaluate.metric" in failure.place
    assert list(check_scores([score], asks)) == [score]
