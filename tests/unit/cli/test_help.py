"""What a new user sees first: help, the version, and what is said about a mistyped word."""

import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

with warnings.catch_warnings():
    # typer 0.20.1 imports a name that click 8.5 calls deprecated
    warnings.filterwarnings("ignore", message="'click.utils", category=DeprecationWarning)
    import click
    import typer.main

    from silotune.cli import app


def walk(command: click.Command, *words: str) -> Iterator[tuple[str, ...]]:
    """The words of every command and group."""
    yield words
    if isinstance(command, click.Group):
        for name, part in command.commands.items():
            yield from walk(part, *words, name)


EVERY = list(walk(typer.main.get_command(app)))


def typed(*words: str):
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, list(words))


def test_every_command_is_known_here():
    assert len(EVERY) > 30
    assert ("client", "doctor") in EVERY


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_help_has_a_short_form_and_fits_a_terminal_without_stray_characters(words):
    long, short = typed(*words, "--help"), typed(*words, "-h")
    assert (long.exit_code, short.exit_code) == (0, 0)
    assert short.output == long.output
    assert "-h, --help" in long.output
    assert "\\" not in long.output  # Typer escapes [required] for Rich, which does not format this
    assert max(map(len, long.output.splitlines())) <= 80
    assert not re.search(r"\.\.\.$", long.output.partition("Commands:")[2], flags=re.M)


def test_help_shows_what_is_required_and_defaults_and_ranges():
    assert "[required]" in typed("ask", "-h").output
    assert "[default: 1; x>=0]" in typed("data", "-h").output


def test_the_version_is_that_of_the_package():
    found = typed("--version")
    assert (found.exit_code, found.output) == (0, f"silotune {version('silotune')}\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rnu"], "No such command 'rnu'. Did you mean 'run'?"),
        (["server", "statu"], "No such command 'statu'. Did you mean 'status'?"),
        (["client", "joni"], "No such command 'joni'. Did you mean 'join'?"),
        (["frobnicate"], "No such command 'frobnicate'."),
        (["run", "--resmue", "x"], "No such option '--resmue'. Did you mean '--resume'?"),
        (["--versoin"], "No such option '--versoin'. Did you mean '--version'?"),
    ],
)
def test_a_mistyped_word_gets_one_suggestion(words, said):
    # Typer and Click each added one: "Did you mean 'run'? Did you mean 'run'?"
    found = typed(*words)
    assert found.exit_code == 2
    assert found.stderr.splitlines()[-1] == f"Error: {said}"


def test_neither_help_nor_mistyped_words_load_torch():
    code = f"""
import sys
from typer.testing import CliRunner
from silotune.cli import app
for words in {EVERY!r}:
    assert CliRunner().invoke(app, [*words, "--help"]).exit_code == 0
assert CliRunner().invoke(app, ["rnu"]).exit_code == 2
assert CliRunner().invoke(app, ["--version"]).exit_code == 0
print({{"torch", "transformers", "numpy"}} & set(sys.modules))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"
