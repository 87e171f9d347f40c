"""A value in a file has the type that its field says: nothing is converted to fit."""

import pytest
from pydantic import ValidationError

from silotune.core.errors import ConfigError
from silotune.core.types import Config
from silotune.deployment.consortium.folder import About
from silotune.federation.client_config import ClientConfig
from silotune.recipes.parse import parse


class Example(Config):
    count: int = 0
    share: float | None = None
    switch: bool = False
    names: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    either: bool | int = 0


GOOD = [
    *({"count": 3}, {"share": 1}, {"share": 0.5}, {"share": None}, {"switch": True}),
    *({"names": ["a", "1"]}, {"sizes": [1, 2]}, {"either": True}, {"either": 2}),
]
BAD = [
    *({"count": True}, {"count": "3"}, {"share": False}, {"share": "0.5"}, {"switch": 1}),
    *({"switch": "true"}, {"sizes": [1, True]}, {"sizes": ["1"]}, {"names": [True]}),
]


@pytest.mark.parametrize("table", GOOD, ids=str)
def test_a_value_of_the_right_type_is_taken(table):
    Example.model_validate(table)


@pytest.mark.parametrize("table", BAD, ids=str)
def test_a_value_of_another_type_is_refused(table):
    with pytest.raises(ValidationError):
        Example.model_validate(table)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("server", "lr", True),
        ("compare", "max_new_tokens", False),
        ("train", "batch_size", "8"),
        ("runtime", "threads", True),
        ("report", "page", 0),
        ("evaluate", "every", "1"),
    ],
)
def test_a_recipe_converts_nothing(section, key, value):
    """Regression: `server.lr = true` was a learning rate of 1."""
    table = {"rounds": 1, "data": {"path": "medquad_mini"}, section: {key: value}}
    with pytest.raises(ConfigError, match=rf"{section}\.{key}: should be "):
        parse(table)


def test_a_required_number_is_not_true_either():
    with pytest.raises(ConfigError, match="rounds: should be a number, got True"):
        parse({"rounds": True, "data": {"path": "medquad_mini"}})


@pytest.mark.parametrize(
    "section",
    [
        {"limits": {"max_bytes": True}},
        {"limits": {"max_steps": "5"}},
        {"limits": {"epsilon": True, "delta": 1e-5}},
        {"runtime": {"idle_s": "1"}},
        {"runtime": {"threads": True}},
    ],
    ids=str,
)
def test_a_limit_is_a_number(section):
    """Regression: `max_bytes = true` was a limit of one byte."""
    with pytest.raises(ValidationError, match="should be a number"):
        ClientConfig.model_validate({"name": "north", "data": {"path": "rows.jsonl"}, **section})


@pytest.mark.parametrize("port", [True, "8443"])
def test_a_port_is_a_number(port):
    with pytest.raises(ValidationError, match="should be a number"):
        About.model_validate({"name": "a", "host": "h", "port": port, "listen": ":1"})
