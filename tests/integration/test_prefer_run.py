"""Whole runs that learn preferences: every key acts, and commands know pairs."""

import json
import signal
import time
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import silotune
from silotune.cli import app
from silotune.core.errors import ConfigError, DataError
from silotune.core.processors import usable_threads
from silotune.recipes.parse import load_recipe
from silotune.workflows.compare.statistics import score_table
from silotune.workflows.plan import measure
from tests.conftest import write_jsonl, write_tiny_recipe
from tests.forked import run_forked
from tests.integration.kill_at import POINTS, run_and_die

TASK = ["task=prefer"]


def pairs(num_clients=3, per_client=8):
    return [
        {
            "source": f"hospital-{c}",
            "prompt": f"What is {chr(97 + c)}{i}?",
            "chosen": f"It is {'very ' * (i % 3)}{chr(97 + c)}{i}.",
            "rejected": f"No {chr(97 + c)}{i}" + ", never" * (i % 2),
            "score_chosen": 8.5,
        }
        for c in range(num_clients)
        for i in range(per_client + c)
    ]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model):
    place = tmp_path_factory.mktemp("prefer")
    path = write_tiny_recipe(place, tiny_model)
    write_jsonl(place / "hospitals.jsonl", pairs())
    path.write_text('task = "prefer"\n' + path.read_text().replace("dropout = 0.1", "dropout = 0"))
    return path


@pytest.fixture(scope="module")
def done(recipe, tmp_path_factory):
    return silotune.run(recipe, ["report.page=true"], out=tmp_path_factory.mktemp("runs") / "run")


def test_the_base_is_its_own_reference_and_the_result_prefers_the_chosen_answers(done):
    base = [row for row in done.metrics if row["event"] == "evaluate" and row["round"] == 0]
    assert [row["reward_margin"] for row in base] == [0.0] * 3, "exactly, whatever the batches"
    assert all(row["loss"] == pytest.approx(0.693147, abs=1e-5) for row in base)
    scores = done.summary["scores"]["overall"]
    assert "preference_accuracy" not in scores["base"]
    assert scores["federated"]["preference_accuracy"] > 0.8
    assert scores["federated"]["reward_margin"] > 0
    assert done.summary["overall"]["federated_loss"] < done.summary["overall"]["base_loss"]
    trained = [row for row in done.metrics if row["event"] == "train"]
    assert all(row["num_targets"] == 2 * 2 for row in trained), "two steps of two pairs"


def test_a_plan_asks_the_reference_about_a_few_pairs_and_counts_them_all(recipe, monkeypatch):
    """Regression: a plan took as long as the passes over all pairs, minutes on a busy machine."""
    asked, build = [], measure.build_task

    def counting(*args):
        task = build(*args)

        def reference(loaded, batch):
            asked.append(batch.num_terms)
            time.sleep(0.25)
            return task.reference(loaded, batch)

        return replace(task, reference=reference)

    monkeypatch.setattr(measure, "build_task", counting)
    run = load_recipe(recipe, ["train.batch_size=2"])
    found = measure._measure(run, time.perf_counter())
    assert asked == [2, 2]
    num_pairs = len(pairs())
    assert found.seconds_start > 0.25 * num_pairs / 2 * 0.7, "the passes that a run makes"


def test_what_people_read_speaks_of_pairs(done):
    page, card = (done.path / "report.html").read_text(), (done.path / "README.md").read_text()
    for text in (page, card):
        assert "nats per pair" in text
        assert "preference accuracy: federated" in text
        assert "Held-out pairs" in text
    assert "perplexity" not in card


@pytest.mark.parametrize(
    "keys",
    [
        ["prefer.loss=ipo"],
        ["prefer.beta=2"],
        ["prefer.label_smoothing=0.4"],
        ["prefer.nll_weight=1"],
        ["prefer.length_normalized=true"],
    ],
    ids=str,
)
def test_every_key_changes_the_result(recipe, done, tmp_path, keys):
    other = silotune.run(recipe, keys, out=tmp_path / "run")
    assert other.summary["adapter_sha256"] != done.summary["adapter_sha256"]


def test_evaluate_gives_win_rates_of_base_and_result(done):
    answer = CliRunner().invoke(app, ["evaluate", str(done.path)])
    assert answer.exit_code == 0, answer.output
    assert "win rate" in answer.output
    place = sorted((done.path / "evaluations").iterdir())[-1]
    models = json.loads((place / "scores.json").read_text())["models"]
    scores = done.summary["scores"]
    for model, found in models.items():
        held = found["held-out"]
        for name, own in [*held["clients"].items(), (None, held["overall"])]:
            known = (scores["clients"][name] if name else scores["overall"])[model]
            assert own["win_rate"]["mean"] == pytest.approx(known["win_rate"])
            assert own["reward_margin"] == pytest.approx(known["reward_margin"], abs=1e-6)
            assert own["win_rate"]["low"] <= own["win_rate"]["mean"] <= own["win_rate"]["high"]
    rows = [json.loads(x) for x in (place / "held-out-federated.jsonl").read_text().splitlines()]
    assert {"prompt", "likelier", "reward_margin", "loss", "client"} == rows[0].keys()


def test_a_comparison_has_the_metrics_of_pairs(recipe, tmp_path):
    found = silotune.compare(recipe, ["compare.seeds=1", "rounds=1"], out=tmp_path / "c").result
    assert list(found["metrics"]) == ["loss", "preference_accuracy", "reward_margin", "win_rate"]
    means = found["overall"]["scores"]
    assert means["reward_margin"]["base"]["mean"] == 0
    assert means["reward_margin"]["federated"]["mean"] > 0
    assert means["loss"]["base"]["mean"] == pytest.approx(0.693147, abs=1e-5)


def test_a_comparison_shows_no_preference_accuracy_of_the_base(recipe, tmp_path):
    """Regression: it was shown as 0, with an interval, and as worse than training alone."""
    keys = ["compare.seeds=3", "rounds=1", "compare.tune=false"]
    done = silotune.compare(recipe, keys, out=tmp_path / "c")
    found = json.loads((done.path / "comparison.json").read_text())
    for group in (found["overall"], *found["clients"].values()):
        for part in ("scores", "differences"):
            assert group[part]["preference_accuracy"]["base"] is None
        assert "base" not in group["verdicts"]["preference_accuracy"]
        for metric in ("loss", "reward_margin", "win_rate"):
            assert group["scores"][metric]["base"]["mean"] is not None
            assert group["differences"][metric]["base"]["mean"] is not None
    header, *lines = score_table(found, "preference_accuracy")
    assert {line[header.index("base")] for line in lines} == {"-"}
    assert all(line[header.index("federated")] != "-" for line in lines)
    page = (done.report()).read_text()
    row = page.partition("Preference accuracy")[2].partition("</table>")[0]
    base = row.partition(">base<")[2].partition("</tr>")[0]
    assert base.count("–") == 2
    table = done.table()
    own = table[(table["metric"] == "preference_accuracy") & (table["arm"] == "base")]
    assert own.empty


@pytest.mark.parametrize("point", list(POINTS)[1:4])
def test_a_killed_run_resumes_to_the_same_bytes(recipe, done, tmp_path, point):
    out = tmp_path / "run"
    assert run_forked(run_and_die, point, str(recipe), str(out)) == -signal.SIGKILL
    again = silotune.run(resume=out)
    assert again.summary["adapter_sha256"] == done.summary["adapter_sha256"]


def test_a_pair_is_the_unit_of_record_level_privacy(recipe, tmp_path):
    keys = [
        *("rounds=1", "privacy.unit=record", "privacy.delta=1e-2", "privacy.clip_norm=0.5"),
        *("privacy.noise_multiplier=1", "privacy.noise=seeded"),
    ]
    found = silotune.run(recipe, keys, out=tmp_path / "run")
    plans = found.privacy["promise"]["clients"]
    counts = {row["client"]: row["num_examples"] for row in found.metrics
              if row["event"] == "train"}  # fmt: skip
    assert {name: own["sampling_rate"] for name, own in plans.items()} == {
        name: 2 / count for name, count in counts.items()
    }


def test_data_shows_both_answers_and_counts_the_longer_one(recipe):
    found = silotune.preview(recipe, num_samples=1)
    text = "".join(piece for _, piece in found.samples[0].pieces)
    assert text.index("chosen:\n") < text.index("It is") < text.index("rejected:\n")
    trained = [(kind, piece) for kind, piece in found.samples[0].pieces if kind != "read"]
    assert [kind for kind, _ in trained] == ["learned", "rejected"]
    assert all(piece.endswith("<|im_end|>") for _, piece in trained)
    own = found.clients["hospital-0"]
    # bytes are tokens, and so is each of the four marks
    sizes = [sum(len(t) for t in (r["prompt"], max(r["chosen"], r["rejected"], key=len)))
             for r in pairs() if r["source"] == "hospital-0"]  # fmt: skip
    extra = len("user\n\nassistant\n\n") + 4
    assert own.train.tokens["max"] in [size + extra for size in sizes]
    assert own.train.num_cut == own.train.num_dropped == 0
    cut = silotune.preview(recipe, ["train.max_length=20"]).clients["hospital-0"]
    assert cut.train.num_dropped == cut.num_train


def test_a_plan_counts_both_answers(recipe):
    pair = silotune.plan(recipe, measured=False)
    assert pair.batch.num_rows == 2 * 2
    measured = silotune.plan(recipe)
    assert measured.batch.num_rows == 2 * 2


def test_what_cannot_be_combined_is_refused(recipe):
    for keys, words in (
        (["adapter.kind=full", "adapter.targets=none"], "the reference is the model without its"),
        (["train.packing=true"], "train.packing"),
        (["train.loss=python:a:b"], "train.loss"),
        (["task=instruct", "prefer.beta=1"], "only has an effect with task"),
    ):
        with pytest.raises(ConfigError, match=words):
            silotune.check(recipe, keys)


def test_a_new_user_with_a_csv_file_gets_a_recipe_that_works(tmp_path, tiny_model):
    import pandas as pd

    path = tmp_path / "pairs.csv"
    pd.DataFrame(pairs())[["prompt", "chosen", "rejected", "source"]].to_csv(path, index=False)
    made = silotune.new(path, out=tmp_path / "own.toml")
    assert 'task = "prefer"' in made.text
    assert 'by = "source"' in made.text
    keys = [f"model.name={tiny_model}", "rounds=1", "runtime.threads=1"]
    assert silotune.run(made.path, keys, out=tmp_path / "run").summary["task"] == "prefer"


def test_unpaired_rows_are_refused_before_a_model_is_loaded(recipe, tmp_path):
    rows = [{"prompt": "a", "completion": "b", "label": True, "source": "x"}] * 4
    path = write_jsonl(tmp_path / "kto.jsonl", rows)
    with pytest.raises(DataError, match="KTO"):
        silotune.check(recipe, [f"data.path={path}"])


def unpaired():
    return [
        {"source": f"s{n % 2}", "prompt": f"q{n}", "completion": f"a{n}", "label": n % 3 > 0}
        for n in range(9)
    ]


def test_new_refuses_unpaired_rows_whose_bad_answers_would_be_learned(tmp_path):
    """Regression: it wrote a recipe for instruction tuning that learned the bad answers, too."""
    path = write_jsonl(tmp_path / "kto.jsonl", unpaired())
    with pytest.raises(DataError, match="3 of 9 answers are bad") as caught:
        silotune.new(path)
    assert "as chosen and rejected" in str(caught.value)
    assert not (tmp_path / "kto.toml").exists()
    good = [row for row in unpaired() if row["label"]]
    made = silotune.new(write_jsonl(tmp_path / "good.jsonl", good))
    assert "task =" not in made.text, "good answers are rows like others"


def test_bad_answers_are_named_before_instruction_tuning(tmp_path, tiny_model):
    path = write_jsonl(tmp_path / "kto.jsonl", unpaired())
    keys = [f"model.name={tiny_model}", "partition.by=source", f"data.path={path}"]
    (said,) = [w for w in silotune.check("hospitals", keys).warnings if "KTO" in w]
    assert "3 answers of 9 are bad" in said
    own = [*keys, "data.prompt={prompt}", "data.completion={completion}"]
    assert not [w for w in silotune.check("hospitals", own).warnings if "KTO" in w]


def test_a_mistake_of_all_rows_is_said_once(recipe, tmp_path):
    path = write_jsonl(tmp_path / "kto.jsonl", unpaired())
    with pytest.raises(DataError) as caught:
        silotune.check(recipe, [f"data.path={path}"])
    lines = str(caught.value).split("\n")
    assert lines[0].startswith(f"{path}:1: the row is one answer with a label")
    assert lines[1] == "and the same in all 8 other rows"
    assert len(lines) == 3


def test_pairs_for_another_task_are_told_the_task(recipe):
    with pytest.raises(DataError, match='set task = "prefer"'):
        silotune.check(recipe, ["task=instruct"])


def test_equal_answers_are_named_and_can_be_skipped(recipe, tmp_path, tiny_model):
    rows = pairs()
    for row in rows[2:4]:
        row["rejected"] = f" {row['chosen']}"
    path = write_jsonl(tmp_path / "equal.jsonl", rows)
    with pytest.raises(DataError, match="chosen and rejected are the same") as caught:
        silotune.check(recipe, [f"data.path={path}"])
    assert "or skip all such rows: data.skip_empty = true" in str(caught.value)
    checked = silotune.check(recipe, [f"data.path={path}", "data.skip_empty=true"])
    own = checked.rows["hospital-0"]
    assert len(own.train) + len(own.evaluation) == 8 - 2
    assert "data.skip_empty: 2 rows lack a text or a difference and are not used" in (
        checked.warnings
    )
    made = silotune.new(path, out=tmp_path / "own.toml")
    assert "# some rows lack a text or a difference; they are skipped" in made.text
    for row in rows:
        row["rejected"] = row["chosen"]
    path = write_jsonl(tmp_path / "all.jsonl", rows)
    with pytest.raises(DataError, match="lacks a text or a difference"):
        silotune.check(recipe, [f"data.path={path}", "data.skip_empty=true"])


def test_opposed_preferences_are_named_wherever_people_look(recipe, tmp_path):
    rows = pairs(num_clients=4)
    for row in rows:
        if row["source"] in ("hospital-1", "hospital-3"):
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    path = write_jsonl(tmp_path / "opposed.jsonl", rows)
    keys = [f"data.path={path}", "report.page=true", "train.batch_size=8"]
    done = silotune.run(recipe, keys, out=tmp_path / "run")
    sides = done.summary["conflict"]["sides"]
    assert sorted(sides) == [["hospital-0", "hospital-2"], ["hospital-1", "hospital-3"]]
    for name in ("report.html", "README.md"):
        assert "Opposed preferences" in (done.path / name).read_text()


def test_agreeing_clients_are_not_called_opposed(done):
    assert "conflict" not in done.summary


@pytest.mark.engine
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["flower-simulation", "flower"])
def test_engines_give_the_same_adapter_and_scores(recipe, tmp_path, engine):
    keys = ["rounds=2", 'partition.only=["hospital-0", "hospital-1"]']
    here = silotune.run(recipe, keys, out=tmp_path / "here")
    cpus = [f"runtime.client_cpus={usable_threads()}"] * engine.endswith("simulation")
    there = silotune.run(recipe, [*keys, f"runtime.name={engine}", *cpus], out=tmp_path / "there")
    assert there.summary["adapter_sha256"] == here.summary["adapter_sha256"]
    assert there.summary["scores"] == here.summary["scores"]
