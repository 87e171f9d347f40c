"""What a recipe may ask of a client: no key of it names a path, a model or another column."""

import os
import re
import sys
from typing import Any, get_args

import pytest
import tomli_w
from pydantic import BaseModel, ValidationError

from silotune.core.errors import ConfigError, Declined
from silotune.core.types import Score
from silotune.data.client_rows import ClientRows
from silotune.federation.client_config import ClientConfig, load_client_config
from silotune.federation.client_recipe import own_recipe
from silotune.federation.consent import allowed_columns, is_large_enough
from silotune.federation.roster import NAME, check_client_name
from silotune.federation.simulated_clients import write_client_configs
from silotune.recipes.parse import parse
from silotune.recipes.schema import RunConfig

TEXTS = {
    *("data.prompt", "data.completion", "data.system", "data.label", "data.labels"),
    *("data.text", "data.text_pair", "adapter.targets", "adapter.peft"),
    "data.date",  # checked to be a day
}
"""Keys that reach a client's training as text: columns, words in front of rows, and names of
modules. tests/unit/models/test_peft_options.py is about adapter.peft."""


def client(**changes) -> ClientConfig:
    table = {"name": "north", "model": "/own/copy", "data": {"path": "own.jsonl"}, **changes}
    return ClientConfig.model_validate(table)


def recipe(**sections) -> RunConfig:
    return parse({"rounds": 3, "data": {"path": "x"}, **sections})


def holds_text(annotation: Any) -> bool:
    return annotation in (str, Any) or any(map(holds_text, get_args(annotation)))


def text_keys(kind: type[BaseModel] = RunConfig, before: str = ""):
    """Every key of a recipe that can hold free text, dotted."""
    for name, field in kind.model_fields.items():
        inner = [a for a in (field.annotation, *get_args(field.annotation)) if isinstance(a, type)]
        sections = [a for a in inner if issubclass(a, BaseModel)]
        if name == "algorithm":
            continue  # a name from a list; an own class is imported by the server only
        if sections:
            yield from text_keys(sections[0], f"{before}{name}.")
        elif holds_text(field.annotation):
            yield before + name


def with_text(run: RunConfig, key: str, text: str) -> RunConfig:
    """The recipe as a hostile server may send it: not checked."""
    *sections, last = key.split(".")
    holder = run
    for section in sections:
        holder = getattr(holder, section)
    field = type(holder).model_fields[last]
    lists = "tuple" in str(field.annotation)
    value: Any = (text,) if lists else {"x": text} if "dict" in str(field.annotation) else text
    changed = holder.model_copy(update={last: value})
    return run.model_copy(update={sections[0]: changed} if sections else {last: value})


def test_the_list_of_keys_finds_those_that_the_review_named():
    found = set(text_keys())
    assert {"data.template", "data.path", "model.name", "distill.teacher", "adapter.peft"} <= found
    assert {"server.data_path", "runtime.ray_address", "compare.arms", "model.revision"} <= found


@pytest.mark.parametrize("key", sorted(set(text_keys()) - TEXTS))
@pytest.mark.parametrize("own_model", [True, False])
def test_no_key_of_a_recipe_brings_a_path_to_a_client(tmp_path, key, own_model):
    """It is refused, or it is gone from the recipe as it runs here. Nothing looks at the disk."""
    (tmp_path / "secret").mkdir()
    opened: list[str] = []
    with_hook(opened.append)
    run = with_text(recipe(partition={"by": "x"}), key, str(tmp_path / "secret"))
    own = client() if own_model else client(model=None)
    said = ""
    try:
        said = own_recipe(run, own).model_dump_json(serialize_as_any=True)
    except Declined as refusal:
        said = str(refusal)
    finally:
        HOOKS.clear()
    assert str(tmp_path) not in said
    assert not [path for path in opened if str(tmp_path) in path]


HOOKS: list[Any] = []


def with_hook(tell):
    """Tell of every file that is opened or listed; hooks of Python cannot be taken off again."""
    if not hasattr(with_hook, "installed"):
        with_hook.installed = True  # type: ignore[attr-defined]

        def hear(event, args):
            if HOOKS and event in ("open", "os.listdir", "os.scandir"):
                HOOKS[-1](os.fsdecode(args[0]) if isinstance(args[0], (str, bytes)) else "")

        sys.addaudithook(hear)
    HOOKS.append(tell)


@pytest.mark.parametrize("there", ["missing", "text", "bytes", "folder"])
def test_a_template_that_names_a_file_is_refused_alike_whatever_is_there(tmp_path, there):
    """Regression: three different errors told a server which files a client has."""
    place = tmp_path / "place"
    if there == "folder":
        place.mkdir()
    elif there != "missing":
        place.write_bytes(b"{{ messages }}" if there == "text" else b"\xff\xfe")
    with pytest.raises(Declined) as caught:
        own_recipe(with_text(recipe(), "data.template", str(place)), client())
    assert str(caught.value) == (
        "client 'north' does not take part:\n"
        "  data.template names a file; the recipe must hold the text of the template"
    )


def test_a_clients_own_template_may_be_a_file(tmp_path):
    own = client(data={"path": "own.jsonl", "template": str(tmp_path / "mine.jinja")})
    assert own_recipe(recipe(), own).data.template == str(tmp_path / "mine.jinja")


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/3", "abc123", None])
def test_a_revision_of_the_hub_is_accepted(revision):
    run = recipe(model={"name": "owner/model", "revision": revision})
    assert own_recipe(run, client(model=None)).model.revision == revision


@pytest.mark.parametrize("revision", ["../../x", "/etc/passwd", "a/../b", "a b", "-x"])
def test_a_revision_that_could_be_a_path_is_refused(revision):
    run = recipe(model={"name": "owner/model", "revision": revision})
    with pytest.raises(Declined, match=r"model\.revision is not"):
        own_recipe(run, client(model=None))


# --- columns -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "task", "key"),
    [
        ({"prompt": "{a}", "completion": "{hiv}"}, "instruct", "completion"),
        ({"prompt": "{a} {sex}", "completion": "{b}"}, "instruct", "prompt"),
        ({"text": "hiv", "label": "b", "labels": ["x", "y"]}, "classify", "text"),
        ({"text": "a", "text_pair": "hiv", "label": "b", "labels": ["x", "y"]}, "classify", "text"),
        ({"text": "a", "label": "hiv", "labels": ["x", "y"]}, "classify", "label"),
        ({"text": "a", "labels": ["x", "y"]}, "classify", "label"),
    ],
)
def test_every_key_that_names_a_column_is_checked(data, task, key):
    run = recipe(task=task, data={"path": "x", **data})
    with pytest.raises(Declined, match=rf"data\.{key}\w* uses column '(hiv|sex|label)'"):
        own_recipe(run, client(limits={"columns": ["a", "b"]}))
    own_recipe(run, client(limits={"columns": ["a", "b", "hiv", "sex", "label"]}))
    own_recipe(run, client())


def test_what_a_clients_own_data_names_needs_no_permission():
    mine = {"path": "own.jsonl", "prompt": "{q}", "completion": "{hiv}"}
    own = client(data=mine, limits={"columns": ["a"]})
    run = recipe(data={"path": "x", "prompt": "{z}", "completion": "{z}"})
    assert own_recipe(run, own).data.prompt == "{q}", "the recipe's columns are not even used"
    assert allowed_columns(own.data, own.limits.columns) == {"a", "q", "hiv"}
    assert allowed_columns(own.data, None) is None


# --- small counts --------------------------------------------------------------------------------


def score(*counts: tuple[int, int, int]) -> Score:
    total = sum(true for _, _, true in counts)
    right = sum(hit for hit, _, _ in counts)
    return Score("north", 1.0, total, right, total, label_counts=counts)


@pytest.mark.parametrize(
    ("counts", "leaves"),
    [
        (((10, 15, 15), (10, 15, 15)), True),
        (((10, 10, 10), (10, 10, 10)), True),
        (((0, 0, 10), (10, 20, 10)), True),
        (((2, 11, 2), (0, 0, 9)), False),  # the figures of the review
        (((20, 24, 20), (0, 0, 4)), False),
        (((10, 14, 10), (6, 6, 10)), False),  # 4 given the first label have the second
        (((16, 16, 20), (20, 24, 20)), False),  # 4 with the first label were not given it
        (((9, 10, 11), (10, 11, 10)), False),  # two wrong
    ],
)
def test_a_score_leaves_whole_or_not_at_all(counts, leaves):
    assert is_large_enough(score(*counts), 5) is leaves
    assert is_large_enough(score(*counts), None)


def test_a_score_of_few_rows_does_not_leave():
    few = Score("north", 1.0, 400, 100, 4)
    assert not is_large_enough(few, 5)
    assert is_large_enough(few, 4)


# --- names ---------------------------------------------------------------------------------------

BAD_NAMES = [
    *(" ", "/", "...", " north", "north ", "a\nb", "a\x1b[31mb", "a\u202eb", "\u00a0", "\x00"),
    *("a\tb", "a" * 201, "\x7fa"),
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_a_name_that_people_cannot_read_is_refused(tmp_path, name):
    """Regression: a client could be called "/", a blank, or an escape sequence."""
    with pytest.raises(ValueError, match="is not a name"):
        check_client_name(name)
    with pytest.raises(ValidationError):
        client(name=name)
    path = tmp_path / "client.toml"
    path.write_text(tomli_w.dumps({"name": name, "data": {"path": "x"}}), encoding="utf-8")
    with pytest.raises(ConfigError, match="name: ") as caught:
        load_client_config(path)
    assert str(caught.value).replace(str(path), "").replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "name", ["north", "a/b", "Centre hospitalier, Orléans", "北京", "7", "a-b"]
)
def test_a_name_that_people_can_read_is_accepted(name):
    assert client(name=name).name == name


def test_names_of_a_consortium_are_among_them():
    for name in ("a", "a.b-c_d", "A" * 63):
        assert re.fullmatch(NAME, name)
        assert check_client_name(name) == name


def test_a_simulated_client_may_have_any_name_that_a_column_holds(tmp_path):
    talk = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    rows = {name: ClientRows(name, (talk,), (talk,)) for name in (" ", "\x1b[31m", "a\nb")}
    paths = write_client_configs(
        tmp_path / "c", rows, recipe(), model=None, state=lambda _: tmp_path / "state"
    )
    assert {load_client_config(path).name for path in paths.values()} == set(rows)
