"""Every algorithm on a real model: whole runs in process, and over an engine's real processes."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

import silotune
from silotune.algorithms import ALGORITHMS
from silotune.core.errors import ConfigError, Declined
from silotune.core.processors import usable_threads
from silotune.core.tree import layout_of, sha256
from silotune.federation.client_config import ClientConfig
from silotune.federation.client_recipe import own_recipe
from silotune.federation.run_folder import RunFolder
from silotune.recipes.parse import load_recipe
from tests.conftest import hospital_rows, write_jsonl, write_tiny_recipe

PLAIN_SGD = ["train.optimizer=sgd", "train.clip_norm=0", "train.lr=0.5"]
OWN_WAY = {
    "scaffold": PLAIN_SGD,
    "feddyn": ["algorithm.alpha=1.0"],
    "krum": ["algorithm.attackers=0"],
    "multi_krum": ["algorithm.attackers=0"],
    "norm_bound": ["algorithm.norm=0.05"],
}
NEW = sorted(set(ALGORITHMS) - {"fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad"})


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model):
    place = tmp_path_factory.mktemp("algorithms")
    path = write_tiny_recipe(place, tiny_model)
    write_jsonl(place / "hospitals.jsonl", hospital_rows(per_client=4))
    return path


@pytest.fixture(scope="module")
def plain(recipe, tmp_path_factory):
    """FedAvg, with Adam and with plain steps."""
    place = tmp_path_factory.mktemp("plain")
    return {
        "adamw": silotune.run(recipe, out=place / "adamw"),
        "sgd": silotune.run(recipe, PLAIN_SGD, out=place / "sgd"),
    }


@pytest.mark.parametrize("name", NEW)
def test_it_trains_the_model_and_differs_from_fedavg(recipe, plain, tmp_path, name):
    own = OWN_WAY.get(name, [])
    done = silotune.run(recipe, [f"algorithm.name={name}", *own], out=tmp_path / "run")
    like = plain["sgd" if own == PLAIN_SGD else "adamw"]
    assert done.summary["adapter_sha256"] != like.summary["adapter_sha256"]
    losses = [r["loss"] for r in done.metrics if r["event"] == "evaluate" and "loss" in r]
    assert len(losses) == 4 * 3  # three clients, rounds 0 to 3
    base, last = sum(losses[:3]), sum(losses[-3:])
    assert last < base
    own = "hospital-0" if ALGORITHMS[name][0].facts.keeps else None
    assert done.ask("What is a1?", client=own, max_new_tokens=2) is not None


def test_scaffold_keeps_its_variates_at_the_clients_and_their_mean_at_the_server(recipe, tmp_path):
    keys = ["algorithm.name=scaffold", *PLAIN_SGD, "sampling.num_clients=2", "rounds=4"]
    done = silotune.run(recipe, keys, out=tmp_path / "run")
    state = RunFolder.open(tmp_path / "run").load_state()
    assert state is not None
    server = state.extra["control"]
    total = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in server.items()}
    for folder in (tmp_path / "run" / "clients").iterdir():
        kept = load_file(sorted(folder.glob("round-*.safetensors"))[-1])
        for name in total:
            total[name] += kept[f"control/{name}"].double() / 3
    for name, mean in total.items():
        torch.testing.assert_close(server[name].double(), mean, rtol=1e-4, atol=1e-6)
    sent = [r for r in done.metrics if r["event"] == "train"]
    assert {r["bytes_up"] for r in sent} == {2 * 4 * sum(t.numel() for t in server.values())}


def losses_of(done, round_):
    rows = [r for r in done.metrics if r["event"] == "evaluate" and r["round"] == round_]
    return [r["loss"] for r in rows if "loss" in r]


def test_an_exported_residual_is_only_in_the_result_and_its_score(recipe, plain, tmp_path):
    keys = ["algorithm.name=fedex", "algorithm.residual=export"]
    done, mean = silotune.run(recipe, keys, out=tmp_path / "run"), plain["adamw"]
    states = [RunFolder.open(run.path).load_state() for run in (done, mean)]
    assert sha256(states[0].adapter) == sha256(states[1].adapter)
    sizes = [
        [(r["bytes_up"], r["bytes_down"]) for r in run.metrics if r["event"] == "train"]
        for run in (done, mean)
    ]
    assert sizes[0] == sizes[1]
    assert losses_of(done, 2) == losses_of(mean, 2)
    assert losses_of(done, 3) != losses_of(mean, 3)
    ranks = [{len(t) for n, t in run.adapter().items() if "lora_A" in n} for run in (done, mean)]
    assert min(ranks[0]) > max(ranks[1])
    assert done.ask("What is a1?", max_new_tokens=2) is not None


def test_fed_sb_sends_rank_squared_numbers_and_leaves_a_plain_adapter(recipe, plain, tmp_path):
    keys = ["algorithm.name=fed_sb", "finish.local_steps=1"]
    done = silotune.run(recipe, keys, out=tmp_path / "run")
    saved = done.adapter()
    assert layout_of(saved) == layout_of(plain["adamw"].adapter())
    squares = 4 * sum(len(t) ** 2 for n, t in saved.items() if "lora_A" in n)
    sent = {r["round"]: r["bytes_up"] for r in done.metrics if r["event"] == "train"}
    assert sent[3] == squares < min(sent[1], sent[2])
    own = done.load(client="hospital-0")
    assert own.parameters.keys() == saved.keys()
    assert any(not torch.equal(own.parameters[n].detach(), t) for n, t in saved.items())


def test_scaffold_wants_plain_steps_or_says_what_it_is(recipe, tmp_path):
    with pytest.raises(ConfigError) as caught:
        silotune.run(recipe, ["algorithm.name=scaffold"], out=tmp_path / "run")
    text = str(caught.value)
    assert "train.optimizer: must be \"sgd\" with algorithm 'scaffold'" in text
    assert "train.clip_norm: must be 0" in text
    assert 'Or set algorithm.variates = "displacement", about which nothing is proved' in text
    keys = ["algorithm.name=scaffold", "algorithm.variates=displacement", "rounds=1"]
    silotune.run(recipe, keys, out=tmp_path / "run")


@pytest.mark.parametrize("name", [n for n, (cfg, _) in ALGORITHMS.items() if cfg.facts.needs_lora])
def test_what_needs_two_factors_refuses_other_adapters(recipe, name):
    for key, why in (
        ("adapter.kind=ia3", "which works on LoRA's two"),
        ("adapter.dora=true", "DoRA"),
    ):
        other = ["adapter.targets=none", "adapter.rank=none", "adapter.alpha=none"]
        other += ["adapter.dropout=none"] if "ia3" in key else []
        with pytest.raises(ConfigError, match=why):
            silotune.check(recipe, [f"algorithm.name={name}", key, *other])


@pytest.mark.parametrize("name", ["median", "flexlora", "scaffold", "feddyn"])
def test_noise_for_clients_at_the_server_refuses_what_it_does_not_cover(recipe, name):
    private = ["privacy.unit=client", "privacy.delta=0.1", "privacy.noise_multiplier=1"]
    own = [*OWN_WAY.get(name, []), "algorithm.weights=uniform", "evaluate.every=0"]
    with pytest.raises(ConfigError, match=f"'{name}' cannot be used with privacy.unit = 'client'"):
        silotune.check(recipe, [f"algorithm.name={name}", *own, *private])


def test_too_few_clients_for_krum_are_refused_before_the_run(recipe, tmp_path):
    with pytest.raises(
        ConfigError, match=r"attackers = 1 needs 5 updates in a round, which asks 3"
    ):
        silotune.run(recipe, ["algorithm.name=krum"], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


OWN = """
from dataclasses import replace
from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.core.algorithm import LocalRule

def lazy(cfg, *, only="lora_B"):
    plain = fedavg(FedAvgConfig(weights=cfg.weights))
    return replace(plain, local=LocalRule(trains=lambda name, round_: only in name))

def nothing(cfg):
    return None

def fails(cfg):
    raise RuntimeError("no luck")
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's own on the path."""
    (tmp_path / "my_rules.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "algorithm.name=python:my_rules:"
    sys.modules.pop("my_rules", None)


def test_an_algorithm_of_ones_own_runs_and_resumes_like_any_other(recipe, own, tmp_path):
    """It trains B only, as FFA-LoRA does: the same bytes."""
    mine = silotune.run(recipe, [f"{own}lazy"], out=tmp_path / "mine")
    ours = silotune.run(recipe, ["algorithm.name=ffa_lora"], out=tmp_path / "ours")
    assert mine.summary["adapter_sha256"] == ours.summary["adapter_sha256"]
    assert mine.summary["algorithm"] == "python:my_rules:lazy"
    other = silotune.run(
        recipe, [f"{own}lazy", "algorithm.options.only=q_proj"], out=tmp_path / "q"
    )
    assert other.summary["adapter_sha256"] != mine.summary["adapter_sha256"]


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        (["lasy"], r"'my_rules' has no function 'lasy'\. Did you mean 'lazy'\?\n  Its functions: "),
        (["nothing"], r"returns a NoneType\.\n  It must return a silotune"),
        (["fails"], r"cannot be built: RuntimeError: no luck\.\n"),
        (["lazy", "algorithm.options.onyl=x"], r"has no option 'onyl'\. Did you mean 'only'"),
    ],
)
def test_what_is_wrong_with_ones_own_code_is_said_before_the_run(recipe, own, keys, why):
    with pytest.raises(ConfigError, match=why):
        silotune.check(recipe, [f"{own}{keys[0]}", *keys[1:]])


def test_a_module_that_is_not_there_names_the_path(recipe):
    with pytest.raises(
        ConfigError, match=r"cannot be imported: ModuleNotFoundError[\s\S]*PYTHONPATH"
    ):
        silotune.check(recipe, ["algorithm.name=python:nobody_has_this:f"])


def test_own_code_cannot_be_made_private_at_the_server(recipe, own):
    private = ["privacy.unit=client", "privacy.delta=0.1", "privacy.noise_multiplier=1"]
    with pytest.raises(ConfigError, match="own code cannot be made private"):
        silotune.check(recipe, [f"{own}lazy", "evaluate.every=0", *private])


def test_a_real_client_runs_own_code_only_if_its_limits_name_it(recipe, own, tmp_path):
    run = load_recipe(recipe, [f"{own}lazy"])
    rows = {"path": str(recipe.parent / "hospitals.jsonl")}
    client = {"name": "north", "data": rows, "model": run.model.name}
    with pytest.raises(Declined, match=r"runs it only if limits\.algorithms names it"):
        own_recipe(run, ClientConfig.model_validate(client))
    allowed = {**client, "limits": {"algorithms": ["python:my_rules:lazy"]}}
    assert own_recipe(run, ClientConfig.model_validate(allowed)).algorithm == run.algorithm


def test_kept_moments_change_the_second_round_and_stay_at_the_clients(recipe, plain, tmp_path):
    keys = ["train.keep_moments=true"]
    done = silotune.run(recipe, keys, out=tmp_path / "run")
    first, other = (
        [r["train_loss"] for r in run.metrics if r["event"] == "train"]
        for run in (done, plain["adamw"])
    )
    assert first[:3] == other[:3]
    assert first[6:] != other[6:]
    memory = load_file(tmp_path / "run" / "clients" / "hospital-0" / "round-00003.safetensors")
    assert {"optimizer.exp_avg", "optimizer.exp_avg_sq"} <= {k.split("/")[0] for k in memory}
    steps = {float(t) for k, t in memory.items() if k.startswith("optimizer.step/")}
    assert steps == {6.0}  # three rounds of two steps
    state = RunFolder.open(tmp_path / "run").load_state()
    assert state is not None
    assert not state.extra


def test_factors_that_rest_for_a_round_keep_their_moments(recipe, tmp_path):
    keys = ["algorithm.name=rolora", "train.keep_moments=true"]
    silotune.run(recipe, keys, out=tmp_path / "run")
    memory = load_file(tmp_path / "run" / "clients" / "hospital-0" / "round-00003.safetensors")
    steps = {k: float(t) for k, t in memory.items() if k.startswith("optimizer.step/")}
    assert {n for k, n in steps.items() if "lora_B" in k} == {4.0}  # rounds 1 and 3
    assert {n for k, n in steps.items() if "lora_A" in k} == {2.0}  # round 2


def test_moments_need_an_optimizer_that_has_them(recipe):
    with pytest.raises(ConfigError, match="keep_moments needs optimizer = 'adamw'"):
        silotune.check(recipe, ["train.keep_moments=true", "train.optimizer=sgd"])


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NEW)
def test_over_an_engine_it_gives_the_same_bytes(recipe, tmp_path, name):
    keys = [f"algorithm.name={name}", *OWN_WAY.get(name, []), "rounds=2"]
    engine = ["runtime.name=flower-simulation", f"runtime.client_cpus={usable_threads()}"]
    here = silotune.run(recipe, keys, out=tmp_path / "here")
    there = silotune.run(recipe, [*keys, *engine], out=tmp_path / "there")
    assert there.summary["adapter_sha256"] == here.summary["adapter_sha256"]


def test_auto_is_chosen_once_printed_and_recorded(recipe, plain, tmp_path, capsys):
    done = silotune.run(recipe, ["algorithm.name=auto"], out=tmp_path / "run")
    assert done.summary["adapter_sha256"] == plain["adamw"].summary["adapter_sha256"]
    assert done.config.algorithm.name == "fedavg"
    said = silotune.check(recipe, ["algorithm.name=auto"]).chosen
    assert said.startswith("algorithm.name = 'auto' is fedavg: nothing hides single updates")
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text(encoding="utf-8"))
    assert provenance["algorithm"] == said
    assert silotune.check(recipe).chosen == ""
    (tmp_path / "run" / "summary.json").unlink()
    assert silotune.run(resume=tmp_path / "run").summary == done.summary | {
        key: value
        for key, value in silotune.Run(tmp_path / "run").summary.items()
        if "seconds" in key or "base_model_loads" in key or "peak" in key or key == "predicted"
    }
