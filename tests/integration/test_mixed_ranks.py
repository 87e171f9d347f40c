"""Clients of several ranks in whole runs: what travels, what is kept, what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

import silotune
from silotune.algorithms import ALGORITHMS
from silotune.core.errors import ConfigError, Declined
from silotune.core.lora import is_beside, joined
from silotune.core.processors import usable_threads
from silotune.core.tree import sha256, size_bytes
from silotune.federation.client_config import ClientConfig
from silotune.federation.client_recipe import own_recipe
from silotune.federation.progress import Progress
from silotune.federation.run_folder import RunFolder
from silotune.recipes.parse import load_recipe
from tests.conftest import hospital_rows, write_jsonl, write_tiny_recipe

MIXED = [name for name, (cfg, _) in ALGORITHMS.items() if cfg.facts.mixed_ranks]
RANKS = 'adapter.ranks={ hospital-0 = 1, "hospital-2" = 2 }'
KEYS = ["adapter.rank=4", RANKS]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model):
    place = tmp_path_factory.mktemp("mixed")
    path = write_tiny_recipe(place, tiny_model)
    write_jsonl(place / "hospitals.jsonl", hospital_rows(per_client=4))
    return path


class Stops(Progress):
    """Ends a run after two rounds, as a kill would."""

    def end_round(self, round_, rows):
        if round_ == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", MIXED)
def test_each_client_sends_its_own_rank_and_a_resumed_run_ends_alike(recipe, tmp_path, name):
    keys = [f"algorithm.name={name}", *KEYS, "train.keep_moments=true"]
    done = silotune.run(recipe, keys, out=tmp_path / "run")
    rows = [r for r in done.metrics if r["event"] == "train"]
    sent = {r["client"]: r["bytes_up"] for r in rows}
    assert {client: size / sent["hospital-0"] for client, size in sent.items()} == {
        "hospital-0": 1.0,
        "hospital-1": 4.0,
        "hospital-2": 2.0,
    }
    rounds = [r for r in done.metrics if r["event"] == "round"]
    error = max(r["aggregation_error"] for r in rounds)
    assert (error < 1e-5) == (name == "flora")
    losses = [r["loss"] for r in done.metrics if r["event"] == "evaluate" and "loss" in r]
    assert sum(losses[-3:]) < sum(losses[:3])
    with pytest.raises(KeyboardInterrupt):
        silotune.run(recipe, keys, out=tmp_path / "stopped", progress=Stops())
    again = silotune.run(resume=tmp_path / "stopped")
    assert again.summary["adapter_sha256"] == done.summary["adapter_sha256"]


@pytest.mark.parametrize("name", ["flora", "fedex"])
def test_the_result_is_one_plain_adapter_with_the_function_of_the_checkpoint(
    recipe, tmp_path, name
):
    done = silotune.run(recipe, [f"algorithm.name={name}"], out=tmp_path / "run")
    state = RunFolder.open(tmp_path / "run").load_state()
    assert state is not None
    beside = {n for n in state.adapter if is_beside(n)}
    assert len(beside) == 8  # two factors of four modules
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert sha256(saved) == sha256(joined(state.adapter)) == sha256(done.adapter())
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    ranks = {len(t) for n, t in saved.items() if "lora_A" in n}
    assert ranks <= {config["r"], *config["rank_pattern"].values()}
    sizes = [r["bytes_down"] for r in done.metrics if r["event"] == "train"]
    assert sizes[0] < sizes[-1] <= size_bytes(state.adapter)
    last = [r for r in done.metrics if r["event"] == "round"][-1]
    assert last["residual_rank"] >= 2
    assert last["aggregation_error"] < 1e-5
    assert done.ask("What is a1?", max_new_tokens=2) is not None
    place = done.export("merged", to=tmp_path / "merged")
    assert (place / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        (
            ["algorithm.name=flora", "adapter.ranks={ hospital-9 = 1 }"],
            "has no client 'hospital-9'",
        ),
        (["algorithm.name=flora", "adapter.ranks={ hospital-0 = 9 }"], "above rank = 2"),
        (
            ["algorithm.name=flora", "adapter.ranks={ hospital-0 = 0 }"],
            "greater than or equal to 1",
        ),
        (["adapter.ranks={ hospital-0 = 1 }"], "algorithm 'fedavg', which averages factors of one"),
        (
            ["algorithm.name=flora", RANKS, "compare.algorithms=[{ name = 'fedex' }]"],
            "algorithm 'fedex', which averages factors of one rank; use one of: flexlora, hetlora",
        ),
        (["algorithm.name=flora", RANKS, "finish.local_steps=1"], "cannot be used with finish"),
        (
            ["algorithm.name=flora", RANKS, "adapter.peft={ rank_pattern = { q_proj = 4 } }"],
            r"ranks cannot be used with peft\.rank_pattern",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_the_run(recipe, keys, why):
    with pytest.raises(ConfigError, match=why):
        silotune.check(recipe, keys)


def test_a_real_clients_limit_decides_its_rank_or_that_it_stays_away(recipe):
    rows = {"path": str(recipe.parent / "hospitals.jsonl")}

    def own(*keys, **limits):
        run = load_recipe(recipe, ["adapter.rank=4", "adapter.alpha=8", *keys])
        client = {"name": "north", "data": rows, "model": run.model.name, "limits": limits}
        return own_recipe(run, ClientConfig.model_validate(client)).adapter

    told = own("algorithm.name=flora", RANKS, rank=1)
    assert (told.rank, told.alpha, told.ranks) == (1, 2, {})
    assert own("algorithm.name=flora", "adapter.rslora=true", rank=1).alpha == 4
    assert own("algorithm.name=flora", rank=8).rank == own("algorithm.name=fedavg").rank == 4
    with pytest.raises(Declined, match=r"adapter\.rank = 4 is above limits\.rank = 1, and algo"):
        own("algorithm.name=fedex", rank=1)
    pattern = "adapter.peft={ rank_pattern = { q_proj = 6 } }"
    with pytest.raises(Declined, match=r"rank = 6 is above limits\.rank = 5, and adapter\.peft"):
        own("algorithm.name=flora", pattern, rank=5)
    assert own("algorithm.name=flora", pattern, rank=6).rank == 4


def test_the_server_learns_next_to_what_stands_beside_the_adapter(recipe, tmp_path):
    keys = ["algorithm.name=flora", "server.data_fraction=0.3", "server.work=fine-tune"]
    done = silotune.run(recipe, [*keys, "rounds=2"], out=tmp_path / "run")
    state = RunFolder.open(tmp_path / "run").load_state()
    assert state is not None
    assert any(is_beside(n) for n in state.adapter)
    assert all(t.any() for n, t in state.adapter.items() if "lora_B" in n)  # the server's steps
    assert len([r for r in done.metrics if r["event"] == "server"]) == 2


def test_a_quantised_base_keeps_its_residual_in_32_bits(wide_model, tmp_path):
    path = write_tiny_recipe(tmp_path, wide_model)
    write_jsonl(tmp_path / "hospitals.jsonl", hospital_rows(per_client=4))
    keys = ["algorithm.name=fedex", "model.quantization=nf4", "rounds=2"]
    done = silotune.run(path, keys, out=tmp_path / "run")
    state = RunFolder.open(tmp_path / "run").load_state()
    assert state is not None
    beside = [t for n, t in state.adapter.items() if is_beside(n)]
    assert beside
    assert {t.dtype for t in beside} == {torch.float32}
    rounds = [r for r in done.metrics if r["event"] == "round"]
    assert max(r["aggregation_error"] for r in rounds) < 1e-4


def test_noise_for_rows_works_at_every_rank_and_next_to_a_residual(recipe, tmp_path):
    """Each client clips and hides its own change, before any aggregation."""
    private = ["privacy.unit=record", "privacy.delta=1e-2", "privacy.noise_multiplier=1"]
    keys = ["algorithm.name=flora", *KEYS, *private, "privacy.noise=seeded", "rounds=2"]
    done = silotune.run(recipe, keys, out=tmp_path / "run")
    state = RunFolder.open(tmp_path / "run").load_state()
    assert state is not None
    assert any(is_beside(n) for n in state.adapter)
    assert {r["status"] for r in done.metrics if r["event"] == "train"} == {"ok"}


def test_alone_a_client_trains_the_rank_that_it_has_in_the_federation(recipe, tmp_path):
    keys = ["algorithm.name=flora", *KEYS, "compare.seeds=1", "report.samples=0", "rounds=2"]
    silotune.compare(recipe, keys, out=tmp_path / "c")
    ranks = {}
    for path in (tmp_path / "c").rglob("adapter_model.safetensors"):
        for client in ("hospital-0", "hospital-1", "hospital-2"):
            if any(client in part for part in path.relative_to(tmp_path / "c").parts):
                saved = load_file(path)
                ranks[client] = {len(t) for n, t in saved.items() if "lora_A" in n}
                config = json.loads((path.parent / "adapter_config.json").read_text())
                assert config["lora_alpha"] / config["r"] == 1  # 4 / 4, the server's scaling
    assert ranks == {"hospital-0": {1}, "hospital-1": {4}, "hospital-2": {2}}


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(600)
@pytest.mark.parametrize("runtime", ["flower-simulation", "flower"])
def test_over_an_engine_and_with_real_clients_limits_it_gives_the_same_bytes(
    recipe, tmp_path, runtime
):
    """With `flower`, each client's own configuration says its rank."""
    keys = ["algorithm.name=flora", *KEYS, "rounds=2"]
    engine = [f"runtime.name={runtime}"]
    if runtime == "flower-simulation":
        engine.append(f"runtime.client_cpus={usable_threads()}")
    here = silotune.run(recipe, keys, out=tmp_path / "here")
    there = silotune.run(recipe, [*keys, *engine], out=tmp_path / "there")
    assert there.summary["adapter_sha256"] == here.summary["adapter_sha256"]
