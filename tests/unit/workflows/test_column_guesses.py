"""What columns may be, from names and values alone: spreadsheets as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silotune.core.errors import DataError
from silotune.workflows.column_guesses import describe_columns, guess_unknown

CITIES = ["Lyon", "Paris", "Nice"]


def table(num: int = 24, **columns) -> list[dict]:
    """Rows whose cells are functions of the row's number."""
    return [{name.replace("_", " "): make(i) for name, make in columns.items()} for i in range(num)]


def question(i: int) -> str:
    return f"Was hilft gegen Beschwerde {i}?"


def answer(i: int) -> str:
    return f"Bei Beschwerde {i} hilft Ruhe, viel trinken und {i} Tage warten."


@pytest.mark.parametrize(
    ("columns", "keys", "client"),
    [
        (
            {"Nr": int, "Klinik": lambda i: CITIES[i % 3], "Frage": question, "Antwort": answer},
            {"prompt": "{Frage}", "completion": "{Antwort}"},
            "Klinik",
        ),
        (  # the answer's column comes first: the names decide
            {"Réponse": answer, "Demande_du_client": question, "Service": lambda i: CITIES[i % 2]},
            {"prompt": "{Demande du client}", "completion": "{Réponse}"},
            "Service",
        ),
        (  # names that say nothing: the order decides
            {"A": question, "B": answer, "C": lambda i: CITIES[i % 3]},
            {"prompt": "{A}", "completion": "{B}"},
            "C",
        ),
        (  # a long text and its summary: the order decides, not the length
            {"Bericht": answer, "kurz": lambda i: f"Fall {i} kurz"},
            {"prompt": "{Bericht}", "completion": "{kurz}"},
            None,
        ),
        (  # of three texts, the two longest; numbers and dates are no texts
            {
                "Titel": lambda i: f"Fall {i}",
                "Anliegen": question,
                "am": lambda i: f"2026-01-{i + 1:02d} 10:00",
                "Lösung": answer,
            },
            {"prompt": "{Anliegen}", "completion": "{Lösung}"},
            None,
        ),
        (
            {"Commentaire": answer, "Catégorie": lambda i: ["bon", "mauvais"][i % 2]},
            {"text": "Commentaire", "label": "Catégorie"},
            None,
        ),
        (  # two groups: one is called like a client, so the other is the label
            {
                "Filiale": lambda i: CITIES[i % 3],
                "Nachricht": answer,
                "Art": lambda i: "ab"[i % 2],
            },
            {"text": "Nachricht", "label": "Art"},
            "Filiale",
        ),
        (  # numbers are labels if they are called so
            {"review text": answer, "rating": lambda i: i % 5 + 1, "id": int},
            {"text": "review text", "label": "rating"},
            None,
        ),
    ],
)
def test_columns_get_a_sensible_proposal(columns, keys, client):
    guess = guess_unknown(describe_columns(table(**columns)))
    assert guess.keys == keys
    assert guess.client == client
    assert guess.task == ("classify" if "label" in keys else "instruct")
    assert set(guess.reasons) == {*keys, "by"}


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"text": int}, "only one column"),
        ({"a": int, "b": int}, "no two columns look like"),
        ({"a": answer, "b": lambda i: f"W{i}"}, "no two columns look like"),
        ({"a.b": question, "c": answer}, "no two columns look like"),  # no {placeholder} for it
    ],
)
def test_columns_that_say_nothing_are_one_error(columns, said):
    with pytest.raises(DataError, match=said):
        guess_unknown(describe_columns(table(**columns)))


@pytest.mark.parametrize(
    ("columns", "keys", "client"),
    [
        ({"text": answer}, {}, None),
        ({"note": answer, "id": int, "url": lambda i: None}, {"text": "note"}, None),
        ({"text": answer, "clinic": lambda i: CITIES[i % 3]}, {}, "clinic"),
    ],
)
def test_a_text_beside_numbers_and_clients_is_learned_whole(columns, keys, client):
    guess = guess_unknown(describe_columns(table(**columns)))
    assert (guess.task, guess.keys, guess.client) == ("text", keys, client)


def test_reasons_hold_no_value_of_a_row():
    columns = {"Frage": lambda i: f"Geheim {i} ja?", "Antwort": lambda i: f"Geheim {i} nein."}
    guess = guess_unknown(describe_columns(table(**columns, Klinik=lambda i: f"Geheim{i % 2}")))
    assert "Geheim" not in repr(guess)


cells = st.none() | st.text(max_size=30) | st.integers() | st.floats() | st.lists(st.integers())


@given(st.lists(st.dictionaries(st.text(max_size=8), cells, max_size=4), max_size=12))
def test_whatever_the_cells_are_there_is_a_guess_or_one_error(rows):
    try:
        first = guess_unknown(describe_columns(rows))
    except DataError:
        return
    assert first == guess_unknown(describe_columns(rows))
    assert first.client not in first.keys.values()
