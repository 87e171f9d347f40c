"""Text classification from the recipe to the page: modes, heads, comparison, commands, errors."""

import json
import subprocess
import sys

import pytest
import tomli_w
from typer.testing import CliRunner

import silotune
from silotune.cli import app
from silotune.core.errors import ConfigError, DataError, ModelError
from silotune.core.tree import sha256
from silotune.recipes.parse import parse
from tests.conftest import changed, write_jsonl
from tests.tiny_encoders import build_tiny_encoder

ROWS = [
    {
        "sentence": f"{'very ' * (i % 5)}{('good', 'bad', 'odd')[i % 3]} film {i}",
        "label": ("good", "bad", "odd")[i % 3],
        "cinema": f"cinema-{i % 2}",
    }
    for i in range(60)
]
ARMS = {
    "all weights": {"adapter": {"kind": "full"}, "server": {"work": "none"}},
    "LoRA": {"server": {"work": "none"}},
    "labels": {"server": {"work": "fine-tune"}},
    "published": {"distill": {"compat": "raw-logits"}},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    here = tmp_path_factory.mktemp("classify")
    write_jsonl(here / "rows.jsonl", ROWS)
    build_tiny_encoder(here / "student", num_layers=2, seed=0)
    build_tiny_encoder(here / "teacher", num_layers=4, seed=1)
    return here


def table_of(place, **changes):
    table = {
        "seed": 3,
        "rounds": 2,
        "task": "classify",
        "model": {"name": str(place / "student"), "dtype": "float32"},
        "adapter": {"rank": 2, "alpha": 4},
        "data": {"path": str(place / "rows.jsonl")},
        "partition": {"by": "cinema"},
        "train": {"batch_size": 4, "local_steps": 2, "lr": 1e-2, "max_length": 128},
        "runtime": {"device": "cpu", "threads": 1},
        "report": {"page": False},
    }
    return changed(table, changes)


def recipe(place, **changes):
    return parse(table_of(place, **changes))


@pytest.fixture(scope="module")
def done(place, tmp_path_factory):
    return silotune.run(recipe(place, report__page=True), out=tmp_path_factory.mktemp("o") / "run")


def num_held_out(done):
    """Held-out rows of each client."""
    return {name: len(own.evaluation) for name, own in silotune.check(done.config).rows.items()}


# --- a run ----------------------------------------------------------------------------------------


def test_every_round_has_the_scores_of_each_client_and_the_summary_those_over_all(done):
    scored = [row for row in done.metrics if row["event"] == "evaluate"]
    held = num_held_out(done)
    assert {(row["round"], row["client"]) for row in scored} == {
        (r, f"cinema-{c}") for r in range(3) for c in range(2)
    }
    for row in scored:
        assert {"loss", "accuracy", "macro_f1", "mcc", "label_counts"} <= set(row)
        assert row["num_tokens"] == row["num_examples"], "a loss per row, not per token"
        assert row["num_examples"] == held[row["client"]]
    last = [row for row in scored if row["round"] == 2]
    right = sum(label[0] for row in last for label in row["label_counts"])
    everyone = done.summary["scores"]["overall"]["federated"]
    assert everyone["accuracy"] == pytest.approx(right / sum(held.values()))
    assert done.summary["labels"] == ["bad", "good", "odd"]


def test_the_bytes_of_the_head_are_told_apart(done):
    summary, messages = done.summary, 4  # two rounds, two clients
    head = 4 * (16 * 3 + 3)  # classifier: weight and bias, float32
    assert summary["head_bytes_up"] == messages * head
    assert summary["head_bytes_down"] == messages * head, "not in the first round, but to score"
    adapter = 4 * (2 * 2 * 2 * (2 * 16))  # two layers, query and value, A and B, rank 2
    assert summary["bytes_up"] == messages * (head + adapter)


def test_card_and_page_hold_the_label_table_and_how_to_load_it(done):
    card = (done.path / "README.md").read_text(encoding="utf-8")
    page = (done.path / "report.html").read_text(encoding="utf-8")
    for text in (card, page):
        assert "nats per row" in text.lower()
        assert "per token" not in text
        assert "Matthews" in text
    assert "perplexity" not in card
    assert "AutoModelForSequenceClassification" in card
    assert "adapter/labels.json" in card


def test_a_text_is_classified_by_the_finished_run(done):
    said = done.ask("very good film 4")
    label, share = said.removesuffix(")").split(" (")
    assert label in ("good", "bad", "odd")
    assert 0 < float(share.removesuffix("%")) <= 100
    with pytest.raises(ConfigError, match="no head for these labels"):
        done.ask("very good film 4", base=True)


def test_evaluate_agrees_with_the_last_round_and_keeps_every_row(done):
    result = CliRunner().invoke(app, ["evaluate", str(done.path), "--json"])
    assert result.exit_code == 0, result.output
    held = json.loads(result.stdout)["models"]["federated"]["held-out"]
    ours = done.summary["scores"]
    pairs = [(held["clients"][name], ours["clients"][name]) for name in ("cinema-0", "cinema-1")]
    for found, scored in [*pairs, (held["overall"], ours["overall"])]:
        assert found["accuracy"]["mean"] == pytest.approx(scored["federated"]["accuracy"])
        assert found["macro_f1"] == pytest.approx(scored["federated"]["macro_f1"])
        assert found["mcc"] == pytest.approx(scored["federated"]["mcc"])
    kept = list(done.path.glob("evaluations/*/held-out-federated.jsonl"))
    num_kept = len(kept[0].read_text(encoding="utf-8").splitlines())
    assert num_kept == sum(num_held_out(done).values())
    shown = CliRunner().invoke(app, ["evaluate", str(done.path), "--no-base"])
    assert "Matthews" in shown.stdout
    refused = CliRunner().invoke(app, ["evaluate", str(done.path), "--suite", "mmlu"])
    assert refused.exit_code == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter__kind": "full"},
        {"adapter__head": "freeze"},
        {"adapter__head": "local"},
        {"adapter__kind": "full", "adapter__head": "local"},
    ],
    ids=str,
)
def test_a_mode_changes_the_result_and_can_be_loaded(place, done, tmp_path, changes):
    run = silotune.run(recipe(place, **changes), out=tmp_path / "run")
    assert run.summary["adapter_sha256"] != done.summary["adapter_sha256"]
    assert run.ask("very good film 4")
    if changes.get("adapter__head") in ("freeze", "local"):
        assert run.summary["head_bytes_up"] == 0, "it is not sent"
    if changes.get("adapter__head") == "local":
        memory = list((run.path / "clients").rglob("*.safetensors"))
        assert len({path.read_bytes() for path in memory}) > 1, "each client has a head of its own"


def test_server_and_client_agree_on_a_head_that_stays_local(place, tmp_path):
    run = silotune.run(recipe(place, adapter__head="local"), out=tmp_path / "run")
    assert all(row["status"] == "ok" for row in run.metrics if row["event"] == "train")


# --- comparison -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(place, tmp_path_factory):
    asked = recipe(
        place,
        server={"data_fraction": 0.2, "work": "distill"},
        distill={"teacher": str(place / "teacher"), "pretrain_epochs": 1, "attention": 1.0},
        compare={"seeds": 2, "arms": ARMS, "history": True, "tune": False},
    )
    return silotune.compare(asked, out=tmp_path_factory.mktemp("compare") / "c")


def test_all_arms_are_trained_and_scored_by_label_too(compared):
    result = compared.result
    arms = ["base", "local", "federated", *(f"federated: {a}" for a in ARMS), "centralized"]
    assert list(result["arms"]) == arms
    assert set(result["metrics"]) == {"loss", "accuracy", "macro_f1", "mcc"}
    assert result["metrics"]["loss"]["unit"] == "nats per row"
    for client in (*result["clients"].values(), result["overall"]):
        for metric in result["metrics"]:
            assert list(client["scores"][metric]) == arms
    card = (compared.path / "README.md").read_text(encoding="utf-8")
    assert "Matthews correlation" in card


def test_costs_name_the_head_and_the_server(compared):
    costs = compared.result["arms"]
    assert costs["federated"]["seconds_server"] > 0
    assert costs["federated"]["tokens_server"] > costs["federated: labels"]["tokens_server"] > 0
    assert costs["federated: LoRA"]["tokens_server"] == 0
    assert 0 < costs["federated"]["head_bytes_up"] < costs["federated"]["bytes_up"]
    assert costs["federated: all weights"]["bytes_up"] > 10 * costs["federated"]["bytes_up"]
    for arm in ("federated", "federated: labels", "federated: all weights", "local"):
        assert costs[arm]["tokens"] == costs["federated: LoRA"]["tokens"], "at the clients"


def test_an_arm_is_the_run_of_its_recipe(place, compared, tmp_path):
    """FedLoRA in a comparison, with a server that owns rows, is FedLoRA as `run` trains it."""
    own = recipe(place, server={"data_fraction": 0.2}, data__split_seed=3)
    alone = silotune.run(own, out=tmp_path / "run")
    arm = silotune.Run(compared.path / "seed-3" / "federated-LoRA" / "run")
    assert sha256(arm.adapter()) == sha256(alone.adapter())


def test_the_teacher_learns_once_per_seed_for_all_arms_that_share_it(compared):
    teachers = sorted(p.parent.name for p in compared.path.glob("seed-*/teacher-*"))
    assert teachers == ["seed-3", "seed-4"]


def test_results_json_holds_configuration_and_history(compared):
    found = json.loads((compared.path / "results.json").read_text(encoding="utf-8"))
    assert found["configuration"]["distill"]["pretrain_epochs"] == 1
    history = found["history"]["federated: labels"]["4"]
    assert [row["round"] for row in history] == [0, 1, 2]
    assert {"loss", "accuracy", "macro_f1", "mcc"} <= set(history[0])
    assert found["arms"] == compared.result["arms"]


def test_an_interrupted_comparison_trains_no_finished_arm_again(compared, monkeypatch):
    for name in ("comparison.json", "results.json"):
        (compared.path / name).rename(compared.path / f"before-{name}")

    def forbidden(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr("silotune.federation.client.train", forbidden)
    monkeypatch.setattr("silotune.training.server_training._train", forbidden)
    again = silotune.compare(resume=compared.path)
    before = json.loads((compared.path / "before-comparison.json").read_text(encoding="utf-8"))
    assert again.result == before


# --- commands and runtimes ------------------------------------------------------------------------


def test_the_teachers_command_prints_how_to_use_it(place, tmp_path):
    asked = table_of(
        place,
        server={"data_fraction": 0.2, "work": "distill"},
        distill={"teacher": str(place / "teacher"), "pretrain_epochs": 1},
    )
    (tmp_path / "films.toml").write_text(tomli_w.dumps(asked), encoding="utf-8")
    command = ["pretrain-teacher", str(tmp_path / "films.toml"), "--out", str(tmp_path / "t")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert f"distill.teacher={tmp_path / 't'}" in result.stdout
    assert "accuracy" in result.stdout
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2
    assert "already exists" in again.output


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_deployment_gives_the_adapter_of_the_plain_loop(place, tmp_path):
    """Classification with a distilling server through Flower's real processes."""
    asked = table_of(
        place,
        rounds=1,
        server={"data_fraction": 0.2, "work": "distill"},
        distill={"teacher": str(place / "teacher")},
    )
    (tmp_path / "films.toml").write_text(tomli_w.dumps(asked), encoding="utf-8")
    adapters = []
    for name in ("in-process", "flower"):
        command = [sys.executable, "-m", "silotune", "run", str(tmp_path / "films.toml")]
        command += [f"runtime.name={name}", "--out", str(tmp_path / name)]
        subprocess.run(command, check=True, capture_output=True)
        adapters.append(sha256(silotune.Run(tmp_path / name).adapter()))
    assert adapters[0] == adapters[1]


# --- bad input ------------------------------------------------------------------------------------


def test_an_unknown_label_is_an_error_with_its_place(place):
    with pytest.raises(DataError) as caught:
        silotune.check(recipe(place, data__labels=["good", "bad"]))
    assert "rows.jsonl:3: column 'label' has the unknown label 'odd'" in str(caught.value)
    assert str(caught.value).count("unknown label") == 20, "there are no more"


def test_labels_that_a_client_has_never_seen_and_lone_labels_are_named_warnings(tmp_path, place):
    rows = [row | {"cinema": row["label"] if row["label"] != "odd" else "bad"} for row in ROWS]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    checked = silotune.check(
        recipe(
            place,
            data__path=str(tmp_path / "rows.jsonl"),
            data__labels=["good", "bad", "odd", "none"],
        )
    )
    assert list(checked.warnings) == [
        "client 'bad' has no train rows labelled: good, none",
        "all train rows of client 'good' have the same label: 'good'",
        "no client has train rows labelled: none",
    ]


def test_rows_of_one_label_alone_are_an_error(tmp_path, place):
    write_jsonl(tmp_path / "rows.jsonl", [row | {"label": "good"} for row in ROWS])
    with pytest.raises(DataError, match="so there is nothing to learn"):
        silotune.check(recipe(place, data__path=str(tmp_path / "rows.jsonl")))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"task": "instruct", "adapter__head": "freeze"},
            "adapter.head: only has an effect with task",
        ),
        ({"data__system": "Be brief."}, 'data.system: only has an effect with task = "instruct"'),
        ({"data__text_pair": "other"}, "text_pair goes with text"),
        ({"data__labels": ["a", "a"]}, "labels contains a label twice"),
        ({"data__labels": ["a"]}, "data.labels"),
    ],
    ids=str,
)
def test_a_contradiction_is_found_before_anything_is_read(place, changes, text):
    with pytest.raises(ConfigError) as caught:
        recipe(place, **changes)
    assert text in str(caught.value)


def test_a_limit_beyond_the_models_places_is_an_error_before_training(place, tmp_path):
    """Bug: a row longer than the positions that an encoder has learned ended in a torch error."""
    with pytest.raises(ModelError, match=r"Set train\.max_length = 160 or less"):
        silotune.run(recipe(place, train__max_length=161), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
