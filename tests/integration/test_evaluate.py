"""Questions put to a finished run, from the command line, on the tiny model."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import silotune
from silotune.cli import app
from silotune.core.checksums import list_files
from silotune.core.errors import ModelError
from silotune.results import run as finished_run
from tests.conftest import build_tiny_model, write_jsonl, write_tiny_recipe


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("evaluate")
    recipe = write_tiny_recipe(folder, tiny_model)
    return silotune.run(recipe, ["rounds=1", "evaluate.every=1"], out=folder / "run")


def command(*words) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["evaluate", *map(str, words)])
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found.exit_code, found.output


def place_of(output: str) -> Path:
    return Path(output.rsplit("all answers: ", 1)[1].strip())


MCQ = [
    {
        "id": f"q{i}",
        "question": f"Which one is number {i}?",
        "options": {"A": "one", "B": "two", "C": "three", "D": "four"},
        "answer": "ABCD"[i % 4],
    }
    for i in range(9)
]
TWEETS = [{"id": i, "text": f"Profit {i} % up", "label": i % 3} for i in range(6)]


@pytest.fixture
def files(tmp_path):
    medqa = write_jsonl(tmp_path / "medqa.jsonl", MCQ)
    return [f"medqa={medqa}", f"tfns={write_jsonl(tmp_path / 'tfns.jsonl', TWEETS)}"]


def test_without_a_suite_the_runs_own_held_out_questions_are_asked(done):
    code, output = command(done.path, "--max-new-tokens", "7")
    assert code == 0
    assert "mean over clients" in output
    scores = json.loads((place_of(output) / "scores.json").read_text("utf-8"))
    for model in ("base", "federated"):
        held = scores["models"][model]["held-out"]
        assert list(held["clients"]) == ["hospital-0", "hospital-1", "hospital-2"]
        lines = (place_of(output) / f"held-out-{model}.jsonl").read_text("utf-8").splitlines()
        assert len(lines) == sum(c["num_items"] for c in held["clients"].values())
        assert {"question", "reference", "answer", "rougeL", "ended"} <= json.loads(lines[0]).keys()
        assert all(json.loads(line)["length"] <= 7 for line in lines)
        # the loss is that of the run's own table
        for client, own in done.summary["clients"].items():
            loss = own["base_loss" if model == "base" else "federated_loss"]
            assert held["clients"][client]["loss"] == pytest.approx(loss, abs=1e-4)


def test_suites_are_answered_in_every_way_and_all_answers_are_kept(done, files):
    words = [w for pair in files for w in ("--data", pair)]
    suites = ["--suite", "medqa", "--suite", "tfns"]
    code, output = command(
        done.path, *suites, *words, "--leaderboard", "--max-new-tokens", "4", "--batch-size", "4"
    )
    assert code == 0
    scores = json.loads((place_of(output) / "scores.json").read_text("utf-8"))
    for model in ("base", "federated"):
        for suite, count in (("medqa", 9), ("tfns", 6)):
            ways = scores["models"][model][suite]
            assert list(ways) == ["likelihood", "generation", "leaderboard"]
            for own in ways.values():
                parts = (own["num_correct"], own["num_wrong"], own["num_unparsable"])
                assert sum(parts) == own["num_items"] == count
            kept = (place_of(output) / f"{suite}-{model}.jsonl").read_text("utf-8").splitlines()
            assert len(kept) == 3 * count
        assert {"macro_f1", "mcc"} <= scores["models"][model]["tfns"]["generation"][
            "metrics"
        ].keys()


def test_a_limit_draws_the_same_questions_again(done, files):
    words = ["--suite", "medqa", "--data", files[0], "--limit", "4", "--no-base"]
    drawn = []
    for _ in range(2):
        _, output = command(done.path, *words, "--max-new-tokens", "2")
        lines = (place_of(output) / "medqa-federated.jsonl").read_text("utf-8").splitlines()
        drawn.append([json.loads(line)["id"] for line in lines])
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 4
    assert drawn[0][:4] != ["q0", "q1", "q2", "q3"]


def test_the_leaderboards_own_sentence_can_be_given(done, files, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "silotune.workflows.evaluate.suites.leaderboard.encode",
        lambda loaded, prompts, **kw: asked.extend(prompts) or [[5]] * len(prompts),
    )
    sentence = tmp_path / "sentences.json"
    sentence.write_text('{"medqa": "Choose one."}', "utf-8")
    words = ["--suite", "medqa", "--data", files[0], "--leaderboard", "--instructions", sentence]
    assert command(done.path, *words, "--no-base", "--max-new-tokens", "2")[0] == 0
    assert any(prompt.startswith("<|im_start|>question\nChoose one.\n") for prompt in asked)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--suite", "medqx"], "Did you mean 'medqa'"),
        (["--suite", "human_eval"], "--allow-code-execution"),
        (["--suite", "medqa", "--data", "medqa"], "Give it as SUITE=FILE"),
        (["--suite", "medqa", "--data", "medqa=none.jsonl"], "none.jsonl"),
        (["--suite", "medqa", "--data", "tfns=x.jsonl"], "which is not selected"),
        (["--suite", "medqa", "--data", "medqa={wrong}"], "needs column 'answer'"),
        (["--suite", "medqa", "--instructions", "none.json"], "cannot be read as JSON"),
    ],
)
def test_a_mistake_is_one_clear_error_before_a_model_is_loaded(
    done, tmp_path, monkeypatch, words, says
):
    monkeypatch.setattr(finished_run, "load_for", lambda *_: pytest.fail("a model was loaded"))
    rows = [{k: v for k, v in row.items() if k != "answer"} for row in MCQ]
    wrong = write_jsonl(tmp_path / "wrong.jsonl", rows)
    code, output = command(done.path, *(word.replace("{wrong}", str(wrong)) for word in words))
    assert code == 2
    assert says in " ".join(output.split())
    assert output.count("Error") == 1


def test_lm_eval_that_is_not_installed_is_one_clear_error(done, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    code, output = command(done.path, "--suite", "lm-eval:arc_easy")
    assert code == 2
    assert "pip install lm-eval" in output


def test_an_adapter_on_a_base_that_has_changed_is_refused_before_it_is_loaded(
    tmp_path, monkeypatch
):
    model = build_tiny_model(tmp_path / "model")
    run = silotune.run(write_tiny_recipe(tmp_path, model), ["rounds=1"], out=tmp_path / "run")
    shutil.rmtree(model)
    build_tiny_model(model, seed=9)
    monkeypatch.setattr(finished_run, "load_for", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ModelError, match=r"not the base that[\s\S]*Restore"):
        run.ask("What is a1?")


def test_an_adapter_that_does_not_fit_is_named(done, tmp_path):
    place = tmp_path / "run"
    shutil.copytree(done.path, place)
    recipe = (place / "recipe.toml").read_text("utf-8")
    assert "rank = 2" in recipe
    (place / "recipe.toml").write_text(recipe.replace("rank = 2", "rank = 3"), "utf-8")
    list_files(place, ["recipe.toml"])
    with pytest.raises(ModelError, match=r"adapter does not fit[\s\S]*has shape"):
        silotune.Run(place).load()


def test_an_evaluation_of_full_training_asks_the_result_only(tmp_path, tiny_model):
    recipe = write_tiny_recipe(tmp_path, tiny_model)
    run = silotune.run(recipe, ["rounds=1", "adapter.kind=full"], out=tmp_path / "run")
    place = silotune.evaluate(run, silotune.Questions(max_new_tokens=2)).path
    assert list(json.loads((place / "scores.json").read_text())["models"]) == ["federated"]


def test_the_report_is_written_again_by_its_command(done):
    found = CliRunner().invoke(app, ["report", str(done.path)])
    assert found.exit_code == 0, found.output
    page = Path(found.output.strip())
    assert page == done.path / "report.html"
    assert "<svg" in page.read_text("utf-8")
