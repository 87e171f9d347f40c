"""Short ways to write rows of clients."""

from silotune.data.clients import ClientRows


def talk(*texts: str):
    roles = ["user", "assistant"] * len(texts)
    return tuple({"role": r, "content": t} for r, t in zip(roles, texts, strict=False))


def text(words: str, label: str = "no", **pair: str):
    return {"text": words, "label": label, **pair}


def client(name: str, train, held_out=None) -> ClientRows:
    return ClientRows(name, tuple(train), tuple(held_out or [talk(f"only {name}?", "yes")]))


def by_name(*clients: ClientRows) -> dict[str, ClientRows]:
    return {own.name: own for own in clients}
