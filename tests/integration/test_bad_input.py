"""The command line as a new user meets it: mistakes, what is said about them, and the way out.

Every mistake ends with code 2, says what, where and how to fix it, and leaves nothing behind.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from silotune.cli import app
from silotune.federation.run_folder import RunFolder
from silotune.recipes.parse import load_recipe
from tests.conftest import hospital_rows, write_jsonl, write_tiny_recipe
from tests.forked import run_typed


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """Commands run in an empty folder, where `runs/` would appear."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def recipe(here, tiny_model) -> Path:
    tiny = write_tiny_recipe(here, tiny_model)
    tiny.write_text(tiny.read_text().replace("rounds = 3", "rounds = 1"))
    return tiny.rename(here / "my.toml")


def silotune(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def files(folder: Path) -> dict[Path, float]:
    """All files below a folder, with the time when each was last written."""
    return {p: p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def mistake(*words, kind="ConfigError") -> str:
    """The message of a command that ends with code 2. Every file must be as it was before."""
    before = files(Path())
    result = silotune(*words)
    assert result.exit_code == 2, result.output
    assert files(Path()) == before
    assert not list(Path().glob("runs/*")), "a run folder is left"
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    said = result.stderr.splitlines()
    start = next(i for i, line in enumerate(said) if line.startswith(f"{kind}: "))
    message = said[start:]
    assert len(message) > 1, f"nothing says how to fix it: {message}"
    assert all(line.startswith("  ") for line in message[-1:]), message
    return "\n".join(message)


# --- recipes and overrides


FIVE = {
    "sede: unknown key. Did you mean seed?",
    "adapter.rnak: unknown key. Did you mean adapter.rank?",
    "train.local_setps: unknown key. Did you mean train.local_steps?",
    "runtime.threads: should be a number, got 'two'.",
    "checkpoint.keep: 'best' needs held-out losses, but evaluate.every is 0",
}
"""Three misspelt keys, a wrong type and a contradiction between two sections."""


@pytest.mark.parametrize("command", ["run", "check"])
def test_all_mistakes_of_a_recipe_are_reported_together(recipe, command):
    text = recipe.read_text()
    for right, wrong in (
        ("seed =", "sede ="),
        ("rank =", "rnak ="),
        ("local_steps =", "local_setps ="),
        ("threads = 1", 'threads = "two"'),
    ):
        assert right in text
        text = text.replace(right, wrong)
    recipe.write_text(text + '[evaluate]\nevery = 0\n[checkpoint]\nkeep = "best"\n')
    head, *lines = mistake(command, recipe.name).splitlines()
    assert head == "ConfigError: 5 mistakes in recipe 'my':"
    assert {line.strip() for line in lines} == FIVE


def test_all_mistakes_of_overrides_are_reported_together(recipe):
    words = ["sede=4", "adapter.rnak=3", "train.local_setps=3", "runtime.threads=two"]
    words += ["checkpoint.keep=best", "evaluate.every=0", "verbose"]
    head, *lines = mistake("run", recipe.name, *words).splitlines()
    assert head == "ConfigError: 6 mistakes in recipe 'my':"
    assert {line.strip() for line in lines} == FIVE | {
        "override 'verbose': write key=value, for example train.lr=5e-4"
    }


def test_an_unknown_recipe_offers_the_nearest_shipped_name():
    assert mistake("run", "hospital") == (
        "ConfigError: recipe 'hospital': no such file or shipped recipe. Did you mean "
        "'hospitals'?\n  Give the path of a TOML file, or a shipped name: blueprint, flowertune, "
        "flowertune-code, flowertune-finance, flowertune-general, flowertune-medical, glue-cola, "
        "glue-sst2, hospitals, medical-dora, preference, workshop."
    )


def test_an_unknown_file_offers_the_nearest_beside_it(recipe):
    assert "Did you mean 'my.toml'?" in mistake("run", "mi.toml")


def test_a_recipe_that_is_not_toml_is_named_with_its_line(here):
    (here / "my.toml").write_text("seed = 3\nrounds = three\n")
    text = mistake("run", "my.toml")
    assert text.startswith("ConfigError: my.toml: not valid TOML: Invalid value (at line 2, ")
    assert "\n  Fix the line." in text


def test_an_unknown_algorithm_offers_the_nearest_and_lists_all(recipe):
    text = mistake("run", recipe.name, "algorithm.name=fedprx")
    assert "algorithm.name: there is no algorithm 'fedprx'. Did you mean 'fedprox'?" in text
    assert "There are: fedavg, fedprox, fedavgm, " in text
    text = mistake("run", recipe.name, "algorithm=fedprox")
    assert "algorithm: is a section. Name the algorithm with algorithm.name." in text


# --- the user's own data


def ten_rows(path: Path) -> Path:
    rows = [f"{'north' if n % 2 else 'south'},title {n},reply {n}\n" for n in range(10)]
    path.write_text("site,title,reply\n" + "".join(rows))
    return path


def test_own_columns_are_refused_with_the_setting_that_fixes_them_and_then_run(here, recipe):
    ten_rows(here / "ten.csv")
    text = recipe.read_text()
    own = text.replace(text.partition('path = "')[2].partition('"')[0], "ten.csv")
    recipe.write_text(own.replace('by = "source"', 'by = "site"'))
    said = mistake("run", recipe.name, kind="DataError")
    assert said.splitlines()[0] == (
        "DataError: ten.csv:2: no known format fits the columns 'site', 'title', 'reply'."
    )
    assert 'set data.prompt = "{a column}" and data.completion = "{a column}".' in said

    near = own.replace("[data]\n", '[data]\nprompt = "{title}"\ncompletion = "{repli}"\n')
    near = near.replace('by = "source"', 'by = "site"')
    recipe.write_text(near)
    said = mistake("run", recipe.name, kind="DataError")
    assert "ten.csv:2: data.completion uses column 'repli', which does not exist." in said
    assert "Did you mean 'reply'?" in said

    recipe.write_text(near.replace("{repli}", "{reply}"))
    done = silotune("run", recipe.name, "--out", "fixed", "--json")
    assert done.exit_code == 0, done.stderr
    clients = json.loads(done.stdout)["clients"]
    assert {name: c["num_train"] + c["num_eval"] for name, c in clients.items()} == {
        "north": 5,
        "south": 5,
    }


def test_a_missing_partition_column_offers_the_nearest(recipe):
    text = mistake("run", recipe.name, "partition.by=suorce", kind="DataError")
    assert "partition.by = 'suorce': " in text
    assert "hospitals.jsonl:1 and the rows after it have no such column." in text
    assert "Did you mean 'source'?\n  The columns are 'source', 'question', 'answer'." in text


def test_more_clients_in_a_round_than_there_are_is_a_mistake(recipe):
    assert mistake("run", recipe.name, "sampling.num_clients=9") == (
        "ConfigError: sampling.num_clients = 9, but the data has only 3 clients.\n"
        "  Set sampling.num_clients to 3 or less, or split the data into more clients."
    )


@pytest.mark.parametrize("num_clients", [14, 99])
def test_more_clients_than_rows_says_how_many_there_can_be(recipe, num_clients):
    cut = ["partition.by=none", "partition.kind=iid"]
    said = mistake(
        "run", recipe.name, *cut, f"partition.num_clients={num_clients}", kind="DataError"
    )
    assert said == (
        f"DataError: 27 rows cannot be split into {num_clients} clients with at least 2 rows "
        "each.\n  Set partition.num_clients to 13 or less, or add rows."
    )
    assert silotune("check", recipe.name, *cut, "partition.num_clients=13").exit_code == 0


def test_a_client_whose_rows_are_all_too_long_is_named(here, recipe):
    rows = hospital_rows()
    for row in rows:
        if row["source"] == "hospital-1":
            row["question"] = "Is this very long? " * 20
    write_jsonl(here / "hospitals.jsonl", rows)
    assert mistake("run", recipe.name, kind="DataError") == (
        "DataError: client 'hospital-1': no train row has an answer within 128 tokens.\n"
        "  Raise train.max_length or shorten the prompts."
    )


# --- models


def test_a_folder_that_is_no_model_is_refused(here, recipe):
    (here / "empty").mkdir()
    text = mistake("run", recipe.name, "model.name=empty", kind="ModelError")
    assert "'empty' is a folder without a model: config.json is missing." in text
    assert "\n  Use the folder that contains config.json and *.safetensors" in text


def test_a_model_folder_that_does_not_exist_is_refused_without_asking_the_hub(here, recipe):
    text = mistake("run", recipe.name, "model.name=./modles/tiny", kind="ModelError")
    assert "model.name: there is no folder './modles/tiny'." in text
    assert "\n  Fix the path" in text


def test_a_near_miss_of_a_named_source_is_offered(recipe):
    text = mistake("run", recipe.name, "model.name=smollm2-135m-instrct", kind="ModelError")
    assert "is not a named model. Did you mean 'smollm2-135m-instruct'?" in text


def test_targets_that_match_nothing_offer_the_nearest_modules(recipe):
    text = mistake("run", recipe.name, 'adapter.targets=["q_porj"]', kind="ModelError")
    assert text.startswith("ModelError: adapter.targets: this model has no module 'q_porj'.")
    assert "\n  Did you mean q_proj" in text
    text = mistake("run", recipe.name, "adapter.targets=q_proj")
    assert 'adapter.targets: should be a list, for example ["q_proj", "v_proj"].' in text


# --- run folders


@pytest.fixture
def unfinished(here, recipe) -> str:
    RunFolder.create(here / "unfinished", load_recipe(recipe))
    return "unfinished"


def test_an_existing_folder_is_not_overwritten(here, recipe, unfinished):
    assert mistake("run", recipe.name, "--out", unfinished, kind="RunFolderError") == (
        "RunFolderError: unfinished exists and is not overwritten.\n"
        "  Choose another --out, or resume it: silotune run --resume unfinished"
    )
    (here / "other").mkdir()
    text = mistake("run", recipe.name, "--out", "other", kind="RunFolderError")
    assert text.endswith("other exists and is not overwritten.\n  Choose another --out.")


@pytest.mark.parametrize("words", [["run", "--resume"], ["ask"]])
def test_a_folder_that_is_no_run_is_refused(here, words):
    question = ["What is flu?"] if words == ["ask"] else []
    (here / "photos").mkdir()
    text = mistake(*words, "photos", *question, kind="RunFolderError")
    assert "photos is not a run folder: it has no recipe.toml." in text
    assert "\n  Give the folder that a run printed" in text
    text = mistake(*words, "nowhere", *question, kind="RunFolderError")
    assert "nowhere is not a run folder: there is no such folder." in text


def test_an_unfinished_run_cannot_be_asked_and_says_how_to_finish(unfinished):
    text = mistake("ask", unfinished, "What is flu?", kind="RunFolderError")
    assert text.endswith("holds no result yet.\n  Resume it: silotune run --resume unfinished")


def test_a_resumed_run_keeps_its_recipe_and_names_the_keys_that_differ(recipe, unfinished):
    text = mistake("run", recipe.name, "train.lr=1.0", "seed=9", "--resume", unfinished)
    assert "the recipe differs from that of unfinished in: seed, train.lr." in text
    text = mistake("run", "train.lr=1.0", "--resume", unfinished)
    assert "a resumed run keeps its recipe, so train.lr cannot be changed." in text


def test_a_mistake_of_a_resumed_run_leaves_its_folder(here, recipe, unfinished):
    (here / "hospitals.jsonl").rename(here / "moved.jsonl")
    text = mistake("run", "--resume", unfinished, kind="DataError")
    assert "hospitals.jsonl: there is no such file or folder." in text
    (here / "moved.jsonl").rename(here / "hospitals.jsonl")
    done = silotune("run", "--resume", unfinished)
    assert done.exit_code == 0, done.stderr


def test_a_run_that_fails_without_a_mistake_keeps_its_folder_and_says_how_to_go_on(here, recipe):
    failed = silotune("run", recipe.name, "sampling.timeout_s=1e-9", "--out", "kept")
    assert failed.exit_code == 1
    assert "QuorumError: " in failed.stderr
    assert "to continue: silotune run --resume kept" in failed.stderr
    assert (here / "kept" / "recipe.toml").is_file()


# --- as a real process


def run_process(*words, cwd):
    env = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, "-m", "silotune", *map(str, words)]
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False
    )


def test_mistakes_end_a_real_process_with_code_2(here, recipe):
    done = run_process("run", recipe.name, "sede=4", "train.lr=fast", cwd=here)
    assert (done.returncode, done.stdout) == (2, "")
    said = [line for line in done.stderr.splitlines() if not line.startswith("starting, ")]
    assert said == [  # a busy machine says that it is starting before it says what is wrong
        "ConfigError: 2 mistakes in recipe 'my':",
        "  train.lr: should be a number, got 'fast'.",
        "  sede: unknown key. Did you mean seed?",
    ]
    assert not (here / "runs").exists()


def test_a_mistake_found_in_the_model_leaves_no_folder_of_a_real_process(here, recipe):
    targets = 'adapter.targets=["q_porj"]'
    done = run_typed(["run", recipe.name, targets, "--out", "first"], cwd=here)
    assert (done.returncode, done.stdout) == (2, "")
    assert "ModelError: adapter.targets: this model has no module 'q_porj'." in done.stderr
    assert "nothing was trained, so the run folder is removed" in done.stderr
    assert "--resume" not in done.stderr
    assert not (here / "first").exists()
