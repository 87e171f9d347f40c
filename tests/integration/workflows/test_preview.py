"""A preview counts what training will do, and its numbers contain no text."""

import json
import shutil
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

import silotune
from silotune.core.errors import ConfigError, ModelError
from silotune.data.chat_templates import render
from silotune.data.partition import PartitionConfig
from silotune.models.loading import num_base_loads
from silotune.recipes.parse import load_recipe, parse
from silotune.training.tasks.base import Prepared, Task
from silotune.training.tasks.classify import classify
from silotune.training.tasks.instruct import INSTRUCT
from silotune.workflows.preview import (
    data_warnings,
    describe_partition,
    describe_rows,
    measure,
    name_counts,
    sample,
)
from tests.conftest import build_tiny_model, build_tokenizer, write_jsonl, write_tiny_recipe
from tests.tiny_encoders import build_encoder_tokenizer, build_tiny_encoder
from tests.unit.data.client_rows import by_name, client, talk, text

LABELS = classify(("no", "yes"))


# --- lengths ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "num_cut", "num_dropped", "share"),
    [
        (26, 0, 0, 3 / 25),
        (25, 0, 0, 3 / 25),
        (24, 1, 0, 3 / 24),  # only the line break behind the end token is lost
        (22, 1, 0, 1 / 22),
        (21, 1, 1, 0.0),
    ],
)
def test_a_row_is_truncated_and_then_dropped_once_its_answer_is_gone(
    tokenizer, limit, num_cut, num_dropped, share
):
    # <start> user \n a b <end> \n: 10 tokens; <start> assistant \n: 11; c d <end> \n: 4
    found = measure([talk("ab", "cd")], tokenizer, INSTRUCT, limit)
    assert found.tokens == dict.fromkeys(("p5", "p25", "p50", "p75", "p95", "max"), 25.0)
    assert (found.num_cut, found.num_dropped) == (num_cut, num_dropped)
    assert found.trained_share == pytest.approx(share)


talks = st.lists(
    st.lists(st.text("abé ?", min_size=1, max_size=12).filter(str.strip), min_size=2, max_size=4),
    min_size=1,
    max_size=5,
)


@given(texts=talks, limit=st.integers(5, 120))
def test_counts_are_those_of_the_rows_that_training_prepares(tokenizer, texts, limit):
    rows = [talk(*turns) for turns in texts]
    used = INSTRUCT.prepare(rows, tokenizer, limit)
    found = measure(rows, tokenizer, INSTRUCT, limit)
    assert (found.num_cut, found.num_dropped) == (used.num_cut, used.num_dropped)
    assert found.tokens["max"] == max(INSTRUCT.num_tokens(rows, tokenizer))
    num_read = sum(len(e.ids) for e in used.examples)
    num_trained = sum(int(e.trained.sum()) for e in used.examples)
    assert found.trained_share == (num_trained / num_read if num_read else 0)


def test_every_row_and_every_prompt_is_tokenised_once(tokenizer):
    class Counting:
        num_texts = 0

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, texts, *args, **options):
            self.num_texts += len(texts)
            return tokenizer(texts, *args, **options)

    counting = Counting()
    north = client("north", [talk("a?", "b"), talk("c?", "d")])
    describe_rows(by_name(north, client("south", [talk("e?", "f")])), counting, INSTRUCT, 30)
    rows = 3 + 2  # three train rows, and one held-out row each
    assert counting.num_texts == 2 * rows, "each with its prompt, which must keep its ids"


def test_rows_that_teach_nothing_even_untruncated_still_have_lengths():
    silent = Task(
        prepare=lambda rows, tokenizer, limit: Prepared((), 0, len(rows)),
        collate=INSTRUCT.collate,
        loss=INSTRUCT.loss,
        num_tokens=lambda rows, tokenizer: [3, 5],
    )
    found = measure([talk("a", "b"), talk("c", "d")], None, silent, 4)
    assert (found.tokens["p50"], found.num_cut, found.num_dropped) == (4.0, 1, 2)
    assert found.trained_share == 0


def test_lengths_and_truncation_of_labelled_texts_are_counted_without_a_mask():
    rows = [text("ab"), text("abcdef", "yes")]  # and [CLS], [SEP]: 4 and 8
    found = measure(rows, build_encoder_tokenizer(), LABELS, 4)
    assert (found.tokens["p50"], found.tokens["max"]) == (6.0, 8.0)
    assert (found.num_cut, found.num_dropped, found.trained_share) == (1, 0, None)


# --- rows as text -----------------------------------------------------------------------------


def test_a_sample_is_the_rendered_row_with_its_answers_marked(tokenizer):
    row = talk("Why?", "So.", "And?", "No.")
    found = sample(row, tokenizer, INSTRUCT, 500, client="north", number=2)
    assert "".join(piece for _, piece in found.pieces) == render(tokenizer, row, ask=False)
    learned = [piece for kind, piece in found.pieces if kind == "learned"]
    assert learned == ["So.<|im_end|>", "No.<|im_end|>"]
    assert (found.client, found.row, found.num_tokens) == ("north", 2, 2 * (12 + 16))


@given(limit=st.integers(1, 70))
def test_a_sample_ends_where_training_cuts_the_row(tokenizer, limit):
    row = talk("Why?", "So.", "And?", "No.")
    whole = INSTRUCT.prepare([row], tokenizer, 500).examples[0]
    pieces = sample(row, tokenizer, INSTRUCT, limit, client="north", number=1).pieces
    seen = "".join(piece for kind, piece in pieces if kind != "cut")
    learned = "".join(piece for kind, piece in pieces if kind == "learned")
    assert seen == tokenizer.decode(whole.ids[:limit])
    assert learned == tokenizer.decode(whole.ids[:limit][whole.trained[:limit]])


def test_a_sample_of_a_pair_shows_both_texts_and_its_label():
    row = text("It rains.", "yes", text_pair="It is wet.")
    found = sample(row, build_encoder_tokenizer(), LABELS, 10, client="north", number=1)
    assert found.pieces == (
        ("read", "text: It rains.\npair: It is wet.\nlabel: "),
        ("learned", "yes"),
    )
    assert found.num_tokens == len("It rains.It is wet.") + 3


# --- words ------------------------------------------------------------------------------------

KINDS = get_args(get_args(PartitionConfig.model_fields["kind"].annotation)[0])
PARTITIONS = {
    "iid": {"num_clients": 2},
    "dirichlet": {"num_clients": 2, "alpha": 0.3, "label": "qtype"},
    "length": {"num_clients": 2},
    "cluster": {"num_clients": 2},
    "flwr-datasets": {"partitioner": "ShardPartitioner"},
}


def words_of(path="medquad_mini", **partition) -> str:
    return describe_partition(parse({"rounds": 1, "data": {"path": path}, "partition": partition}))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_partition_has_words_and_names_its_seed(kind):
    words = words_of(kind=kind, **PARTITIONS[kind])
    assert kind in words
    assert words.endswith(", seed 17")


def test_a_split_by_column_names_the_column_and_files_have_other_words(tmp_path):
    assert words_of(by="source") == "one client for each value of column 'source'"
    assert words_of(by="source", only=["GARD"]).endswith("'source', of which only 'GARD'")
    assert words_of(str(tmp_path)) == "one file for each client"
    (tmp_path / "north.toml").touch()
    assert words_of(str(tmp_path)) == "one configuration file for each client"
    dirichlet = words_of(kind="dirichlet", **PARTITIONS["dirichlet"])
    assert "column 'qtype'" in dirichlet
    assert "alpha 0.3" in dirichlet


def test_leaks_and_rows_without_answers_are_warnings(tokenizer):
    rows = by_name(
        client("north", [talk("a?", "b")], [talk("a?", "b")]),
        client("south", [talk("c" * 90, "d"), talk("e?", "f")], [talk("g" * 90, "h")]),
    )
    warnings = data_warnings(describe_rows(rows, tokenizer, INSTRUCT, 60), 60)
    assert len(warnings) == 3
    assert warnings[0].startswith("some held-out rows are also train rows, which inflates scores: ")
    assert "inflates scores: north 1;" in warnings[0]
    assert warnings[1].startswith("south: 2 rows truncated to train.max_length")
    assert "2 of them left out because none of the answer remains" in warnings[1]
    assert warnings[2].startswith(
        "client 'south': no held-out row has an answer within 60 tokens, so a run will refuse"
    )
    fine = by_name(client("north", [talk("a?", "b" * 60)]))  # cut, and some of its answer is left
    assert data_warnings(describe_rows(fine, tokenizer, INSTRUCT, 60), 60) == []


def test_a_leak_from_another_client_is_a_warning_too(tokenizer):
    same = [talk("a?", "b")]
    rows = by_name(client("north", same), client("south", [talk("c?", "d")], same))
    (warning,) = data_warnings(describe_rows(rows, tokenizer, INSTRUCT, 60), 60)
    assert "inflates scores: south 1;" in warning


def test_of_many_clients_the_largest_counts_are_named(tokenizer):
    rows = by_name(*(client(f"c{n}", [talk("a?", "b")] * (n + 1)) for n in range(7)))
    clients = describe_rows(rows, tokenizer, INSTRUCT, 60)
    assert name_counts(clients, lambda own: own.duplicates.num_repeated, most=2) == (
        "c6 6, c5 5 and 4 more clients"
    )
    assert name_counts(clients, lambda own: own.duplicates.num_leaked) == ""


# --- the entire preview -----------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path, tiny_model):
    return write_tiny_recipe(tmp_path, tiny_model)


def test_a_preview_loads_no_model_and_holds_no_text_among_its_numbers(recipe):
    before = num_base_loads()
    found = silotune.preview(recipe, ["train.max_length=64"], num_samples=2, client="hospital-1")
    assert num_base_loads() == before
    assert [(s.client, s.row) for s in found.samples] == [("hospital-1", 1), ("hospital-1", 2)]
    numbers = json.loads(json.dumps(found.numbers()))
    assert list(numbers["clients"]) == ["hospital-0", "hospital-1", "hospital-2"]
    assert numbers["max_length"] == 64
    for name, own in silotune.check(load_recipe(recipe)).rows.items():
        told = numbers["clients"][name]
        assert (told["num_train"], told["num_eval"]) == (len(own.train), len(own.evaluation))
        for turn in (turn for row in own.train + own.evaluation for turn in row):
            assert turn["content"] not in json.dumps(numbers)


def test_a_run_and_its_preview_agree_on_lengths_and_labels(recipe):
    from silotune.workflows.data_overview import describe_split

    numbers = silotune.preview(recipe, ["data.label=source"]).numbers()["clients"]
    rows = silotune.check(recipe, ["data.label=source"]).rows
    for name, own in describe_split(rows, build_tokenizer(), INSTRUCT).items():
        mine = numbers[name]
        assert own == {
            "num_train": mine["num_train"],
            "num_eval": mine["num_eval"],
            "tokens": mine["train"]["tokens"],
            "labels": mine["labels"],
        }


def test_an_unknown_client_offers_the_nearest(recipe):
    with pytest.raises(ConfigError) as caught:
        silotune.preview(recipe, client="hospitl-1")
    assert str(caught.value) == (
        "there is no client 'hospitl-1'. Did you mean 'hospital-1'?\n"
        "  The clients are 'hospital-0', 'hospital-1', 'hospital-2'."
    )


def test_a_base_without_a_chat_template_is_a_warning(tmp_path, recipe):
    bare = build_tiny_model(tmp_path / "bare", template=None)
    found = silotune.preview(recipe, [f"model.name={bare}"], num_samples=1)
    assert found.warnings == [f"{bare} has no chat template: the plain one is used"]
    assert found.samples[0].pieces[0][1].startswith("### User:\n")


def test_rows_of_the_server_are_counted(tmp_path, recipe):
    own = write_jsonl(tmp_path / "own.jsonl", [{"question": "What is a0?", "answer": "It is a0."}])
    found = silotune.preview(recipe, ["server.work=fine-tune", f"server.data_path={own}"])
    assert found.num_server == 1
    same = found.clients["hospital-0"].duplicates
    assert same.num_elsewhere + same.num_leaked == 1


# --- the base's files


def damaged(tiny_model: Path, folder: Path) -> Path:
    base = Path(shutil.copytree(tiny_model, folder / "base"))
    (base / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    return base


def test_a_damaged_base_is_found_without_loading_it(recipe, tiny_model, tmp_path):
    """Regression: only a run found it, by a traceback."""
    with pytest.raises(ModelError, match=r"'model.safetensors' is a Git LFS pointer"):
        silotune.preview(recipe, [f"model.name={damaged(tiny_model, tmp_path)}"])


def test_an_encoder_is_refused_before_its_rows_are_read_as_questions(recipe, tmp_path):
    base = build_tiny_encoder(tmp_path / "bert", kind="AutoModelForMaskedLM")
    with pytest.raises(ModelError, match="reads in both directions"):
        silotune.preview(recipe, [f"model.name={base}"])


def test_a_base_without_weights_is_said_not_to_have_been_examined(recipe, tiny_model, tmp_path):
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    (base / "model.safetensors").unlink()
    (warning,) = silotune.preview(recipe, [f"model.name={base}"]).warnings
    assert warning.endswith("are not on this machine, so they were not examined")


def test_a_client_examines_its_base_before_it_takes_part(recipe, tiny_model, tmp_path):
    from silotune.deployment.doctor import _guarded, _model

    run = load_recipe(recipe, [f"model.name={damaged(tiny_model, tmp_path)}"])
    (finding,) = _guarded("model", lambda: _model(None, run, None))
    assert (finding.verdict, finding.what) == ("FAIL", "model")
    assert "Git LFS pointer" in finding.text
    assert "git lfs pull" in finding.fix
