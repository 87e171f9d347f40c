"""`silotune new`: from a spreadsheet to a recipe that passes the check, or to one error."""

import csv
import tomllib

import pytest
from typer.testing import CliRunner

import silotune
from silotune.cli import app
from silotune.core.errors import ConfigError, DataError
from tests.conftest import hospital_rows, write_jsonl


@pytest.fixture(autouse=True)
def _without_models(tmp_path, monkeypatch):
    """No tokenizer is at hand, and nothing is fetched for a proposal."""
    monkeypatch.setenv("SILOTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def write_csv(path, header, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def german(tmp_path, num=30):
    rows = [
        [n, ["Süd", "Nord"][n % 2], f"Was tun bei Fall {n}?", f"Bei Fall {n} hilft viel Ruhe."]
        for n in range(num)
    ]
    return write_csv(tmp_path / "fälle.csv", ["Nr", "Klinik", "Frage", "Antwort"], rows)


def test_a_spreadsheet_becomes_a_recipe_that_passes_the_check(tmp_path):
    german(tmp_path)
    made = silotune.new("fälle.csv")
    assert made.path.name == "fälle.toml"
    assert made.path.read_text("utf-8") == made.text
    table = tomllib.loads(made.text)
    assert table["data"] == {
        "path": "fälle.csv",
        "prompt": "{Frage}",
        "completion": "{Antwort}",
    }
    assert table["partition"] == {"by": "Klinik"}
    assert set(silotune.check(made.path).rows) == {"Süd", "Nord"}
    assert len(made.guesses) == 3
    assert all("guess: " in text for text in made.guesses)
    assert made.num_rows == 30
    assert len(made.samples) == 3
    learned = [text for kind, text in made.samples[0].pieces if kind == "learned"]
    assert len(learned) == 1
    assert learned[0].endswith("hilft viel Ruhe.")


def test_an_existing_recipe_is_never_overwritten(tmp_path):
    german(tmp_path)
    made = silotune.new("fälle.csv")
    with pytest.raises(ConfigError, match="already exists and is not overwritten"):
        silotune.new("fälle.csv")
    assert made.path.read_text("utf-8") == made.text
    assert silotune.new("fälle.csv", out="other.toml").text == made.text


@pytest.mark.parametrize("layout", ["one file", "train and eval", "a file per client"])
def test_known_columns_need_no_guess_of_their_meaning(tmp_path, layout):
    rows = hospital_rows()
    place = tmp_path / "rows"
    place.mkdir()
    if layout == "a file per client":
        for name in ("north", "south"):
            write_jsonl(place / f"{name}.jsonl", rows)
    else:
        write_jsonl(place / "train.jsonl", rows)
    if layout == "train and eval":
        write_jsonl(place / "eval.jsonl", rows)
    given = place / "train.jsonl" if layout == "one file" else place
    made = silotune.new(given)
    table = tomllib.loads(made.text)
    assert set(table["data"]) == {"path"}
    assert table.get("partition") == (None if "per client" in layout else {"by": "source"})
    found = {"north", "south"} if "per client" in layout else {f"hospital-{n}" for n in range(3)}
    assert set(silotune.check(made.path).rows) == found


def test_a_client_with_too_few_rows_makes_it_deal_rows_out(tmp_path):
    """The column looks like clients, but one of them has a single row."""
    cities = [*("Lyon", "Paris") * 12, "Nice"]
    rows = [
        [city, f"Que faire au cas {n} ?", f"Au cas {n}, du repos."] for n, city in enumerate(cities)
    ]
    write_csv(tmp_path / "cas.csv", ["Hôpital", "Question", "Réponse"], rows)
    made = silotune.new("cas.csv")
    assert tomllib.loads(made.text)["partition"] == {"kind": "iid", "num_clients": 2}
    assert "'Hôpital' gives a client too few rows" in made.text


def test_missing_answers_are_skipped_and_said(tmp_path):
    rows = [[f"Was tun bei {n} ?", f"Bei {n} hilft Ruhe." if n % 7 else ""] for n in range(28)]
    write_csv(tmp_path / "x.csv", ["Frage", "Antwort"], rows)
    table = tomllib.loads(silotune.new("x.csv").text)
    assert table["data"]["skip_empty"] is True


def test_clients_whose_names_differ_in_capitals_only_are_said_at_once(tmp_path):
    """They were one clinic, and only `check` said so."""
    rows = [
        [["Nord", "Süd", "süd"][n % 3], f"Was tun bei {n}?", f"Bei {n} hilft Ruhe."]
        for n in range(30)
    ]
    write_csv(tmp_path / "x.csv", ["Klinik", "Frage", "Antwort"], rows)
    done = CliRunner().invoke(app, ["new", "x.csv"])
    assert "warning: clients 'Süd' and 'süd' differ in capitals" in done.output


def test_texts_and_labels_become_a_classification(tmp_path):
    rows = [[f"Das war Fall {n} und gut.", ["ja", "nein"][n % 2]] for n in range(24)]
    write_csv(tmp_path / "x.csv", ["Bewertungstext", "Klasse"], rows)
    made = silotune.new("x.csv")
    table = tomllib.loads(made.text)
    assert table["task"] == "classify"
    assert (table["data"]["text"], table["data"]["label"]) == ("Bewertungstext", "Klasse")
    checked = silotune.check(made.path)
    assert checked.run.data.labels == ("ja", "nein")
    assert made.samples[0].pieces[-1][1] in ("ja", "nein")


def test_rows_with_tools_get_a_recipe_that_says_what_model_they_need(tmp_path):
    """Bug: the recipe was written, and the command ended with an error about its first row."""
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    talk = [{"role": "user", "content": "Why?"}, call, {"role": "tool", "content": "4"}]
    rows = [{"messages": [*talk, {"role": "assistant", "content": f"So {n}."}]} for n in range(9)]
    made = silotune.new(write_jsonl(tmp_path / "calls.jsonl", rows))
    assert "its chat template writes no tools" in made.text
    assert '"name": "f"' in "".join(piece for _, piece in made.samples[0].pieces)


def test_what_is_wrong_with_the_rows_is_said_and_not_guessed_around(tmp_path):
    """Bugs: "too few rows: 0" for R's write.table, "only one column" for messages that are bad."""
    table = tmp_path / "table.csv"
    table.write_text('"question" "answer"\n' + '"1" "Why?" "So."\n' * 9, encoding="utf-8")
    with pytest.raises(DataError, match=r"table\.csv:\d"):
        silotune.new(table)
    turns = [{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}]
    rows = write_jsonl(tmp_path / "chat.jsonl", [{"messages": turns}] * 9)
    with pytest.raises(DataError, match=r"chat\.jsonl:1: .*message 2 has an unknown role"):
        silotune.new(rows)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the file has no rows"),
        ("Frage,Antwort\n", "the file has no rows"),
        ("text\n" + "12\n" * 9, "there is only one column"),
        ("question,answer\nWas ist das?,Das da.\n", "too few rows: 1"),
    ],
)
def test_what_holds_too_little_is_one_error(tmp_path, text, said):
    (tmp_path / "x.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        silotune.new("x.csv")
    assert not (tmp_path / "x.toml").exists()


def test_hostile_column_names_stay_inside_their_comments(tmp_path):
    names = ["q\nrounds = 9 #", 'a"\\b', "x\x1b[2J"]
    rows = [[f"Was ist {n} ?", f"Das ist {n} .", "ab"[n % 2]] for n in range(24)]
    write_csv(tmp_path / "x.csv", names, rows)
    made = silotune.new("x.csv")
    assert tomllib.loads(made.text)["rounds"] == 3
    assert "\x1b" not in made.text
    assert silotune.check(made.path).rows


def test_the_command_says_its_guesses_and_what_comes_next(tmp_path):
    german(tmp_path)
    done = CliRunner().invoke(app, ["new", "fälle.csv"])
    assert done.exit_code == 0, done.output
    assert "fälle.toml: a recipe for 30 rows" in done.output
    assert "shown in a plain template" in done.output
    assert done.output.count("train row ") == 3
    assert done.output.splitlines()[-1].startswith("read the recipe, then: silotune data ")
    again = CliRunner().invoke(app, ["new", "fälle.csv"])
    assert again.exit_code == 2
