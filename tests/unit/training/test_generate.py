"""Answers in batches: the same as one by one, and cut off where they end."""

import pytest
import torch

from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig
from silotune.models.loading import load_model
from silotune.training.generate import answer, answers, complete, encode, end_tokens, pad_left


@pytest.fixture(scope="module")
def loaded(tiny_model):
    found = load_model(
        ModelConfig(name=str(tiny_model), dtype="float32"),
        AdapterConfig(targets=("q_proj",)),
        seed=1,
        device="cpu",
    )
    with torch.no_grad():  # a random model repeats one token; a larger embedding makes it talk
        found.model.get_base_model().get_input_embeddings().weight.mul_(30)
    return found


PROMPTS = ["a", "What is flu?", "Why?", "x" * 40, "Is it contagious, and for how long?"]


def test_an_answer_does_not_depend_on_the_batch_it_is_in(loaded):
    ids = encode(loaded, PROMPTS)
    alone = complete(loaded, ids, max_new_tokens=12, batch_size=1)
    assert len({a.text for a in alone}) > 1, "the model must say different things"
    for batch_size in (2, 3, 16):
        assert complete(loaded, ids, max_new_tokens=12, batch_size=batch_size) == alone


def test_an_answer_is_that_of_a_plain_greedy_loop_without_cache_or_padding(loaded):
    for ids, got in zip(
        encode(loaded, PROMPTS),
        complete(loaded, encode(loaded, PROMPTS), max_new_tokens=6),
        strict=True,
    ):
        row, new = list(ids), []
        with torch.inference_mode():
            while len(new) < 6:
                token = int(loaded.model(input_ids=torch.tensor([row])).logits[0, -1].argmax())
                if token in end_tokens(loaded):
                    break
                new.append(token)
                row.append(token)
        assert got.text == loaded.tokenizer.decode(new, skip_special_tokens=True)
        assert (got.num_tokens, got.ended) == (len(new), len(new) < 6)


def test_what_follows_the_end_token_is_not_part_of_the_answer(loaded, monkeypatch):
    end, letter = loaded.tokenizer.eos_token_id, encode(loaded, ["b"])[0][0]
    said = torch.tensor([[letter, end, end, end], [letter, letter, letter, letter]])
    monkeypatch.setattr(
        loaded.model, "generate", lambda **kw: torch.cat([kw["input_ids"], said], dim=1)
    )
    short, long = complete(loaded, encode(loaded, ["a", "a"]), max_new_tokens=4)
    assert (short.text, short.num_tokens, short.ended) == ("b", 1, True)
    assert (long.text, long.num_tokens, long.ended) == ("bbbb", 4, False)


def test_a_conversation_is_asked_with_the_template_of_training(loaded):
    talk = ({"role": "user", "content": "What is flu?"},)
    text = "<|im_start|>user\nWhat is flu?<|im_end|>\n<|im_start|>assistant\n"
    (one,) = answers(loaded, [talk], max_new_tokens=5)
    assert [one] == complete(loaded, encode(loaded, [text]), max_new_tokens=5)
    assert answer(loaded, talk, max_new_tokens=5) == one.text.strip()


def test_padding_is_on_the_left_and_masked():
    ids, mask = pad_left([[5, 6, 7], [8]], pad=1)
    assert ids.tolist() == [[5, 6, 7], [1, 1, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_nothing_to_say_is_no_error(loaded):
    assert answers(loaded, [], max_new_tokens=3) == []
