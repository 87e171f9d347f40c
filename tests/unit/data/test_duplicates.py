"""What counts as the same row, and where it occurs a second time."""

from hypothesis import given
from hypothesis import strategies as st

from silotune.data.client_rows import ClientRows
from silotune.data.duplicates import Duplicates, find_duplicates
from tests.unit.data.client_rows import by_name, client, talk, text


def test_duplicates_are_counted_by_where_the_other_row_is():
    scurvy, flu, other = talk("Scurvy?", "C."), talk("Flu?", "A virus."), talk("Flu?", "Rest.")
    rows = by_name(
        client("north", [scurvy, scurvy, flu], [scurvy, talk("Gout?", "Acid.")]),
        client("south", [other, scurvy], [flu]),
        client("west", [talk("Rash?", "Itch.")]),
    )
    found = find_duplicates(rows)
    assert found["north"] == Duplicates(
        num_repeated=1,
        num_elsewhere=2,
        num_leaked_own=1,
        num_leaked=1,
        num_other_answer=1,
        num_eval_other_answer=0,
    )
    assert found["south"] == Duplicates(
        num_repeated=0,
        num_elsewhere=1,
        num_leaked_own=0,
        num_leaked=1,
        num_other_answer=1,
        num_eval_other_answer=1,
    )
    assert found["west"] == Duplicates(0, 0, 0, 0, 0, 0)


def test_the_servers_rows_are_trained_on_too():
    rows = by_name(client("north", [talk("a?", "b")], [talk("c?", "d"), talk("e?", "f")]))
    found = find_duplicates(rows, [talk("c?", "d"), talk("a?", "b"), talk("e?", "no")])["north"]
    assert found == Duplicates(0, 1, 0, 1, 0, 1)


def test_rows_of_two_formats_with_the_same_texts_are_equal():
    question, answer = talk("a\n\nb", "c")
    apart = ({**question, "instruction": "a", "input": "b"}, answer)
    rows = by_name(client("north", [(question, answer), apart]))
    assert find_duplicates(rows)["north"].num_repeated == 1


def test_a_text_with_two_labels_is_a_question_with_two_answers():
    rows = by_name(
        client("north", [text("good"), text("good", "yes")], [text("good"), text("bad")]),
        client("pairs", [text("x", text_pair="y")], [text("x", "yes", text_pair="z")]),
    )
    found = find_duplicates(rows)
    assert found["north"] == Duplicates(0, 0, 1, 1, 2, 1)
    assert found["pairs"] == Duplicates(0, 0, 0, 0, 0, 0), "another pair is another question"


tiny_talks = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz")), max_size=4)
parts = st.tuples(tiny_talks.filter(bool), tiny_talks.filter(bool))


@given(clients=st.dictionaries(st.sampled_from(["e", "n", "s"]), parts, min_size=1))
def test_duplicates_are_those_of_comparing_every_row_with_every_other(clients):
    rows = {
        name: ClientRows(name, *(tuple(talk(*row) for row in part) for part in both))
        for name, both in clients.items()
    }
    found = find_duplicates(rows)
    for name, (train, held_out) in clients.items():
        others = [row for other, (own, _) in clients.items() if other != name for row in own]
        everyone = [*train, *others]

        def contested(part, everyone=everyone):
            return sum(any(q == p and a != b for q, a in everyone) for p, b in part)

        assert found[name] == Duplicates(
            num_repeated=sum(row in train[:n] for n, row in enumerate(train)),
            num_elsewhere=sum(row in others for row in train),
            num_leaked_own=sum(row in train for row in held_out),
            num_leaked=sum(row in everyone for row in held_out),
            num_other_answer=contested(train),
            num_eval_other_answer=contested(held_out),
        )
