"""Every public function with wrong types: one error of ours that names the argument."""

import inspect
from pathlib import Path

import pytest

import silotune
from silotune.core.errors import ConfigError, SilotuneError

WRONG = [3, 3.5, b"x", {}, {"rounds": 1}, [], ["rounds=1"], object(), True]


def by_type(value: object) -> str:
    """A name for a value that is the same in every process, as xdist needs it."""
    return type(value).__name__ if type(value) is object else repr(value)


NO_PLACE = ["", "nowhere", "x" * 300, "a\0b", Path("/nowhere"), Path("a\0b"), Path("x" * 300)]
FUNCTIONS = [name for name in silotune.__all__ if inspect.isfunction(getattr(silotune, name))]
WITH_ARGUMENTS = [name for name in FUNCTIONS if name != "shipped_recipes"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", WITH_ARGUMENTS)
@pytest.mark.parametrize("value", [None, *WRONG], ids=by_type)
def test_a_wrong_type_is_named(name, value):
    with pytest.raises(SilotuneError) as found:
        getattr(silotune, name)(value)
    assert "\n  " in str(found.value)
    if value is not None:  # no recipe at all has its own message
        assert type(value).__name__ in str(found.value)


@pytest.mark.parametrize("name", [n for n in WITH_ARGUMENTS if n != "base_folder"])
@pytest.mark.parametrize("value", NO_PLACE, ids=lambda v: repr(v)[:20])
def test_a_path_to_nowhere_is_an_error_of_ours(name, value):
    with pytest.raises(SilotuneError):
        getattr(silotune, name)(value)


KEYWORDS = [
    (name, key)
    for name in WITH_ARGUMENTS
    for key in list(inspect.signature(getattr(silotune, name)).parameters)[1:]
]


@pytest.mark.parametrize(("name", "key"), KEYWORDS)
@pytest.mark.parametrize("value", [b"x", object(), {3: 4}, 2.5], ids=by_type)
def test_a_keyword_of_a_wrong_type_is_named(name, key, value):
    with pytest.raises(SilotuneError, match=key):
        getattr(silotune, name)("hospitals", **{key: value})


@pytest.mark.parametrize("name", ["Run", "Comparison", "Sweep", "Evaluation"])
@pytest.mark.parametrize("value", [None, *WRONG], ids=by_type)
def test_a_result_that_is_no_path_is_an_error(name, value):
    with pytest.raises(ConfigError, match=f"{name} has the type"):
        getattr(silotune, name)(value)


def test_the_message_says_what_the_function_accepts():
    with pytest.raises(ConfigError) as found:
        silotune.run("hospitals", "rounds=1")  # type: ignore[arg-type]
    assert str(found.value) == (
        "silotune.run: overrides has the type str, but should be Sequence[str].\n"
        "  help(silotune.run) says what it accepts."
    )
    with pytest.raises(ConfigError, match="num_samples is out of range"):
        silotune.preview("hospitals", num_samples=-1)


def test_overrides_of_a_recipe_in_memory_count():
    """They were ignored without a word."""
    run = silotune.load_recipe("hospitals")
    assert silotune.check(run, ["rounds=2"]).run.rounds == 2
