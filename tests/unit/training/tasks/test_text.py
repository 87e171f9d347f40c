"""Whole texts: what is learned of them, and the loss of transformers as the oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.core.errors import DataError, EmptyRowError
from silotune.data.conversations import plain_text
from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig
from silotune.models.loading import load_model
from silotune.training.tasks.template_warnings import control_warnings
from silotune.training.tasks.text import TEXT, prepare
from silotune.workflows.preview import sample
from tests.chat_templates import tokenizer_for
from tests.conftest import build_tiny_model, build_tokenizer


def text(words):
    return (plain_text({"text": words}, where="rows.jsonl:1", column="text"),)


TOKENIZERS = {
    "bos": lambda: tokenizer_for(None, "</s>", "<s>", begins=True),
    "no bos": lambda: tokenizer_for(None, "<|endoftext|>"),
    "a chat model": build_tokenizer,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(words=st.text(alphabet="ab é\n", min_size=1, max_size=20).filter(str.strip))
@settings(max_examples=20, deadline=None)
def test_ids_are_those_that_trl_makes_of_a_row_with_a_text(kind, words):
    tokenizer = TOKENIZERS[kind]()
    eos = tokenizer.eos_token
    expected = tokenizer(words + eos)["input_ids"]  # SFTTrainer: add_eos, then the tokenizer
    for given_text in (words, words + eos):
        (example,) = prepare([text(given_text)], tokenizer, 512).examples
        assert example.ids.tolist() == expected
        assert example.trained.tolist() == [False] + [True] * (len(expected) - 1)
    assert expected[-1] == tokenizer.eos_token_id
    assert (expected[0] == tokenizer.bos_token_id) == (kind == "bos")


def test_a_tokenizer_that_ends_texts_itself_gets_no_second_end():
    from tokenizers import processors

    tokenizer = tokenizer_for(None, "</s>", "<s>")
    end = [("</s>", tokenizer.eos_token_id)]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=end
    )
    (example,) = prepare([text("ab")], tokenizer, 512).examples
    assert example.ids.tolist() == tokenizer("ab")["input_ids"]
    assert example.ids.tolist().count(tokenizer.eos_token_id) == 1


def test_the_loss_is_that_of_transformers_padded_and_packed(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = build_tiny_model(tmp_path / "tiny")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    base, adapter = ModelConfig(name=str(folder), dtype="float32"), AdapterConfig(kind="full")
    loaded = load_model(base, adapter, seed=0, device="cpu")
    tokenizer = loaded.tokenizer
    rows = [text("One note."), text("Another, longer note about é."), text("No.")]
    examples = prepare(rows, tokenizer, 512).examples
    expected = 0.0
    with torch.inference_mode():
        for example in examples:
            ids = example.ids[None]
            expected += float(model(input_ids=ids, labels=ids).loss) * (ids.numel() - 1)
        for batch in (TEXT.collate(examples), TEXT.pack(examples)):
            assert float(TEXT.loss(loaded, batch).loss_sum) == pytest.approx(expected, rel=1e-5)
            assert batch.num_trained == sum(e.ids.numel() - 1 for e in examples)


def test_long_texts_are_truncated_and_counted():
    tokenizer = build_tokenizer()
    found = prepare([text("abcdefgh"), text("ab")], tokenizer, 4)
    assert [e.ids.numel() for e in found.examples] == [4, 3]
    assert (found.num_cut, found.num_dropped) == (1, 0)
    assert TEXT.num_tokens([text("abcdefgh")], tokenizer) == [9]
    shown = sample(text("abcdefgh"), tokenizer, TEXT, 4, client="a", number=1)
    assert (shown.num_tokens, shown.pieces[0]) == (9, ("learned", "abcd"))
    assert shown.pieces[1][0] == "cut"


def test_control_tokens_in_a_text_are_told():
    tokenizer = build_tokenizer()
    (told,) = control_warnings(tokenizer, [text("a<|im_end|>b"), text("ab")])
    assert told.startswith("1 row contains control tokens")


@pytest.mark.parametrize("row", [{"text": ""}, {"text": None}])
def test_an_empty_text_is_a_row_that_can_be_skipped(row):
    with pytest.raises(EmptyRowError, match=r"rows\.jsonl:1: column 'text'"):
        plain_text(row, where="rows.jsonl:1", column="text")


def test_a_column_that_does_not_exist_is_named():
    with pytest.raises(DataError, match=r"(?s)no column 'text'.*Did you mean 'Text'.*data\.text"):
        plain_text({"Text": "SECRET"}, where="rows.jsonl:1", column="text")
