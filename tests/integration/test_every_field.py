"""Every field of a recipe acts: moved from its default it changes the result or is refused."""

import json
import re
from pathlib import Path

import pytest

import silotune
from silotune.core.errors import ConfigError, SilotuneError
from silotune.recipes.mistakes import known_keys, sections
from silotune.recipes.parse import load_recipe
from silotune.training.generate import answers
from tests.conftest import build_tiny_model, hospital_rows, write_jsonl, write_tiny_recipe

# key=value -> what must differ from the plain run
CHANGES_THE_ADAPTER = [
    "seed=4",
    "rounds=2",
    "model.dtype=bfloat16",
    "adapter.kind=full",
    "adapter.rank=3",
    "adapter.alpha=9",
    "adapter.dropout=0.5",
    'adapter.targets=["k_proj"]',
    "adapter.rslora=true",
    "data.eval_fraction=0.5",
    "data.validation_fraction=0.3",
    "data.max_rows=3",
    'data.prompt="{source}: {question}"; data.completion="{answer}"',
    'data.system="Be brief."',
    "data.template=plain",
    "data.date=2001-02-03; data.template={{ strftime_now('%Y') }}{% for m in messages %}"
    "<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}",
    "data.split_seed=5",
    'partition.only=["hospital-0"]',
    "sampling.fraction=0.5",
    "sampling.num_clients=2",
    "server.data_fraction=0.2",
    "server.data_fraction=0.2; server.work=fine-tune",
    "train.batch_size=3",
    "train.accumulation=2",
    "train.local_steps=3",
    "train.local_steps=none; train.local_epochs=1",
    "train.optimizer=sgd",
    "train.keep_moments=true",
    "train.lr=1e-3",
    "train.schedule=cosine",
    "train.schedule=cosine; train.lr_min=1e-3",
    "train.schedule=cosine; train.compat=['late-schedule']",
    "train.compat=['same-samples']",
    "data.template=plain; train.compat=['no-end-token']",
    "train.optimizer=adamw_8bit",
    "adapter.dora=true",
    "adapter.kind=prompt; adapter.virtual_tokens=3; adapter.targets=none",
    "adapter.peft={ rank_pattern = { q_proj = 4 } }",
    "model.quantization=8",
    "budget.bytes=12000",
    "budget.hours=1e-9",
    "train.warmup_steps=1",
    "train.weight_decay=0.5",
    "train.clip_norm=1e-3",
    "train.max_length=40",
    "algorithm.name=fedavgm",
    "algorithm.weights=uniform",
    "algorithm.server_lr=0.5",
    "partition.by=none; partition.kind=iid; partition.num_clients=4",
    "partition.by=none; partition.kind=dirichlet; partition.num_clients=3; partition.alpha=1.0"
    "; partition.label=source",
    "partition.by=none; partition.kind=length; partition.num_clients=3",
    "partition.by=none; partition.kind=cluster; partition.num_clients=3",
    "partition.by=none; partition.kind=flwr-datasets; partition.partitioner=SizePartitioner"
    "; partition.options={ partition_sizes = [9, 9, 9] }",
]
CHANGES_WHAT_IS_WRITTEN = [
    "evaluate.every=0",
    "checkpoint.keep=all",
    "checkpoint.keep=best",
    "checkpoint.keep_updates=true",
    "report.page=true",
    "report.samples=1",
    "data.max_eval_rows=1",
    "data.label=source",
    "report.note=Made-up rows.",
    "report.tracker=tensorboard",
]
IS_REFUSED_HERE = [
    "sampling.timeout_s=1e-9",
    "runtime.name=flower; runtime.host=0.0.0.0",
    "runtime.device=cuda",
    "report.tracker=wandb",
    "track=medical",
    "model.revision=main",
]
ELSEWHERE = {
    "data.path": "every test",
    "model.double_quantization": "test_quantization",
    "train.packing": "test_packing: it changes speed and memory only",
    "model.name": "below",
    "data.eval_path": "test_clients",
    "data.eval_split": "test_clients",
    "data.name": "test_clients",
    "data.split": "test_clients",
    "data.skip_empty": "test_clients",
    "data.revision": "test_clients",
    "report.max_new_tokens": "below",
    "task": "test_classify",
    "adapter.head": "test_classify",
    "adapter.start": "test_start",
    "data.labels": "test_classify, test_labelled_texts",
    "data.text": "test_labelled_texts",
    "data.text_pair": "test_labelled_texts",
    "server.data_path": "test_server_rows, test_server_work",
    **{
        f"{section}.{key}": "test_server_work"
        for section, keys in {
            "server": ("epochs", "lr", "weight"),
            "distill": (
                *("teacher", "pretrain_epochs", "teacher_epochs", "lr", "temperature", "kl"),
                *("attention", "attention_layers", "top_k", "compat"),
            ),
        }.items()
        for key in keys
    },
    "finish.local_steps": "test_finish",
    "finish.lr": "test_finish",
    "finish.interpolate": "test_finish",
    "compare.arms": "test_classify, test_arms",
    "compare.history": "test_classify",
    "compare.seeds": "test_compare",
    "compare.tune": "test_tuned_comparison",
    "compare.validation_fraction": "test_tuned_comparison",
    "compare.every": "test_tuned_comparison",
    "compare.group": "test_tuned_comparison",
    "compare.centralized": "test_tuned_comparison",
    "adapter.ranks": "test_mixed_ranks",
    "compare.algorithms": "test_compare",
    "compare.only": "test_compare",
    "compare.max_new_tokens": "test_compare",
    **{
        f"privacy.{key}": "test_private_run"
        for key in ("unit", "noise_multiplier", "target_epsilon", "delta", "noise")
    },
    "privacy.max_participations": "test_private_records",
    "privacy.noise_at": "test_private_records",
    **{
        f"privacy.{key}": "test_client_level"
        for key in ("clip_norm", "clipping", "quantile", "clip_lr")
    },
    **{
        f"secure_sum.{key}": "test_secure_sum_run"
        for key in ("kind", "range", "min_cohort", "max_examples", "simulate")
    },
    "secure_sum.colluding": "test_privacy_of_sums",
    **{f"wire.{key}": "test_codecs" for key in ("down", "up", "error_feedback", "block", "share")},
    "train.loss": "test_own_functions",
    **{
        f"prefer.{key}": "test_prefer_run"
        for key in ("loss", "beta", "label_smoothing", "nll_weight", "length_normalized")
    },
    "evaluate.metric": "test_own_functions",
    "evaluate.server_path": "test_server_scores",
    "evaluate.choose_by": "test_server_scores",
    "stop.patience": "test_early_stop",
    "stop.min_delta": "test_early_stop",
    "sweep.keys": "test_sweep",
    "sweep.runs": "test_sweep",
    "sweep.search": "test_sweep",
    "model.gradient_checkpointing": "test_run, and below",
    "plan.measure": "test_predicted",
    "evaluate.batch_size": "below: it changes speed and memory only",
    "runtime.threads": "below: it may change the last bits only",
    "runtime.name": "test_runtimes",
    "runtime.together": "test_groups",
    "runtime.client_processes": "test_team",
    "runtime.client_cpus": "test_runtimes, test_engine",
    "runtime.client_gpus": "test_engine: there is no GPU here",
    "runtime.ray_address": "test_ray_cluster, in the slow tier",
    "runtime.join_timeout_s": "test_server",
    "sampling.quorum": "test_rounds",
    "sampling.max_norm_ratio": "test_outliers",
    "checkpoint.every": "test_rounds: it shows only when a run is interrupted",
}
ALL = [*CHANGES_THE_ADAPTER, *CHANGES_WHAT_IS_WRITTEN, *IS_REFUSED_HERE]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model):
    return write_tiny_recipe(tmp_path_factory.mktemp("fields"), tiny_model)


@pytest.fixture(scope="module")
def plain(place, tmp_path_factory):
    return silotune.run(place, out=tmp_path_factory.mktemp("plain") / "run")


def words(overrides: str) -> list[str]:
    """Overrides that belong together are written in one line, with semicolons between them."""
    return overrides.split("; ")


def test_the_tests_that_cover_a_key_elsewhere_exist():
    named = {name for text in ELSEWHERE.values() for name in re.findall(r"\btest_\w+", text)}
    there = {path.stem for path in Path(__file__).parents[1].rglob("test_*.py")}
    assert named
    assert named <= there


def test_every_key_is_covered_by_this_file_or_named_elsewhere():
    changed = {word.partition("=")[0] for line in ALL for word in words(line)}
    keys = {k for k in known_keys() if k not in sections()}
    assert keys - changed - set(ELSEWHERE) - {"algorithm.name"} == set()


@pytest.mark.parametrize("overrides", CHANGES_THE_ADAPTER)
def test_the_field_changes_the_adapter(place, plain, tmp_path, overrides):
    changed = silotune.run(place, words(overrides), out=tmp_path / "run")
    assert changed.summary["adapter_sha256"] != plain.summary["adapter_sha256"]


def shape_of(run) -> str:
    """What lies in the folder, without its numbers."""
    kept = sorted(p.name for p in (run.path / "checkpoints").iterdir())
    kept += sorted(p.name for p in run.path.iterdir())
    kept += [(run.path / "README.md").read_text("utf-8").count("Made-up rows.")]
    kept += [(run.path / name).read_text("utf-8") for name in ("split.json", "samples.json")]
    events = [(r["event"], r["round"], r.get("client")) for r in run.metrics]
    return json.dumps([kept, events, run.summary["result_round"]])


@pytest.mark.parametrize("overrides", CHANGES_WHAT_IS_WRITTEN)
def test_the_field_changes_what_is_written(place, plain, tmp_path, overrides):
    # training on words makes answers of other signs less likely, so the first round is best
    signs = [row | {"answer": "~~~~~~~~"} for row in hospital_rows()]
    both = {
        "checkpoint.keep=best": [f"data.eval_path={write_jsonl(tmp_path / 'signs.jsonl', signs)}"],
        # clients hold out more than one row
        "data.max_eval_rows=1": ["data.eval_fraction=0.5"],
    }.get(overrides, [])
    before = silotune.run(place, both, out=tmp_path / "before") if both else plain
    changed = silotune.run(place, [*words(overrides), *both], out=tmp_path / "run")
    assert shape_of(changed) != shape_of(before)


def test_the_length_of_shown_answers_is_that_of_the_recipe(place, tmp_path, monkeypatch):
    asked = []

    def count(loaded, talks, *, max_new_tokens):
        asked.append(max_new_tokens)
        return answers(loaded, talks, max_new_tokens=max_new_tokens)

    monkeypatch.setattr("silotune.workflows.write_results.answers", count)
    keys = ["rounds=1", "report.samples=1", "report.max_new_tokens=5"]
    silotune.run(place, keys, out=tmp_path / "run")
    assert asked == [5, 5]  # base and result


@pytest.mark.parametrize("overrides", IS_REFUSED_HERE)
def test_the_field_is_refused_where_it_cannot_be_fulfilled(place, tmp_path, overrides):
    with pytest.raises(SilotuneError):
        silotune.run(place, words(overrides), out=tmp_path / "run")


def test_a_revision_of_something_that_is_not_on_the_hub_is_a_mistake(place):
    with pytest.raises(ConfigError, match=r"model.revision.*has no effect"):
        silotune.check(place, ["model.revision=main"])


def test_another_base_gives_another_adapter(place, plain, tmp_path):
    other = build_tiny_model(tmp_path / "other", seed=5)
    changed = silotune.run(place, [f"model.name={other}"], out=tmp_path / "run")
    assert changed.summary["adapter_sha256"] != plain.summary["adapter_sha256"]


def test_gradient_checkpointing_reaches_the_model(tiny_model):
    from silotune.models.adapters import AdapterConfig
    from silotune.models.base import ModelConfig
    from silotune.models.loading import load_model

    for wanted in (True, False):
        cfg = ModelConfig(name=str(tiny_model), gradient_checkpointing=wanted)
        loaded = load_model(cfg, AdapterConfig(targets=("q_proj",)), seed=1, device="cpu")
        assert loaded.model.get_base_model().is_activation_checkpointing == wanted


def test_the_batch_size_of_scoring_changes_the_batches_and_not_the_score(place, plain, tmp_path):
    changed = silotune.run(place, ["evaluate.batch_size=1"], out=tmp_path / "run")
    assert changed.summary["adapter_sha256"] == plain.summary["adapter_sha256"]
    for name, c in changed.summary["clients"].items():
        same = plain.summary["clients"][name]
        assert c["federated_loss"] == pytest.approx(same["federated_loss"], rel=1e-5)


def test_threads_are_set_and_recorded(place, tmp_path):
    import torch

    before = torch.get_num_threads()
    try:
        done = silotune.run(place, ["runtime.threads=2", "rounds=1"], out=tmp_path / "run")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert json.loads((done.path / "provenance.json").read_text())["threads"] == 2


def test_the_last_override_wins(place):
    run = load_recipe(place, ["train.lr=1e-5", "train.lr=2e-5"])
    assert run.train.lr == 2e-5
