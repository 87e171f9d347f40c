"""`silotune data`: people see split, lengths, duplicates and a row; machines only numbers."""

import json

import pytest
from typer.testing import CliRunner

import silotune
from silotune.cli import app
from tests.conftest import hospital_rows, write_jsonl, write_tiny_recipe
from tests.tiny_encoders import build_tiny_encoder

ANSWER = "It is very very very c3."


@pytest.fixture
def recipe(tmp_path, tiny_model):
    path = write_tiny_recipe(tmp_path, tiny_model)
    leaked = hospital_rows()
    train = [*leaked, {"source": "hospital-2", "question": "[bold]?", "answer": "\x1b[31mred"}]
    (tmp_path / "rows").mkdir()
    write_jsonl(tmp_path / "rows" / "train.jsonl", train)
    write_jsonl(tmp_path / "rows" / "eval.jsonl", [leaked[0], leaked[9], leaked[20], leaked[21]])
    text = path.read_text().replace("hospitals.jsonl", "rows")
    path.write_text(text.replace("[data]\n", '[data]\nlabel = "source"\n'))
    return path


def data(*words, **env):
    # a test must not depend on the terminal that it is started in
    env = {"FORCE_COLOR": None, "NO_COLOR": None, "TERM": "xterm", **env}
    return CliRunner(env=env).invoke(app, ["data", *map(str, words)])


def test_the_command_shows_split_lengths_duplicates_and_a_row(recipe):
    done = data(recipe, "--client", "hospital-2", "--rows", "4", "train.max_length=55")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == "3 clients: one client for each value of column 'source'"
    bars = {line.split()[0]: line.split()[1] for line in lines if "█" in line and "(" not in line}
    assert {name: (bar.count("█"), bar.count("░")) for name, bar in bars.items()} == {
        "hospital-0": (25, 3),  # 8 and 1 of 13 rows are 40 characters long
        "hospital-1": (28, 3),
        "hospital-2": (34, 6),
    }
    header = next(line for line in lines if "no answer left" in line)
    row = lines[lines.index(header) + 3].split()
    # "What is c0?" comes to 30 tokens, "It is c0." with the end token and line break to 11, "very "
    # to 5; with three of them, in 2 of 11 rows, the line break is lost; 174 of 509 are learned
    assert row == ["hospital-2", "11", "2", "46", "56", "56", "2", "0", "34%"]
    assert (
        "    4 held-out rows are also train rows (hospital-2 2, hospital-0 1, hospital-1 1)"
        in lines
    )
    assert f"<|im_start|>assistant\n⟦{ANSWER}<|im_end|>⟧⟨\n⟩\n" in done.stdout
    assert "hospital-2, train row 4: " in done.stdout
    (warning,) = [line for line in lines if line.startswith("warning: ")]
    assert "some held-out rows are also train rows, which inflates scores" in warning


def test_numbers_for_a_machine_hold_no_text_of_a_row(recipe):
    done = data(recipe, "--json", "train.max_length=40")
    assert done.exit_code == 0, done.output
    numbers = json.loads(done.stdout)
    own = numbers["clients"]["hospital-2"]
    assert (own["num_train"], own["num_eval"], own["labels"]) == (11, 2, {"hospital-2": 11})
    assert own["duplicates"]["num_leaked"] == 2
    assert own["train"]["num_cut"] > 0
    assert "It is" not in done.stdout


def test_a_terminal_gets_colours_and_no_colour_gets_brackets(recipe):
    coloured = data(recipe, FORCE_COLOR="1").stdout
    assert "⟦" not in coloured
    assert "\x1b[1;32mIt is a0.<|im_end|>\x1b[0m" in coloured
    assert "⟦It is a0.<|im_end|>⟧" in data(recipe, FORCE_COLOR="1", NO_COLOR="1").stdout


def test_what_a_row_says_neither_controls_the_terminal_nor_is_markup(recipe):
    shown = data(recipe, "--client", "hospital-2", "--rows", "20", FORCE_COLOR="1").stdout
    assert "[bold]?" in shown
    assert "\x1b[31m" not in shown
    assert "\\x1b[31mred" in shown


def test_no_row_is_shown_if_none_is_requested_and_truncation_is_marked(recipe):
    assert "⟦" not in data(recipe, "--rows", "0").stdout
    cut = data(recipe, "train.max_length=37").stdout
    assert "truncated at 37" in cut
    assert "⟦learned⟧ ⟨cut off⟩" in cut
    assert "⟦It is a⟧⟨0.<|im_end|>\n⟩" in cut


def test_a_classifier_shows_text_and_label_and_the_mix_of_labels(tmp_path):
    rows = [
        {"text": f"film {n}", "label": ("bad", "good")[n % 2], "site": "ab"[n % 4 == 0]}
        for n in range(16)
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    build_tiny_encoder(tmp_path / "model")
    (tmp_path / "my.toml").write_text(
        f'rounds = 1\ntask = "classify"\n[model]\nname = "{tmp_path}/model"\n'
        f'[data]\npath = "{tmp_path}/rows.jsonl"\neval_fraction = 0.1\n[partition]\nby = "site"\n'
    )
    done = data(tmp_path / "my.toml")
    assert done.exit_code == 0, done.output
    assert "text: film 1\nlabel: ⟦good⟧" in done.stdout
    table = done.stdout.partition("labels of the train rows\n\n")[2].splitlines()[:3]
    labels = silotune.check(tmp_path / "my.toml").rows["a"].labels
    good = labels.count("good") / len(labels)
    shares = ["a", f"{good:.0%}", f"{1 - good:.0%}"]
    assert [line.split() for line in table[1:]] == [shares, ["b", "-", "100%"]]
    assert table[0].split() == ["client", "good", "bad"]


def test_an_unknown_client_is_a_mistake(recipe):
    done = data(recipe, "--client", "hospital-7")
    assert done.exit_code == 2
    assert done.stderr.startswith("ConfigError: there is no client 'hospital-7'. Did you mean ")
    assert done.stdout == ""
