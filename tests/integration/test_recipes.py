"""The published systems as recipes: each runs whole on a tiny model, and holds their numbers.

Only what makes a run short and local is overridden: the model, the rows, numbers of clients, rounds
and steps. Adapter, quantisation, optimizer, schedule, template and algorithm are the recipe's.
"""

import json
from importlib.resources import files

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import silotune
from silotune.core.errors import ConfigError
from silotune.federation.sampling import cohort_size
from silotune.models.adapters import put_adapter
from silotune.privacy.accountant import spent
from silotune.recipes.parse import load_recipe
from silotune.training.loop import num_rows, round_lr
from tests.conftest import write_jsonl
from tests.published import published_config

PUBLISHED = {
    # recipe: clients, clients a round, rounds, steps, sizes of the model, trained numbers
    "flowertune": (20, 2, 100, 10, "open_llama_3b", 10_649_600),
    "blueprint": (20, 2, 100, 10, "open_llama_3b", 10_649_600),
    "medical-dora": (20, 3, 10, 6, "llama_3_8b", 13_795_328),
    "flowertune-general": (20, 2, 200, 10, "mistral_7b", 13_631_488),
    "flowertune-medical": (20, 2, 200, 10, "mistral_7b", 13_631_488),
    "flowertune-finance": (50, 5, 200, 10, "mistral_7b", 13_631_488),
    "flowertune-code": (10, 2, 200, 10, "mistral_7b", 13_631_488),
}
"""From the published configurations and adapter sizes."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_holds_the_published_numbers(name):
    clients, asked, rounds, steps, _, _ = PUBLISHED[name]
    run = load_recipe(name)
    assert run.partition is not None
    assert run.partition.num_clients == clients
    assert cohort_size(run.sampling, clients) == asked
    assert (run.rounds, num_rows(run.train, 1)) == (rounds, steps * 16)
    assert (run.adapter.rank, run.adapter.alpha, run.adapter.dropout) == (32, 64, 0.075)
    assert (run.train.lr, run.train.lr_min, run.train.schedule) == (5e-5, 1e-6, "cosine")
    assert run.train.max_length == 512
    assert run.checkpoint.every == 5
    assert round_lr(run.train, 1, rounds) == 5e-5  # corrected: published runs never use it


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_adapter_on_the_published_model_has_the_published_number_of_values(name):
    size, values = PUBLISHED[name][4:]
    config = published_config(size)
    with torch.device("meta"):  # shapes without memory
        base = AutoModelForCausalLM.from_config(config)
        model = put_adapter(base, load_recipe(name).adapter, 1, None)
    learning = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in learning) == values


@pytest.fixture(scope="module")
def instruct_file(tmp_path_factory):
    """Rows with the columns of Alpaca, FinGPT and the medical flashcards."""
    rows = [
        {
            "instruction": f"Say how {word} it is.",
            "input": f"case {i}" if i % 2 else "",
            "output": f"It is {word} {i}.",
        }
        for i, word in enumerate(["red", "small", "old", "new"] * 12)
    ]
    flashcards = [{**row, "input": row["input"] or "case"} for row in rows]
    place = tmp_path_factory.mktemp("rows")
    write_jsonl(place / "instruct.jsonl", rows)
    return write_jsonl(place / "flashcards.jsonl", flashcards).parent


def shortened(name: str, model, rows) -> list[str]:
    file = "flashcards" if "medical" in name else "instruct"
    return [
        f"model.name={model}",
        "model.dtype=float32",
        f"data.path={rows / file}.jsonl",
        "data.eval_fraction=0.2",
        "partition.num_clients=4",
        "sampling.fraction=0.5",
        "rounds=2",
        "train.batch_size=2",
        "train.local_steps=3",
        "track=none",
        "report.page=false",
        "report.samples=0",
    ]


AT_ONCE = ("flowertune", "medical-dora")
"""4 bits and a schedule; DoRA and a proximal term. What the others add is in files of its own."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in AT_ONCE else pytest.mark.slow) for n in PUBLISHED],
)
def test_a_recipe_runs_end_to_end_on_a_small_model(name, wide_model, instruct_file, tmp_path):
    run = load_recipe(name)
    done = silotune.run(name, shortened(name, wide_model, instruct_file), out=tmp_path / "run")
    assert done.summary["rounds"] == 2
    assert done.summary["base_model_loads"] == 1
    trained = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(t.dtype == torch.float32 for t in trained.values())
    assert any("magnitude" in n for n in trained) == run.adapter.dora
    moved = [t for n, t in trained.items() if "lora_B" in n]
    assert all(t.abs().max() > 0 for t in moved)
    rows = [r for r in done.metrics if r["event"] == "train"]
    assert {r["status"] for r in rows} == {"ok"}
    assert (max(r["penalty"] for r in rows) > 0) == (name == "medical-dora")  # the term acts
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["use_dora"] == run.adapter.dora
    private = done.privacy
    assert (private is not None) == (name == "blueprint")
    if private is not None:
        assert private["epsilon"]["pld"] <= 3
        assert private["promise"]["unit"].startswith("record")
    asked = done.ask("Say how old it is.", max_new_tokens=3)
    assert isinstance(asked, str)


@pytest.mark.parametrize("name", [n for n in PUBLISHED if load_recipe(n).track])
def test_a_leaderboards_rules_are_kept_or_the_track_falls_away(name, instruct_file):
    own = f"data.path={instruct_file / 'instruct.jsonl'}"
    with pytest.raises(ConfigError, match=r"allow:\n.*data\.path[\s\S]*track=none"):
        silotune.check(name, [own, f"track={load_recipe(name).track}"])
    assert load_recipe(name, [own]).track is None


def test_the_blueprints_published_privacy_is_worth_what_its_noise_says(instruct_file):
    """Noise 0.02 of the clip norm, in 100 rounds: if it were clipped, and it never is."""
    keys = [
        *("privacy=none", f"data.path={instruct_file / 'instruct.jsonl'}"),
        "algorithm.weights=uniform",
        *("privacy.unit=client", "privacy.noise_multiplier=0.02", "privacy.clip_norm=0.5"),
        *("privacy.delta=1e-5", "rounds=100"),
    ]
    promise = silotune.check("blueprint", keys).promise
    assert promise is not None
    noise = {"noise_multiplier": 0.02, "delta": 1e-5}
    run = silotune.check("blueprint", keys).run
    in_all, fraction = run.rounds, run.sampling.fraction
    assert promise["num_releases"] == in_all == 100
    asked_always = promise["epsilon"]["pld"]
    asked_in_ten = spent(num_releases=round(in_all * fraction), **noise).pld
    secret = spent(num_releases=in_all, sampling_rate=fraction, **noise).pld
    told = (files("silotune.recipes") / "blueprint.toml").read_text()
    for epsilon in (asked_always, asked_in_ten, secret):
        assert f"{epsilon:,.0f}" in told
