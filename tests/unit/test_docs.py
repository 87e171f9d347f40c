"""What the documents say is true: the reference is fresh, commands exist, snippets parse."""

import ast
import functools
import importlib
import importlib.util
import re
import shlex
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import silotune
from silotune.algorithms import ALGORITHMS
from silotune.data.chat_templates import resolve_template
from silotune.federation.client_config import ClientConfig
from silotune.recipes.algorithm import ALGORITHM_CONFIGS
from silotune.recipes.mistakes import sections
from silotune.recipes.parse import load_recipe, parse
from silotune.recipes.schema import RunConfig

with warnings.catch_warnings():
    # typer 0.20.1 imports a name that click 8.5 calls deprecated
    warnings.filterwarnings("ignore", message="'click.utils", category=DeprecationWarning)
    import click
    import typer.main

    from silotune.cli import app

SOURCE = Path(silotune.__file__).parent
HOUSE = Path(__file__).parents[2]
DOCS = HOUSE / "docs"
PAGES = [HOUSE / "README.md", HOUSE / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]


def name_of(page: Path) -> str:
    return page.relative_to(HOUSE).as_posix()


def fences(page: Path) -> Iterator[tuple[str, str]]:
    """The language and the text of every fenced block."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        yield match[1], match[2]


def snippets(language: str) -> list[Any]:
    return [
        pytest.param(text, id=f"{name_of(page)}-{n}")
        for page in PAGES
        for n, (found, text) in enumerate(fences(page))
        if found == language
    ]


# --- the recipe reference ---------------------------------------------------------------------


MADE = [("recipe.md", "build_recipe_reference.py"), ("papers.md", "build_papers.py")]


@pytest.mark.parametrize(("page", "script"), MADE)
def test_a_page_made_by_a_script_is_up_to_date(page, script):
    spec = importlib.util.spec_from_file_location("_script", DOCS / script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.build() == (DOCS / page).read_text(encoding="utf-8"), "run `make docs`"


def test_the_keys_that_shells_complete_are_up_to_date():
    spec = importlib.util.spec_from_file_location("_script", DOCS / MADE[0][1])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.build_keys() == module.KEYS.read_text(encoding="utf-8"), "run `make docs`"


def test_every_config_field_has_a_help_text():
    models = {**sections(), **{f"algorithm {n}": cls for n, cls in ALGORITHM_CONFIGS.items()}}
    fields = {f"{s}.{key}": f for s, cls in models.items() for key, f in cls.model_fields.items()}
    fields |= {key: f for key, f in RunConfig.model_fields.items() if key not in sections()}
    assert [key for key, field in fields.items() if not field.description] == []


# --- recipes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", silotune.shipped_recipes())
def test_a_shipped_recipe_loads_and_begins_with_its_command(name):
    load_recipe(name)
    first = silotune.shipped_recipes()[name].read_text(encoding="utf-8").split("\n", 1)[0]
    assert first == f"# silotune run {name}"


@pytest.mark.parametrize("text", snippets("toml"))
def test_a_toml_snippet_is_a_recipe_or_a_part_of_one_or_a_client(text):
    table = tomllib.loads(text)
    if "name" in table:
        ClientConfig.model_validate(table)
        return
    table.setdefault("rounds", 1)
    table.setdefault("data", {}).setdefault("path", "medquad_mini")
    parse(table)


# --- commands ---------------------------------------------------------------------------------


def command_lines(page: Path) -> Iterator[str]:
    """Every `silotune ...` at the start of a line of a block, and in backticks."""
    for _, text in fences(page):
        for line in text.replace("\\\n", " ").splitlines():
            if re.match(r"(\.venv/bin/)?silotune( |$)", line):
                yield line
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    yield from re.findall(r"`(silotune [^`]+)`", prose)


@functools.cache
def command_group() -> click.Group:
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    return group


def check_command(line: str) -> None:
    """Parse a command line without running it.

    Raises:
        click.UsageError: There is no such command or option.
    """
    _, *words = shlex.split(line.partition(" > ")[0], comments=True)
    group = command_group()
    above = click.Context(group, info_name="silotune")
    if words[0] in (name for option in group.params for name in option.opts) or words == ["--help"]:
        return
    command = group.get_command(above, words[0])
    if command is None:
        raise click.UsageError(f"no such command: {words[0]}")
    rest = [word for word in words[1:] if word not in ("--help", "...")]
    try:
        command.make_context(words[0], list(rest), parent=above)  # click empties its list
    except click.MissingParameter:  # prose names a command without its arguments
        if rest:
            raise


@pytest.mark.parametrize(
    "line", [pytest.param(c, id=f"{name_of(p)}: {c}") for p in PAGES for c in command_lines(p)]
)
def test_a_command_that_is_shown_exists_with_its_options(line):
    check_command(line)


SHIPPED = [
    pytest.param(words[1:], id=" ".join(words))
    for page in PAGES
    if page.name not in ("CHANGELOG.md", "add-an-algorithm.md")  # what was, and what is added there
    for line in command_lines(page)
    if "sweep"
    not in (words := shlex.split(line, comments=True)[1:])[:1]  # its keys have many values
    and words[1:2]
    and words[1] in silotune.shipped_recipes()
]


@pytest.mark.parametrize("words", SHIPPED)
def test_a_command_that_is_shown_with_a_shipped_recipe_has_no_mistake_in_its_keys(words):
    """`silotune check blueprint ... privacy.unit=client` was refused."""
    load_recipe(words[0], [word for word in words[1:] if re.match(r"[\w.]+=", word)])


@pytest.mark.parametrize(
    "line", ["silotune frob", "silotune run hospitals --frob", "silotune ask x"]
)
def test_the_check_of_commands_sees_mistakes(line):
    with pytest.raises(click.UsageError):
        check_command(line)


def test_the_commands_of_the_readme_are_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z]+):", (HOUSE / "Makefile").read_text("utf-8"), flags=re.M))
    for page in PAGES:
        blocks = "\n".join(text for _, text in fences(page))
        shown = re.findall(r"^make ([a-z]+)", blocks, flags=re.M)
        shown += re.findall(r"`make ([a-z]+)`", page.read_text(encoding="utf-8"))
        assert set(shown) <= targets, name_of(page)


# --- Python, links, lists ---------------------------------------------------------------------


@pytest.mark.parametrize("text", snippets("jinja"))
def test_a_template_in_the_docs_is_one(text, tmp_path):
    (tmp_path / "own.jinja").write_text(text, encoding="utf-8")
    assert resolve_template(str(tmp_path / "own.jinja")) == text


@pytest.mark.parametrize("text", snippets("python"))
def test_a_python_snippet_compiles_and_imports_names_that_exist(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("silotune"):
            module = importlib.import_module(node.module or "")
            assert [a.name for a in node.names if not hasattr(module, a.name)] == []
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.value.id != "silotune" or hasattr(silotune, node.attr), node.attr


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    links = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_the_docs_name_exist(page):
    if "decisions" in page.parts or page.name == "CHANGELOG.md":  # they name what was
        return
    places = [HOUSE, SOURCE, page.parent, *(path for path in SOURCE.iterdir() if path.is_dir())]
    named = re.findall(r"`([\w/]+\.py)`", page.read_text(encoding="utf-8"))
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


def test_extras_are_installed_from_a_clone_everywhere():
    """No index has the package yet, so `pip install 'silotune[web]'` could not work."""
    texts = [
        *PAGES,
        *SOURCE.rglob("*.py"),
        *SOURCE.rglob("*.toml"),
        *(HOUSE / "tests").rglob("*.py"),
    ]
    texts += [*(HOUSE / "benchmarks").glob("*.py"), *(HOUSE / "deploy").rglob("*.*")]
    here = Path(__file__).resolve()
    found = [p for p in texts if p.resolve() != here and "silotune[" in p.read_text("utf-8")]
    assert found == []
    extras = set(
        tomllib.loads((HOUSE / "pyproject.toml").read_text("utf-8"))["project"][
            "optional-dependencies"
        ]
    )
    for text in texts:
        for names in re.findall(r"make env EXTRAS=([a-z,]+)", text.read_text("utf-8")):
            assert {name for name in names.split(",") if name} <= extras, (text, names)


ODD = re.compile(r"\b(?:mend(?:s|ed|ing)?|anew|told apart)\b", flags=re.IGNORECASE)
"""Words that no native engineer would write: STYLE section 13."""
NO_PLURAL = re.compile(r"\b(?!exp\()\w+\((?:s|es)\)")


def strings_of(path: Path) -> str:
    """All that may be read of a file: of a module its texts, where str(s) is no plural."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text
    nodes = ast.walk(ast.parse(text))
    values = [node.value for node in nodes if isinstance(node, ast.Constant)]
    return "\n".join(value for value in values if isinstance(value, str))


def test_no_text_has_words_that_nobody_would_say_or_a_plural_in_brackets():
    pages = [page for page in PAGES if "decisions" not in page.parts]  # these are never rewritten
    found = {}
    for path in [
        *pages,
        *(p for kind in ("py", "toml", "html") for p in SOURCE.rglob(f"*.{kind}")),
    ]:
        odd = ODD.findall(path.read_text(encoding="utf-8")) + NO_PLURAL.findall(strings_of(path))
        if odd:
            found[path.name] = odd
    assert found == {}


def test_the_list_of_papers_names_every_algorithm_with_its_file():
    lines = (DOCS / "papers.md").read_text(encoding="utf-8").splitlines()
    for name, (_, build) in ALGORITHMS.items():
        file = Path(importlib.import_module(build.__module__).__file__ or "").name
        assert any(f"`{name}`" in line and f"algorithms/{file}" in line for line in lines), name


def test_the_map_in_the_readme_names_every_room_once():
    readme = (HOUSE / "README.md").read_text(encoding="utf-8")
    rooms = sorted(p.parent.name for p in SOURCE.glob("*/__init__.py"))
    shown = re.findall(r"^  (\w+)/  ", readme.split("## Map", 1)[1], flags=re.M)
    assert sorted(shown) == rooms
