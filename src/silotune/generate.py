"""Answers of a model: greedy, with the template it was trained with."""

from typing import Any

import torch

from silotune.models import LoadedModel
from silotune.rows import Conversation
from silotune.tasks.instruct import render


def answer(loaded: LoadedModel, messages: Conversation, *, max_new_tokens: int) -> str:
    """Let the model speak after `messages`, choosing the likeliest token each time.

    Args:
        loaded: The model as it stands; nothing is changed.
        messages: A conversation that ends with the user.
        max_new_tokens: Where an answer that does not end by itself is cut.
    """
    tokenizer = loaded.tokenizer
    prompt = render(tokenizer, messages, ask=True)
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    ids = ids.to(loaded.device)
    with torch.inference_mode():
        out = loaded.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=end_tokens(loaded),
            pad_token_id=tokenizer.eos_token_id,
            top_p=None,
            top_k=None,
            temperature=None,
        )
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return str(text).strip()


def end_tokens(loaded: LoadedModel) -> list[int]:
    """The token that training taught as the end, and those that the base itself ends with."""
    own: Any = loaded.model.generation_config.eos_token_id
    base = own if isinstance(own, list) else [own]
    return sorted({loaded.tokenizer.eos_token_id, *(token for token in base if token is not None)})
