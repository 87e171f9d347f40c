"""Recipes that no person would write: one clear error, soon, whatever the value is."""

import time

import pytest

from silotune.core.errors import ConfigError
from silotune.core.toml_file import read_table
from silotune.recipes.parse import load_recipe, with_overrides
from silotune.recipes.sections import RuntimeConfig

BASE = 'rounds = 1\n[data]\npath = "medquad_mini"\n'

HOSTILE = {
    "a number of 4400 digits": (f"seed = {'9' * 4400}\n{BASE}", "out of range"),
    "2000 lists deep": (f"x = {'[' * 2000}{']' * 2000}\n{BASE}", "nested too deeply"),
    "1000 tables deep": (f"{'.'.join('a' * 1000)} = 1\n{BASE}", "nested too deeply"),
    "threads": (f"{BASE}[runtime]\nthreads = 1{'0' * 400}\n", "runtime.threads: should be"),
    "seed": (f"seed = {2**53 + 1}\n{BASE}", "seed: should be between"),
    "accumulation": (f"{BASE}[train]\naccumulation = {2**63}\n", "train.accumulation: should be"),
    "infinity": (f'{BASE}[algorithm]\nname = "fedadam"\nserver_lr = inf\n', "server_lr: should be"),
    "nan": (f"{BASE}[train]\nlr = nan\n", "train.lr: should be"),
    "an option": (
        f'{BASE}[adapter]\nkind = "peft"\npeft = {{ peft_type = "LORA", r = inf }}\n',
        "adapter.peft: should be a finite number",
    ),
    "a long text": (f'{BASE}[runtime]\nname = "{"x" * 70000}"\n', "runtime.name: should be"),
    "a long key": (f'"{"x" * 70000}" = 1\n{BASE}', "x...: unknown key"),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_recipe_is_one_short_error(tmp_path, how):
    text, why = HOSTILE[how]
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert why in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "override",
    [
        f"runtime.threads=1{'0' * 400}",
        f"rounds={'9' * 4400}",
        f"data.split_seed={'[' * 2000}",
        "algorithm.server_lr=inf",
        ".".join("a" * 2000) + "=1",
    ],
)
def test_a_hostile_override_is_an_error_too(tmp_path, override):
    path = tmp_path / "r.toml"
    path.write_text(f'{BASE}[algorithm]\nname = "fedadam"\n')
    run = load_recipe(path)
    with pytest.raises(ConfigError):
        load_recipe(path, [override])
    with pytest.raises(ConfigError):  # as a sweep does
        with_overrides(run, [override])


@pytest.mark.parametrize("section", ["", "[train]\n"])
def test_3000_unknown_keys_are_counted_and_the_first_explained(tmp_path, section):
    keys = "".join(f"loca_step{i} = {i}\n" for i in range(3000))
    path = tmp_path / "r.toml"
    path.write_text(BASE + section + keys if section else keys + BASE)
    began = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert time.process_time() - began < 3  # it was 20; idle, it is below one
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("3000 mistakes in recipe")
    assert "loca_step0: unknown key. Did you mean train.local_steps?" in lines[1]
    assert lines[-1].strip() == "and 2970 more mistakes."
    assert len(lines) == 32


def test_other_files_count_their_mistakes_too(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text("".join(f"k{i} = {i}\n" for i in range(3000)))
    with pytest.raises(ConfigError) as caught:
        read_table(path, RuntimeConfig)
    assert str(caught.value).splitlines()[-1].strip() == "and 2970 more mistakes."
