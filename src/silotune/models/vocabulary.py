"""Whether a model has a row of its embedding for every token that its tokenizer makes."""

from collections.abc import Iterable
from typing import Any

from silotune.core.errors import DataError, ModelError
from silotune.core.safe_text import one_line
from silotune.core.wording import counted

ROLES = ("bos_token", "eos_token", "pad_token", "cls_token", "sep_token", "unk_token")
"""Tokens that a tokenizer writes by itself."""


def check_tokens(ids: Iterable[int], model: Any, tokenizer: Any, where: str) -> None:
    """Refuse a text with a token that the model has no embedding for.

    Such tokens may be in a tokenizer, see `check_vocabulary`, and a text may hold one all the same.

    Args:
        ids: The text's tokens.
        model: The model; only its input embedding is looked at.
        tokenizer: Its tokenizer.
        where: The text's place, for messages.

    Raises:
        DataError: Names the token.
    """
    num_rows = model.get_input_embeddings().weight.shape[0]
    if (most := max(ids, default=0)) >= num_rows:
        token = one_line(str(tokenizer.convert_ids_to_tokens(most)), longest=40)
        raise DataError(
            f"{where}: the text contains the tokenizer's token '{token}', for which the model has "
            "no row in its embedding.\n"
            "  Remove it from the text, or resize the embedding in transformers "
            "(resize_token_embeddings, then save_pretrained)."
        )


def check_vocabulary(tokenizer: Any, num_rows: int, what: str) -> None:
    """Refuse a tokenizer whose tokens the model does not know.

    Some published models have added tokens beyond their embedding that no text ever uses (Gemma 3
    has one for images), so only tokens that texts do use are counted: those of the vocabulary, of
    the chat template, and those that the tokenizer writes by itself.

    Args:
        tokenizer: With its chat template, if it has one.
        num_rows: Rows of the model's input embedding.
        what: The setting and its value, for messages.

    Raises:
        ModelError: Says how many tokens either side has.
    """
    known: dict[str, int] = tokenizer.get_vocab()
    beyond = [token for token, number in known.items() if number >= num_rows]
    if not beyond:
        return
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    written = {getattr(tokenizer, role, None) for role in ROLES}
    template = str(tokenizer.chat_template or "")
    needed = [t for t in beyond if t not in added or t in written or t in template]
    if needed:
        first = min(needed, key=known.__getitem__)
        raise ModelError(
            f"{what}: the tokenizer has {counted(max(known.values()) + 1, 'token')}, but the "
            f"model's embedding has {counted(num_rows, 'row')}; the first token without a row is "
            f"'{one_line(first, longest=40)}'.\n"
            "  Resize the embedding in transformers (resize_token_embeddings, then "
            "save_pretrained), or use the model's original tokenizer."
        )
