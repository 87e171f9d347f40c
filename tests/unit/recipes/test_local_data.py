"""A shipped recipe runs on local rows with data.path alone."""

import json

import pytest

from silotune.core.errors import ConfigError
from silotune.data.reading import HUB_ONLY, read_parts
from silotune.recipes.parse import load_recipe, parse, shipped_recipes, to_toml, with_overrides


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"sentence": "a", "label": 0, "instruction": "b", "input": "c", "output": "d"}
    path.write_text((json.dumps(row) + "\n") * 4)
    return path


@pytest.mark.parametrize("name", shipped_recipes())
def test_data_path_is_the_only_override_that_local_rows_need(name, rows, capsys):
    published = load_recipe(name)
    run = load_recipe(name, [f"data.path={rows}"])
    assert len(read_parts(run.data, run.task)[0].rows) == 4, "the location is not refused"
    assert run.track is None
    gone = [f"data.{key}" for key in HUB_ONLY if getattr(run.data, key) != published_of(name, key)]
    gone += ["track"] * (published.track is not None)
    note = capsys.readouterr().err
    assert all(key in note for key in gone)
    assert note.startswith("note: ") == bool(gone)


def published_of(name, key):
    return getattr(load_recipe(name).data, key)


def test_what_is_given_with_the_path_is_not_taken_away(rows):
    run = load_recipe("glue-sst2", [f"data.path={rows}", "data.name=x"])
    assert (run.data.name, run.data.eval_split) == ("x", None)
    with pytest.raises(ConfigError, match=r"data\.name: only for data sets on the hub"):
        read_parts(run.data, run.task)


@pytest.mark.parametrize("path", ["owner/name", "missing.jsonl", "./missing", "", "\\0", "3", "[]"])
def test_another_data_set_of_the_hub_keeps_the_keys(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        run = load_recipe("glue-sst2", [f"data.path={path}"])
    except ConfigError:
        return  # no path at all
    assert (run.data.name, run.data.eval_split) == ("sst2", "validation")


def test_other_overrides_change_nothing_here():
    run = load_recipe("glue-cola", ["rounds=1"])
    assert (run.data.name, run.data.eval_split) == ("cola", "validation")


def test_a_resolved_recipe_may_be_moved_to_local_rows(rows):
    resolved = parse({**load_recipe("glue-cola").model_dump(mode="json", exclude_none=True)})
    moved = with_overrides(resolved, [f"data.path={rows}"])
    assert (moved.data.name, moved.data.eval_split, moved.data.split) == (None, None, "train")
    assert "eval_split" not in to_toml(moved)
