"""What a run reports as released, from what the server knows, and as not protected."""

import pytest

from silotune.core.atomic_files import write_json
from silotune.federation.ledger import lines, write_down
from silotune.federation.privacy_guarantee import FILE, NEIGHBOURS, promise_of
from silotune.federation.privacy_statement import privacy_lines, releases, statement
from silotune.federation.run_folder import RunFolder
from silotune.privacy.accountant import Steps, spent_in_all
from silotune.recipes.parse import parse

ROWS = {"east": 40, "west": 80}
RECORD = {"unit": "record", "noise_multiplier": 1.0, "delta": 1e-3}
SENT = {"noise_multiplier": 1.0, "sampling_rate": 0.2, "num_lots": 4}


def recipe(privacy=RECORD, **more):
    table = {
        "rounds": 3,
        "data": {"path": "medquad_mini"},
        "train": {"local_steps": 4},
        "runtime": {"name": "flower"},
        "evaluate": {"every": 0},
        "algorithm": {"weights": "uniform"},
        "privacy": privacy,
    }
    return parse({**table, **more})


def finished(tmp_path, rows, run=None) -> RunFolder:
    run = run or recipe()
    folder = RunFolder.create(tmp_path / "run", run)
    write_json(folder.path / FILE, promise_of(run, ROWS))
    folder.append_metrics({"event": "train", "round": 1, **row} for row in rows)
    return folder


@pytest.mark.parametrize(
    "status", ["timeout", "no answer", "refused", "training failed", "reply lost", "MemoryError"]
)
def test_a_message_without_a_usable_answer_may_have_been_a_release_and_counts(tmp_path, status):
    folder = finished(
        tmp_path,
        [
            {"client": "east", "status": "ok", **SENT},
            {"client": "west", "status": status, "place": "somewhere"},
        ],
    )
    found = statement(folder.run, folder)
    assert found is not None
    west = spent_in_all([Steps(1.0, 4, 8 / 80)], delta=1e-3)
    assert found["clients"]["west"]["num_released"] == 1
    assert found["clients"]["west"]["epsilon"]["pld"] == west.pld > 0
    assert found["clients"]["east"]["num_released"] == 1


@pytest.mark.parametrize("status", ["declined", "privacy budget spent", "not connected"])
def test_a_client_that_did_not_train_has_released_nothing(tmp_path, status):
    folder = finished(tmp_path, [{"client": "west", "status": status, "place": "somewhere"}])
    assert releases(folder) == []


def test_an_answer_that_came_late_counts_once(tmp_path):
    folder = finished(
        tmp_path,
        [
            {"client": "west", "status": "timeout", "place": "no answer within 1 s"},
            {"client": "west", "status": "late", "place": "its answer to round 1"},
        ],
    )
    assert [row["status"] for row in releases(folder)] == ["timeout"]


def test_the_clients_own_ledgers_count_if_they_are_available(tmp_path):
    """As in a rehearsal: they say what was released, so nothing is guessed after a failure."""
    folder = finished(tmp_path, [{"client": "west", "status": "timeout", "place": "somewhere"}])
    write_down(folder.client_folder("east") / "privacy.jsonl", {"round": 1, **SENT})
    assert [row["client"] for row in releases(folder)] == ["east"]


def test_what_is_not_protected_follows_from_where_the_noise_is(tmp_path):
    def statement_of(name, privacy, **more):
        folder = finished(tmp_path / name, [], recipe(privacy, **more))
        found = statement(folder.run, folder)
        assert found is not None
        return "\n".join(found["not_protected"])

    at_server = {**RECORD, "unit": "client"}
    simulated = {"runtime": {"name": "in-process"}, "evaluate": {"every": 1}}
    real = statement_of("a", RECORD)
    assert "losses" not in real, "real clients do not send them"
    assert "norms" not in real, "the changes already have their noise"
    assert "losses, norms" in statement_of("b", RECORD, **simulated)
    assert "norms of clients' changes" in statement_of("c", at_server)
    for text in (real, statement_of("d", at_server, **simulated)):
        assert "SHA-256 of all rows" in text
        assert "whether a client's rows made it fail" in text


def test_a_truncated_line_of_a_shared_ledger_counts_for_every_client(tmp_path):
    path = tmp_path / "privacy.jsonl"
    write_down(path, {"client": "east", "round": 1, **SENT})
    path.write_text(path.read_text() + '{"client": "west", "rou')
    complete, truncated = lines(path)
    assert (complete["client"], truncated.get("client")) == ("east", None)
    assert truncated["noise_multiplier"] == 1.0


WHOLE = {"unit": "client", "noise_multiplier": 5.0, "delta": 1e-3, "noise": "secure"}


@pytest.mark.parametrize(
    ("privacy", "key", "words"),
    [
        (WHOLE, "client, noise at the server", "never answers"),
        ({**WHOLE, "noise_at": "client"}, "client, noise at the client", "changes are zero"),
        (RECORD, "record", "one row added or removed; its number of rows is public"),
    ],
)
def test_every_statement_names_its_neighbours_in_the_words_of_one_place(
    privacy, key, words, tmp_path
):
    run = recipe(privacy)
    folder = finished(tmp_path, [], run)
    assert words in NEIGHBOURS[key]
    (line,) = [t for t in privacy_lines(statement(run, folder)) if t.startswith("neighbours: ")]
    assert line == f"neighbours: {NEIGHBOURS[key]}"


@pytest.mark.parametrize("noise", ["secure", "seeded"])
def test_seeded_lots_are_not_called_secret(noise):
    run = recipe({**RECORD, "noise": noise}, runtime={"name": "in-process"})
    sampling = promise_of(run, ROWS)["sampling"]
    assert ("revealed to nobody" in sampling) == (noise == "secure")
    assert ("from the recipe's seed" in sampling) == (noise == "seeded")
