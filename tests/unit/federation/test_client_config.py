"""A client's own configuration decides its rows, machine and limits. A recipe names no path."""

import json
import math
import tomllib
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from silotune.core.errors import ConfigError, Declined
from silotune.data.client_rows import ClientRows
from silotune.data.clients import load_clients
from silotune.data.reading import DataConfig
from silotune.federation.client_config import (
    ClientConfig,
    LimitsConfig,
    OwnRuntimeConfig,
    is_client_folder,
    load_client_config,
    load_client_configs,
)
from silotune.federation.client_recipe import (
    LOCATIONS,
    check_base,
    check_hours,
    check_steps,
    own_recipe,
    own_rows,
)
from silotune.federation.simulated_clients import write_client_configs
from silotune.privacy.base import PrivacyConfig
from silotune.recipes.contradictions import contradictions
from silotune.recipes.parse import parse, to_toml
from silotune.training.loop import num_rows
from tests.conftest import CHATML, changed, hospital_rows, write_jsonl


def recipe(**changes):
    table = {"rounds": 3, "data": {"path": "server.jsonl"}}
    return parse(changed(table, changes))


def client(**changes) -> ClientConfig:
    return ClientConfig.model_validate({"name": "north", "data": {"path": "own.jsonl"}, **changes})


def write(folder: Path, text: str, name: str = "client.toml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# --- reading -------------------------------------------------------------------------------------

MINIMAL = 'name = "north"\n[data]\npath = "rows.jsonl"\n'
FULL = """
name = "Centre hospitalier, Orléans"
state = "kept"
model = "base"
[data]
path = "rows.jsonl"
eval_path = "held"
system = "Be brief."
[limits]
max_steps = 10
max_rounds = 5
models = ["smollm2-135m-instruct", "owner/model"]
[runtime]
device = "cpu"
threads = 2
idle_s = 30
turn = "turn"
"""


def test_a_minimal_file_is_enough(tmp_path):
    own = load_client_config(write(tmp_path, MINIMAL))
    assert own.name == "north"
    assert own.state == str(tmp_path / "state")
    assert own.model is None
    assert own.limits == LimitsConfig(max_steps=None, max_rounds=None, models=None)
    assert own.runtime.idle_s == 900
    assert own.runtime.turn is None


def test_paths_are_read_from_the_folder_of_the_file(tmp_path, monkeypatch):
    place = tmp_path / "clinic"
    path = write(place, FULL)
    (place / "rows.jsonl").touch()
    (place / "held").mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    own = load_client_config(path)
    assert own.name == "Centre hospitalier, Orléans"
    assert own.data.path == str(place / "rows.jsonl")
    assert own.data.eval_path == str(place / "held")
    assert own.state == str(place / "kept")
    assert own.model == str(place / "base")
    assert own.runtime.turn == str(place / "turn")
    assert own.limits.models == ("smollm2-135m-instruct", "owner/model")


def test_absolute_and_home_paths_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    rows = write_jsonl(tmp_path / "home" / "rows.jsonl", hospital_rows())
    table = {
        "name": "north",
        "state": "~/state",
        "model": str(tmp_path / "base"),
        "data": {"path": "~/rows.jsonl"},
        "runtime": {"turn": "~/turn"},
    }
    own = load_client_config(write(tmp_path / "clinic", tomli_w.dumps(table)))
    assert own.state == str(tmp_path / "home" / "state")
    assert own.model == str(tmp_path / "base")
    assert own.runtime.turn == str(tmp_path / "home" / "turn")
    assert own_rows(recipe(), own).train, rows


@pytest.mark.parametrize("path", ["medquad_mini", "owner/dataset"])
def test_a_path_that_is_no_file_next_to_it_stays_a_name(tmp_path, path):
    own = load_client_config(write(tmp_path, f'name = "north"\n[data]\npath = "{path}"\n'))
    assert own.data.path == path


def test_all_mistakes_are_reported_together(tmp_path):
    path = write(
        tmp_path,
        """
name = ""
colour = "blue"
[data]
path = "rows.jsonl"
eval_fraction = 2.0
[limits]
max_steps = 0
max_rounds = "many"
models = "all"
[runtime]
device = "tpu"
threads = 0
idle_s = 0
port = 80
""",
    )
    with pytest.raises(ConfigError) as caught:
        load_client_config(path)
    text = str(caught.value)
    assert text.startswith(f"mistakes in {path}:")
    keys = {line.strip().split(":")[0] for line in text.splitlines()[1:]}
    assert keys == {
        *("name", "colour", "data.eval_fraction", "limits.max_steps", "limits.max_rounds"),
        *("limits.models", "runtime.device", "runtime.threads", "runtime.idle_s", "runtime.port"),
    }


def test_a_misspelt_key_is_answered_with_the_closest(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_client_config(write(tmp_path, MINIMAL + "[limits]\nmax_step = 3\n"))
    assert "limits.max_step: unknown key. Did you mean 'max_steps'?" in str(caught.value)


@pytest.mark.parametrize("text", ["", "name = 3", 'name = "north"', "[data]\npath = 3"])
def test_a_missing_or_wrong_key_is_a_config_error(tmp_path, text):
    with pytest.raises(ConfigError, match="mistakes in"):
        load_client_config(write(tmp_path, text))


def test_contradictions_in_data_are_found(tmp_path):
    text = 'name = "n"\n[data]\npath = "a.jsonl"\nprompt = "{q}"\n'
    with pytest.raises(ConfigError, match="prompt and completion belong together"):
        load_client_config(write(tmp_path, text))


@pytest.mark.parametrize("data", [b"name = ", b"\xff\xfe", None])
def test_a_file_that_is_not_toml_is_named(tmp_path, data):
    path = tmp_path / "client.toml"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        load_client_config(path)
    assert str(path) in str(caught.value)


def test_a_folder_of_configurations_is_distinguished_from_a_folder_of_rows(tmp_path):
    assert not is_client_folder(tmp_path)
    assert not is_client_folder(tmp_path / "missing")
    write(tmp_path, MINIMAL)
    assert is_client_folder(tmp_path)
    assert not is_client_folder(tmp_path / "client.toml")


def test_the_configurations_of_a_folder_are_found_by_client_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("clients")
    for file, name in (("1.toml", "west"), ("2.toml", "east"), ("3.toml", "north")):
        write(folder, MINIMAL.replace("north", name), file)
    write(folder, "not a client", "notes.txt")
    found = load_client_configs(folder)
    assert list(found) == ["east", "north", "west"]
    assert found["west"] == tmp_path / "clients" / "1.toml"


def test_two_files_with_the_same_client_name_are_refused(tmp_path):
    write(tmp_path, MINIMAL, "a.toml")
    write(tmp_path, MINIMAL, "b.toml")
    with pytest.raises(ConfigError, match=r"both name their client 'north'") as caught:
        load_client_configs(tmp_path)
    assert "a.toml" in str(caught.value)
    assert "b.toml" in str(caught.value)


def test_a_mistake_in_one_file_of_a_folder_is_reported(tmp_path):
    write(tmp_path, MINIMAL, "a.toml")
    write(tmp_path, MINIMAL + "colour = 1\n", "b.toml")
    with pytest.raises(ConfigError, match=r"mistakes in .*b\.toml"):
        load_client_configs(tmp_path)


# --- the recipe as it is run here ----------------------------------------------------------------

SERVERS = {
    "path": "/srv/secret/rows.jsonl",
    "eval_path": "/srv/secret/held.jsonl",
    "eval_split": "test",
    "name": "subset",
    "split": "validation",
    "revision": "abc",
}


@pytest.mark.parametrize("key", sorted(LOCATIONS))
def test_where_rows_are_is_never_taken_from_a_recipe(key):
    run = recipe(data={"path": "server.jsonl", key: SERVERS[key]})
    here = own_recipe(run, client())
    default = DataConfig.model_fields[key].default
    assert getattr(here.data, key) == ("own.jsonl" if key == "path" else default)


def test_every_key_of_data_is_a_location_or_a_format():
    """A new key of [data] must be added to one of the two."""
    formats = {"eval_fraction", "prompt", "completion", "system", "max_rows"}
    formats |= {"max_eval_rows", "template", "split_seed", "labels", "text", "text_pair"}
    formats |= {"skip_empty", "date", "validation_fraction"}
    assert set(DataConfig.model_fields) == LOCATIONS | formats | {"label"}
    assert set(SERVERS) == LOCATIONS


def test_a_client_does_not_score_held_out_rows_where_scores_make_choices():
    own = client(data={"path": "own.jsonl", "validation_fraction": 0.0})
    asked = recipe(data={"path": "x.jsonl", "validation_fraction": 0.2})
    with pytest.raises(Declined, match="it would score its held-out rows"):
        own_recipe(asked, own)
    assert own_recipe(recipe(data={"path": "x.jsonl"}), own).data.validation_fraction == 0
    assert own_recipe(asked, client()).data.validation_fraction == 0.2


FORMATS = {
    "eval_fraction": (0.4, 0.3),
    "validation_fraction": (0.4, 0.3),
    "prompt": ("Q: {q}", "Ask: {q}"),
    "completion": ("A: {a}", "Say: {a}"),
    "system": ("Be brief.", "Be kind."),
    "max_rows": (7, 5),
    "date": ("2026-01-31", "2026-02-01"),
}


def test_formats_are_inherited():
    asked = {key: values[0] for key, values in FORMATS.items()}
    here = own_recipe(recipe(data={"path": "x.jsonl", **asked}), client())
    assert {key: getattr(here.data, key) for key in FORMATS} == asked


@pytest.mark.parametrize("key", FORMATS)
def test_a_client_overrides_a_format(key):
    asked = {k: values[0] for k, values in FORMATS.items()}
    mine = FORMATS[key][1]
    own = {"path": "own.jsonl", key: mine}
    if key in ("prompt", "completion"):  # its own file has both or neither
        other = ({"prompt", "completion"} - {key}).pop()
        own[other] = asked[other]
    here = own_recipe(recipe(data={"path": "x.jsonl", **asked}), client(data=own))
    assert getattr(here.data, key) == mine
    for other in set(FORMATS) - {key}:
        assert getattr(here.data, other) == asked[other]


@pytest.mark.parametrize("mine", [{"eval_path": "held.jsonl"}, {"eval_split": "test"}])
def test_a_clients_own_held_out_rows_replace_the_recipes_fraction(mine):
    run = recipe(data={"path": "x.jsonl", "eval_fraction": 0.4})
    here = own_recipe(run, client(data={"path": "own", **mine}))
    assert {key: getattr(here.data, key) for key in mine} == mine


def test_device_and_threads_are_the_clients_own():
    run = recipe(
        runtime={"name": "flower", "device": "cuda", "threads": 64, "join_timeout_s": 9},
        model__name="smollm2-135m-instruct",
    )
    own = client(runtime={"device": "cpu", "threads": 3})
    here = own_recipe(run, own)
    assert (here.runtime.device, here.runtime.threads) == ("cpu", 3)
    assert here.runtime.name == "in-process"
    assert own_recipe(run, client()).runtime.device == "auto"


def test_how_the_server_waits_does_not_matter_at_a_client():
    """Regression: the doctor's real step failed on a recipe's `runtime.join_timeout_s`."""
    run = recipe(runtime={"name": "flower", "join_timeout_s": 20})
    here = own_recipe(run, client(model="copy"))
    assert list(contradictions(here)) == []
    assert parse(tomllib.loads(to_toml(here))).runtime == here.runtime


def test_a_client_may_set_how_it_loads_the_base():
    run = recipe(model={"name": "owner/model", "dtype": "bfloat16", "quantization": "nf4"})
    here = own_recipe(run, client()).model
    assert (here.dtype, here.quantization) == ("bfloat16", "nf4")
    own = client(runtime={"dtype": "float32", "quantization": "none"})
    here = own_recipe(run, own).model
    assert (here.name, here.dtype, here.quantization) == ("owner/model", "float32", "none")
    here = own_recipe(recipe(), client(runtime={"quantization": "int8"})).model
    assert (here.dtype, here.quantization) == ("auto", "int8")


@pytest.mark.parametrize(("key", "value"), [("quantization", "nf4"), ("dtype", "bfloat16")])
def test_a_client_whose_settings_rule_out_full_training_declines_it(key, value):
    """A recipe with these two is refused; a client's own key must not get around that."""
    run = recipe(adapter={"kind": "full"}, model__name="owner/model")
    own_recipe(run, client(runtime={"quantization": "none", "dtype": "float32"}))
    assert f"runtime.{key} = '{value}'" in refusal(run, client(runtime={key: value}))


def test_the_recipe_decides_what_is_computed():
    run = recipe(
        seed=5, train__lr=0.5, algorithm={"name": "fedprox", "mu": 0.3}, partition={"by": "x"}
    )
    here = own_recipe(run, client())
    assert here.partition is None
    assert (here.seed, here.rounds, here.train, here.adapter, here.algorithm) == (
        *(run.seed, run.rounds, run.train, run.adapter, run.algorithm),
    )
    assert type(here.algorithm) is type(run.algorithm)


# --- limits --------------------------------------------------------------------------------------


def refusal(run, own) -> str:
    with pytest.raises(Declined) as caught:
        own_recipe(run, own)
    text = str(caught.value)
    assert text.startswith("client 'north' does not take part:\n  ")
    return text


def test_limits_are_inclusive():
    limits = {"max_steps": 4, "max_rounds": 3, "models": ["smollm2-135m-instruct"]}
    own_recipe(recipe(rounds=3, train__local_steps=4), client(limits=limits))
    assert "train.local_steps = 5 is above limits.max_steps" in refusal(
        recipe(train__local_steps=5), client(limits=limits)
    )
    assert "rounds = 4 is above limits.max_rounds = 3" in refusal(
        recipe(rounds=4), client(limits=limits)
    )
    assert "model.name = 'owner/other' is not in limits.models" in refusal(
        recipe(model__name="owner/other"), client(limits=limits)
    )


def test_a_client_may_allow_no_model_at_all():
    assert "is not in limits.models" in refusal(recipe(), client(limits={"models": []}))


def test_everything_that_is_not_allowed_is_reported_together():
    limits = {"max_steps": 1, "max_rounds": 1, "models": []}
    run = recipe(rounds=9, train__local_steps=9, model__name="/srv/models/llama")
    assert len(refusal(run, client(limits=limits)).splitlines()) == 5


def test_a_list_of_models_applies_to_the_name_in_the_recipe_even_with_an_own_copy():
    own = client(model="/own/copy", limits={"models": ["owner/model"]})
    assert own_recipe(recipe(model__name="owner/model"), own).model.name == "/own/copy"
    refusal(recipe(model__name="owner/other"), own)


@pytest.mark.parametrize(
    ("num_train", "train", "passes"),
    [
        (10, {"batch_size": 2}, 5),
        (11, {"batch_size": 2}, 6),
        (11, {"batch_size": 2, "local_epochs": 3}, 17),
        (11, {"batch_size": 2, "local_epochs": 3, "accumulation": 4}, 17),
        (1, {"batch_size": 8}, 1),
    ],
)
def test_passes_over_the_rows_are_counted_in_forward_passes(num_train, train, passes):
    run = recipe(train=train)
    rows = num_rows(run.train, num_train)
    assert passes == -(-rows // run.train.batch_size), "the same as in the local loop"
    check_steps(run, client(limits={"max_steps": passes}), num_train)
    check_steps(run, client(), num_train)
    if passes > 1:
        with pytest.raises(Declined, match=f"{passes} forward passes in a round are") as caught:
            check_steps(run, client(limits={"max_steps": passes - 1}), num_train)
        assert f"limits.max_steps = {passes - 1}" in str(caught.value)


@pytest.mark.parametrize(
    "train",
    [
        {"local_steps": 5, "accumulation": 10**6},
        {"local_steps": 1, "batch_size": 10**6},
        {"local_steps": 1, "batch_size": 1000, "accumulation": 1000},
        {"local_steps": 3, "accumulation": 2},
        {"local_epochs": 1, "batch_size": 1, "accumulation": 1000},
    ],
    ids=str,
)
def test_no_size_of_a_step_gets_around_the_limit_of_steps(train):
    """Regression: `train.accumulation = 1e6` passed `limits.max_steps = 5`."""
    with pytest.raises(Declined, match=r"limits\.max_steps"):
        check_steps(recipe(train=train), client(limits={"max_steps": 5}), 100)


def test_forward_passes_that_a_recipe_names_are_refused_before_rows_are_read():
    text = refusal(
        recipe(train={"local_steps": 5, "accumulation": 10**6}), client(limits={"max_steps": 5})
    )
    assert "each of train.accumulation = 1000000 forward passes, is above limits.max_steps" in text


def test_what_fits_the_limit_is_bounded_by_the_rows():
    """Whatever passes: at most max_steps times all rows go through the model."""
    for size in (1, 7, 8, 64, 10**4):
        for passes in (1, 2, 5):
            run = recipe(train={"local_steps": 1, "batch_size": size, "accumulation": passes})
            try:
                check_steps(run, client(limits={"max_steps": 5}), 20)
            except Declined:
                continue
            assert num_rows(run.train, 20) <= 5 * 20


def test_steps_that_a_recipe_names_do_not_depend_on_the_rows():
    check_steps(recipe(train__local_steps=2), client(limits={"max_steps": 2}), 10**6)


@pytest.mark.parametrize(
    ("train", "limit", "allowed"),
    [
        ({"local_epochs": 2}, 2, True),
        ({"local_epochs": 2}, 1.5, False),
        ({}, 1, True),
        ({}, 0.5, False),
        ({"local_steps": 5, "batch_size": 2}, 1, True),  # 10 rows
        ({"local_steps": 6, "batch_size": 2}, 1, False),
        ({"local_steps": 3, "batch_size": 2, "accumulation": 2}, 1, False),
    ],
)
def test_passes_over_the_rows_can_be_limited_however_a_recipe_gives_them(train, limit, allowed):
    own = client(limits={"max_epochs": limit})
    if allowed:
        check_steps(recipe(train=train), own, 10)
    else:
        with pytest.raises(Declined, match=rf"limits\.max_epochs = {limit:g}"):
            check_steps(recipe(train=train), own, 10)


def test_an_algorithm_that_is_not_allowed_is_refused_by_name():
    own = client(limits={"algorithms": ["fedavg", "fedprox"]})
    own_recipe(recipe(algorithm__name="fedprox"), own)
    assert "algorithm.name = 'fedadam' is not in limits.algorithms" in refusal(
        recipe(algorithm__name="fedadam"), own
    )


def test_a_base_model_may_be_allowed_by_its_content():
    own = client(limits={"model_sha256": ["ab" * 32]})
    check_base(own, "ab" * 32)
    check_base(client(), "cd" * 32)
    with pytest.raises(Declined, match=f"{'cd' * 32}, is not in limits.model_sha256"):
        check_base(own, "cd" * 32)


def test_no_round_begins_once_the_hours_of_a_run_are_used_up():
    own = client(limits={"max_hours": 0.5})
    check_hours(own, 1799.9)
    check_hours(client(), 1e9)
    with pytest.raises(Declined, match=r"limits\.max_hours = 0\.5 is used up in this run"):
        check_hours(own, 1800.0)


# --- the base model ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["/srv/models/llama", "./llama", "../llama", "~/llama", "models/by/us", "models\\us", "us/"],
)
def test_a_path_on_the_server_is_no_model_here(name):
    """Even if it does not exist here: it would be looked up on the hub or on this disk."""
    text = refusal(recipe(model__name=name), client())
    assert "model.name is a path on the server; set model to this client's own copy" in text
    assert own_recipe(recipe(model__name=name), client(model="/own")).model.name == "/own"


def test_a_path_on_the_server_that_exists_here_is_refused_too(tmp_path, monkeypatch):
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("models/llama", "models", str(tmp_path / "models" / "llama")):
        assert "is a path on the server" in refusal(recipe(model__name=name), client())


@pytest.mark.parametrize(
    "name", ["smollm2-135m-instruct", "owner/model", "gpt2", "o-w.n_er/M0del.v2"]
)
def test_named_models_and_hub_ids_are_accepted(name):
    assert own_recipe(recipe(model__name=name), client()).model.name == name


# --- simulated clients as real ones -------------------------------------------------------------


def read_back(tmp_path, rows, run, model=None):
    """Write the rows as those of real clients, and read them through their configurations."""
    paths = write_client_configs(
        tmp_path / "clients", rows, run, model=model, state=lambda name: tmp_path / "state" / name
    )
    assert list(paths) == sorted(rows)
    return {name: own_rows(run, load_client_config(path)) for name, path in paths.items()}


def test_rows_survive_being_handed_to_the_clients(tmp_path):
    data = write_jsonl(tmp_path / "h.jsonl", hospital_rows())
    run = recipe(data={"path": str(data)}, partition={"by": "source"})
    rows = load_clients(run.data, run.partition, seed=run.seed)
    assert read_back(tmp_path, rows, run) == rows


@pytest.mark.parametrize(
    "data",
    [
        {"system": "Réponds en une phrase."},
        {"eval_fraction": 0.5},
        {"max_rows": 3},
        {"system": "S", "max_rows": 2, "eval_fraction": 0.3},
    ],
)
def test_rows_survive_with_every_format_of_the_recipe(tmp_path, data):
    place = write_jsonl(tmp_path / "h.jsonl", hospital_rows())
    run = recipe(data={"path": str(place), **data}, partition={"by": "source"})
    rows = load_clients(run.data, run.partition, seed=run.seed)
    assert read_back(tmp_path, rows, run) == rows


SIGNS = '\u2028\u2029\x85\x0b\x0c\x1c\x00\x7f\ufeff\u200f北京é👩‍⚕️"\\{}\t\n\r'
texts = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from(SIGNS), min_size=1
).filter(str.strip)
turns = st.tuples(texts, texts, st.none() | texts).map(
    lambda t: (
        *([{"role": "system", "content": t[2]}] if t[2] else []),
        {"role": "user", "content": t[0]},
        {"role": "assistant", "content": t[1]},
    )
)
parts = st.lists(turns, min_size=1, max_size=3).map(tuple)


@given(names=st.lists(texts, min_size=1, max_size=3, unique=True), data=st.data())
def test_any_text_survives_in_names_and_rows(tmp_path_factory, names, data):
    rows = {name: ClientRows(name, data.draw(parts), data.draw(parts)) for name in names}
    assert read_back(tmp_path_factory.mktemp("any"), rows, recipe()) == rows


def test_a_simulated_client_gets_its_own_rows_and_nothing_else(tmp_path):
    run = recipe(runtime={"name": "flower", "device": "cpu", "threads": 2})
    talk = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    rows = {name: ClientRows(name, (talk,), (talk,)) for name in ("a/b", "north")}
    paths = write_client_configs(
        tmp_path / "c", rows, run, model="/base", state=lambda name: Path("kept") / name
    )
    own = load_client_config(paths["a/b"])
    assert own.name == "a/b"
    assert own.model == "/base"
    assert own.state == str(Path("kept").absolute() / "a/b")
    assert own.runtime == OwnRuntimeConfig(
        device="cpu", threads=2, turn=str(tmp_path / "c" / "turn")
    )
    folders = {path.parent for path in paths.values()}
    assert len(folders) == 2
    assert all(folder.parent == tmp_path / "c" for folder in folders)
    text = (paths["north"].parent / "train.jsonl").read_text(encoding="utf-8")
    assert json.loads(text) == {"messages": list(talk)}


# --- privacy -------------------------------------------------------------------------------------

PRIVATE = {
    "unit": "record",
    "noise_multiplier": 1.0,
    "delta": 1e-3,
    "clip_norm": 0.5,
}
AT_CLIENT = {**PRIVATE, "unit": "client", "noise_at": "client"}
OWN = {"epsilon": 2.0, "delta": 1e-5}


def private(**changes):
    """A recipe as a server sends it, without the checks of an honest server."""
    privacy = {**PRIVATE, **changes.pop("privacy", {})}
    run = recipe(privacy=PRIVATE, **changes)
    return run.model_copy(update={"privacy": PrivacyConfig.model_validate(privacy)})


@pytest.mark.parametrize("half", [{"epsilon": 3.0}, {"delta": 1e-5}])
def test_an_epsilon_without_its_delta_is_no_limit(tmp_path, half):
    table = {"name": "n", "data": {"path": "r.jsonl"}, "limits": half}
    with pytest.raises(ConfigError, match="epsilon and delta belong together: give both"):
        load_client_config(write(tmp_path, tomli_w.dumps(table)))


@pytest.mark.parametrize("limits", [{"epsilon": 0.0}, {"epsilon": -1.0}, {"delta": 0.0}])
def test_a_limit_of_zero_or_less_is_refused(tmp_path, limits):
    table = {"name": "n", "data": {"path": "r.jsonl"}, "limits": {**OWN, **limits}}
    with pytest.raises(ConfigError, match=f"limits.{next(iter(limits))}"):
        load_client_config(write(tmp_path, tomli_w.dumps(table)))


def test_a_clients_own_epsilon_requires_noise_at_this_client():
    own = client(limits=OWN)
    at_server = {"unit": "client", "noise_at": "server"}
    for run in (recipe(), private(algorithm__weights="uniform", privacy=at_server)):
        assert "limits.epsilon requires noise at this client" in refusal(run, own)
        assert own_recipe(run, client()).privacy == run.privacy, "without a limit it is accepted"
    for privacy in (PRIVATE, AT_CLIENT):
        assert own_recipe(private(privacy=privacy), own).privacy.is_at_client


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        ({"target_epsilon": 9.0, "delta": 0.999}, (2.0, 1e-5)),
        ({"target_epsilon": 0.5, "delta": 1e-9}, (0.5, 1e-9)),
        ({"target_epsilon": 9.0, "delta": 1e-9}, (2.0, 1e-9)),
    ],
)
def test_the_smaller_epsilon_and_delta_count(asked, taken):
    run = private(privacy={**asked, "noise_multiplier": None})
    here = own_recipe(run, client(limits=OWN)).privacy
    assert (here.target_epsilon, here.delta) == taken
    assert own_recipe(run, client()).privacy == run.privacy


def test_a_limit_does_not_become_a_target_next_to_a_noise_multiplier():
    here = own_recipe(private(), client(limits=OWN)).privacy
    assert (here.noise_multiplier, here.target_epsilon, here.delta) == (1.0, None, 1e-5)


def test_a_clients_own_max_rows_contradicts_the_protection_of_rows():
    own = client(data={"path": "r.jsonl", "max_rows": 4})
    assert "data.max_rows of this client keeps a fixed number of rows" in refusal(private(), own)
    for run in (recipe(), private(privacy=AT_CLIENT)):
        assert own_recipe(run, own).data.max_rows == 4


@pytest.mark.parametrize("privacy", [PRIVATE, AT_CLIENT])
@pytest.mark.parametrize("limits", [{}, OWN])
def test_seeded_noise_is_refused_by_every_real_client(privacy, limits):
    run = private(privacy={**privacy, "noise": "seeded"})
    assert "'seeded' protects nobody" in refusal(run, client(limits=limits))


@pytest.mark.parametrize(
    ("part", "key", "value", "why"),
    [
        ("data", "max_rows", 4, "data.max_rows: keeps a fixed number of rows"),
        ("train", "packing", True, "train.packing: merges rows"),
        ("train", "compat", ("same-samples",), "rules out a secret draw of rows"),
        ("model", "gradient_checkpointing", True, "hides the gradients of single rows"),
        ("adapter", "dora", True, "without dora"),
        ("privacy", "noise_multiplier", None, "give either noise_multiplier or target_epsilon"),
        ("privacy", "target_epsilon", 3.0, "give either noise_multiplier or target_epsilon"),
        ("privacy", "clipping", "adaptive", "only works with noise at the server"),
        (
            "privacy",
            "clip_norm",
            math.inf,
            "privacy.clip_norm = inf is outside the range that float32",
        ),
        (
            "privacy",
            "clip_norm",
            1e30,
            "privacy.clip_norm = 1e+30 is outside the range that float32",
        ),
        (
            "privacy",
            "clip_norm",
            1e-40,
            "privacy.clip_norm = 1e-40 is outside the range that float32",
        ),
    ],
)
def test_a_client_checks_by_itself_what_an_honest_server_would_have_refused(part, key, value, why):
    run = private()
    own = client(limits=OWN)
    own_recipe(run, own)
    changed_part = getattr(run, part).model_copy(update={key: value})
    assert why in refusal(run.model_copy(update={part: changed_part}), own)


TRAP = (
    "{% for m in messages %}{% if 'measles' in m.content %}{{ 'x' * 9999 }}{% endif %}{% endfor %}"
)


def test_a_private_recipe_cannot_bring_a_program_that_reads_rows(tmp_path):
    """With one, the number of rows that fit train.max_length could answer any question."""
    run = private(data={"path": "x.jsonl", "template": TRAP})
    assert "data.template is a program from the server" in refusal(run, client())
    mine = client(data={"path": "own.jsonl", "template": "alpaca"})
    assert own_recipe(run, mine).data.template == "alpaca"
    own_recipe(private(data={"path": "x.jsonl", "template": "vicuna"}), client())
    open_ = recipe(data={"path": "x.jsonl", "template": TRAP})
    assert own_recipe(open_, client()).data.template == TRAP, "there is nothing to protect"


def test_clients_of_a_rehearsal_agree_to_the_template_of_its_recipe(tmp_path):
    talk = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    run = private(data={"path": "x.jsonl", "template": CHATML})
    paths = write_client_configs(
        tmp_path / "c", {"north": ClientRows("north", (talk,), (talk,))}, run,
        model="/base", state=lambda name: tmp_path / name,
    )  # fmt: skip
    assert own_recipe(run, load_client_config(paths["north"])).data.template == CHATML
