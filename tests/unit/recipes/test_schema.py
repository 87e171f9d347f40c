"""Recipes: mistakes are reported together, overrides do what they say, TOML comes back equal."""

import tomllib
from pathlib import Path
from typing import Any, Literal

import pytest

import silotune
from silotune.algorithms import ALGORITHMS
from silotune.core.errors import ConfigError
from silotune.recipes.algorithm import ALGORITHM_CONFIGS, build_algorithm
from silotune.recipes.mistakes import known_keys, nearest_key, sections
from silotune.recipes.parse import load_recipe, parse, to_toml
from silotune.recipes.schema import RunConfig
from tests.conftest import changed

SHIPPED = sorted(silotune.shipped_recipes())


def plain(**changes: Any) -> dict[str, Any]:
    """The shortest recipe; `train__lr` stands for train.lr."""
    table: dict[str, Any] = {"rounds": 2, "data": {"path": "medquad_mini"}}
    return changed(table, changes)


def mistakes(table: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(table, name="mine")
    return lines_of(caught.value)


def lines_of(error: ConfigError) -> list[str]:
    head, *lines = str(error).split("\n  ")
    count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
    assert head.startswith(f"{count} in recipe '"), head
    return lines


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text('rounds = 2\ndata.path = "medquad_mini"\ntrain = { lr = 1e-3 }\n')
    return path


def bad_overrides(recipe: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, overrides)
    return lines_of(caught.value)


# --- mistakes


def test_a_recipe_needs_rounds_and_data_alone():
    run = parse(plain())
    assert (run.rounds, run.data.path, run.partition) == (2, "medquad_mini", None)
    assert mistakes({}) == ["rounds: is missing.", "data: is missing."]
    assert mistakes({"rounds": 1, "data": {}}) == ["data.path: is missing."]


def test_mistakes_of_every_kind_are_reported_together():
    table = plain(
        sede=3,
        train__local_stpes=3,
        runtime__threads="two",
        adapter__rank=0,
        algorithm__name="fedprx",
        partition={"by": "source", "kind": "iid", "num_clients": 2},
        checkpoint__keep="best",
        evaluate__every=0,
    )
    found = mistakes(table)
    assert sorted(line.split(":")[0] for line in found) == [
        "adapter.rank",
        "algorithm.name",
        "checkpoint.keep",
        "partition",
        "runtime.threads",
        "sede",
        "train.local_stpes",
    ]
    text = "\n".join(found)
    assert "sede: unknown key. Did you mean seed?" in text
    assert "train.local_stpes: unknown key. Did you mean train.local_steps?" in text
    assert "should be greater than or equal to 1, got 0." in text
    assert "partition: give by or kind, not both." in text
    assert "'fedprx'. Did you mean 'fedprox'?" in text


def test_mistakes_of_overrides_and_of_the_file_are_reported_together(recipe):
    recipe.write_text(recipe.read_text() + "sede = 3\n")
    found = bad_overrides(recipe, "rank", "train.lr=fast")
    assert found[0].startswith("override 'rank': ")
    assert sorted(line.split(":")[0] for line in found[1:]) == ["sede", "train.lr"]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"checkpoint__keep": "best", "evaluate__every": 0}, "checkpoint.keep"),
        ({"adapter__kind": "full", "model__dtype": "bfloat16"}, "model.dtype"),
        ({"adapter__kind": "full", "model__dtype": "float16"}, "model.dtype"),
    ],
)
def test_a_contradiction_across_sections_is_found_even_with_other_mistakes(changes, key):
    (only,) = mistakes(plain(**changes))
    assert only.startswith(f"{key}: ")
    several = mistakes(plain(**changes, seed="x", data={"pth": "y"}, train={"lr": -1}))
    assert only in several
    assert len(several) == 5  # data.path is missing, too


OWN = {"finish__local_steps": 2}


@pytest.mark.parametrize(
    ("changes", "key", "why"),
    [
        ({"finish__lr": 0.1}, "finish.lr", "only has an effect with finish.local_steps"),
        ({"finish__interpolate": [0.5]}, "finish.interpolate", "only has an effect"),
        ({**OWN, "finish__interpolate": [0.5]}, "finish.interpolate", "data.validation_fraction"),
        ({**OWN, "finish__interpolate": [0.5, 2]}, "finish.interpolate", "from 0 to 1"),
        ({**OWN, "finish__interpolate": [0.5, 0.5]}, "finish.interpolate", "different numbers"),
        ({**OWN, "train__warmup_steps": 2}, "finish.local_steps", "more than train.warmup_steps"),
        ({**OWN, "budget__hours": 1.0}, "finish.local_steps", "budget.hours"),
        ({**OWN, "runtime__name": "flower"}, "finish.local_steps", "clients of a simulation"),
    ],
)
def test_own_steps_are_refused_where_they_would_not_be_taken(changes, key, why):
    (only,) = mistakes(plain(**changes))
    assert only.startswith(f"{key}: ")
    assert why in only


@pytest.mark.parametrize("changes", [{"checkpoint__keep": "best"}, {"adapter__kind": "full"}])
def test_half_of_a_contradiction_is_fine(changes):
    assert parse(plain(**changes))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"sampling": {"num_clients": 2, "fraction": 0.5}}, "not both"),
        ({"train": {"local_steps": 2, "local_epochs": 1}}, "not both"),
        ({"partition": {"kind": "iid"}}, "needs num_clients"),
        ({"partition": {"kind": "flwr-datasets"}}, "needs partitioner"),
        ({"data": {"path": "x", "eval_path": "x"}}, "eval_path is the same as path"),
        ({"data": {"path": "x", "eval_path": "y", "eval_split": "z"}}, "not both"),
    ],
)
def test_a_contradiction_inside_a_section_names_the_section(changes, why):
    (only,) = mistakes(plain(**changes))
    assert only.startswith(f"{next(iter(changes))}: ")
    assert why in only


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("sede", "seed"),
        ("rouns", "rounds"),
        ("trian", "train"),
        ("train.batchsize", "train.batch_size"),
        ("trian.lr", "train.lr"),
        ("lr", "train.lr"),
        ("batch_size", "train.batch_size"),
        ("train.rank", "adapter.rank"),
        ("train.seed", "seed"),
        ("checkpint.every", "checkpoint.every"),
        ("algorithm.muu", "algorithm.mu"),
        ("data.evalpath", "data.eval_path"),
    ],
)
def test_the_nearest_key_is_the_one_that_is_meant(typed, meant):
    assert nearest_key(typed, "fedprox") == meant


@pytest.mark.parametrize("typed", ["xyzzy", "train.xyzzy", "a.b.c"])
def test_a_key_that_is_close_to_none_offers_none(typed):
    assert nearest_key(typed, "fedavg") is None


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_every_key_is_found_again_when_a_letter_is_missing(algorithm):
    long = [key for key in known_keys(algorithm) if len(key.rpartition(".")[2]) > 3]
    assert [key for key in long if nearest_key(key[:-2] + key[-1], algorithm) != key] == []


def test_an_algorithm_must_exist_and_its_section_must_be_a_table():
    (only,) = mistakes(plain(algorithm__name="fedagv"))
    assert only == (
        "algorithm.name: there is no algorithm 'fedagv'. Did you mean 'fedavg'? "
        f"There are: {', '.join(ALGORITHM_CONFIGS)}."
    )
    assert mistakes(plain(algorithm="fedprox")) == [
        "algorithm: is a section. Name the algorithm with algorithm.name."
    ]


@pytest.mark.parametrize("section", [s for s in sections() if s != "algorithm"])
def test_a_value_in_the_place_of_a_section_is_explained(section):
    assert mistakes(plain(**{section: 3})) == [
        f"{section}: is a section; set individual keys in it, for example {section}.key = value."
    ]


# --- overrides


def test_an_override_changes_one_key(recipe):
    before, after = load_recipe(recipe), load_recipe(recipe, ["train.batch_size=3"])
    assert after.train.batch_size == 3
    assert after.model_copy(update={"train": before.train}) == before


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=4", "seed", 4),
        (" seed = 4 ", "seed", 4),
        ("train.lr=5e-4", "train.lr", 5e-4),
        ("train.lr=1", "train.lr", 1.0),
        ("adapter.rslora=true", "adapter.rslora", True),
        ('adapter.targets=["q_proj", "v_proj"]', "adapter.targets", ("q_proj", "v_proj")),
        ("adapter={rank = 3, alpha = 6}", "adapter.rank", 3),
        # not TOML values, so texts
        ("model.name=owner/model", "model.name", "owner/model"),
        ("data.path=/tmp/a b.csv", "data.path", "/tmp/a b.csv"),
        ("data.split=train[:500]", "data.split", "train[:500]"),
        ("data.system=1 = 1, is it not?", "data.system", "1 = 1, is it not?"),
        ('data.system="none"', "data.system", "none"),
        # TOML values, so not texts
        ('model.name="owner/model"', "model.name", "owner/model"),
        ("data.system='''a\nb'''", "data.system", "a\nb"),
    ],
)
def test_a_value_is_read_as_toml_or_else_as_text(recipe, override, key, value):
    found: Any = load_recipe(recipe, [override])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_none_removes_a_key_or_a_section(recipe):
    recipe.write_text(
        'rounds = 2\npartition.by = "source"\ntrain.local_steps = 3\ndata.path = "medquad_mini"\n'
    )
    run = load_recipe(recipe, ["train.local_steps=none", "train.local_epochs=2"])
    assert (run.train.local_steps, run.train.local_epochs) == (None, 2)
    assert load_recipe(recipe, ["partition=none"]).partition is None
    assert load_recipe(recipe, ["seed=none", "train.lr=none"]) == load_recipe(recipe)
    assert bad_overrides(recipe, "rounds=none") == ["rounds: is missing."]


def test_overrides_make_sections_that_the_recipe_lacks(recipe):
    run = load_recipe(recipe, ["partition.by=source", "algorithm.name=fedprox", "algorithm.mu=0.3"])
    assert run.partition is not None
    assert run.partition.by == "source"
    assert run.algorithm == ALGORITHM_CONFIGS["fedprox"](mu=0.3)  # type: ignore[call-arg]


@pytest.mark.parametrize("override", ["lr", "", "=3", "  =3", ".=3", "train..lr=3", "train.=3"])
def test_a_text_that_is_not_an_override_is_named(recipe, override):
    assert bad_overrides(recipe, override) == [
        f"override '{override}': write key=value, for example train.lr=5e-4"
    ]


def test_a_key_below_a_value_is_named(recipe):
    assert bad_overrides(recipe, "seed=3", "seed.x=3") == [
        "override 'seed.x': 'seed' is a value, not a section"
    ]


def test_overrides_do_not_change_the_file(recipe):
    before = recipe.read_bytes()
    load_recipe(recipe, ["seed=9", "rounds=5"])
    assert recipe.read_bytes() == before


# --- files


def test_a_shipped_name_takes_precedence_over_a_file_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hospitals").write_text("rounds = 99\n")
    assert load_recipe("hospitals").rounds != 99
    with pytest.raises(ConfigError, match=r"data: is missing"):
        load_recipe("./hospitals")


def test_a_text_that_is_not_utf8_is_a_mistake(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b'data.system = "gr\xfc\xdf"\n')
    with pytest.raises(ConfigError, match=r"mine\.toml: not valid TOML[\s\S]*\n  Fix the line"):
        load_recipe(path)


# --- TOML out and in


def comes_back(run: RunConfig) -> bool:
    return parse(tomllib.loads(to_toml(run))) == run


PLAIN_SGD = ["train.optimizer=sgd", "train.clip_norm=0", "train.weight_decay=0"]


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
@pytest.mark.parametrize("name", SHIPPED)
def test_a_resolved_recipe_reads_back_equal_for_every_algorithm(name, algorithm):
    cfg = ALGORITHM_CONFIGS[algorithm]()
    plain = ["adapter.dora=false"] if cfg.facts.needs_lora else []
    plain += PLAIN_SGD if cfg.needs_plain_sgd else []
    plain += ["server.work=none"] if cfg.facts.keeps else []
    run = load_recipe(name, ["algorithm=none", f"algorithm.name={algorithm}", *plain])
    assert run.algorithm == ALGORITHM_CONFIGS[algorithm]()
    assert comes_back(run)
    assert build_algorithm(run.algorithm).name == algorithm


@pytest.mark.parametrize(
    "overrides",
    [
        ["sampling.fraction=none", "sampling.num_clients=2"],
        [
            "data.path=a.csv",
            "data.eval_path=b.csv",
            "data.eval_split=none",
            "data.eval_fraction=none",
        ],
        [
            "data.path=owner/name",
            "data.eval_split=test",
            "data.revision=abc",
            "data.eval_fraction=none",
        ],
        [
            *("task=instruct", "data.text=none", "data.labels=none"),
            *("data.prompt=Q: {a}", "data.completion={b}", 'data.system="a\\nb \\"c\\" ü"'),
        ],
        ["partition=none", "partition.kind=iid", "partition.num_clients=3"],
        [
            *("partition=none", "partition.kind=dirichlet", "partition.num_clients=3"),
            *("partition.alpha=0.1", "partition.label=qtype"),
        ],
        ["partition=none", "partition.kind=length", "partition.num_clients=3"],
        [
            *("partition=none", "partition.kind=flwr-datasets"),
            *("partition.partitioner=InnerDirichletPartitioner", "partition.options.alpha=0.5"),
            *("partition.options.partition_sizes=[8, 9]", "partition.options.shuffle=false"),
        ],
        ["partition=none"],
        ["train.local_steps=none"],
        ["train.local_steps=none", "train.local_epochs=2"],
        ["adapter.targets=none"],
        ["algorithm.name=fedprox", "algorithm.mu=0.25", "algorithm.weights=uniform"],
        ["sampling.timeout_s=1e9", "train.lr_min=0", "train.lr=1e-300"],
    ],
)
@pytest.mark.parametrize("name", SHIPPED)
def test_a_resolved_recipe_reads_back_equal_whatever_is_set(name, overrides):
    run = load_recipe(name, overrides)
    assert comes_back(run)
    assert to_toml(parse(tomllib.loads(to_toml(run)))) == to_toml(run)


# A value that differs from the default and is allowed, and what must be set with it.
NOISE = ["privacy.noise_multiplier=1", "privacy.delta=0.1"]
PREFER = ["task=prefer"]
OTHER: dict[str, tuple[str, list[str]]] = {
    "seed": ("4", []),
    "rounds": ("7", []),
    "task": ("classify", []),
    "model.name": ("owner/other", []),
    "model.revision": ("main", []),
    "model.dtype": ("float16", []),
    "model.gradient_checkpointing": ("true", []),
    "model.quantization": ("fp4", []),
    "model.double_quantization": ("false", []),
    "adapter.kind": ("full", []),
    "adapter.rank": ("3", []),
    "adapter.ranks": ("{ north = 4 }", ["algorithm.name=flora"]),
    "adapter.alpha": ("9.5", []),
    "adapter.dropout": ("0.25", []),
    "adapter.targets": ('["k_proj"]', []),
    "adapter.rslora": ("true", []),
    "adapter.dora": ("true", []),
    "adapter.virtual_tokens": ("3", ["adapter.kind=prompt"]),
    "adapter.peft": ("{ rank_pattern = { q_proj = 4 } }", []),
    "adapter.head": ("local", ["task=classify"]),
    "adapter.start": ("runs/before", []),
    "data.path": ("other.csv", []),
    "data.eval_path": ("held.csv", []),
    "data.eval_split": ("test", []),
    "data.eval_fraction": ("0.5", []),
    "data.validation_fraction": ("0.25", []),
    "data.name": ("en", []),
    "data.split": ("train[:9]", []),
    "data.revision": ("abc", []),
    "data.prompt": ("Q: {a}", ["data.completion={b}"]),
    "data.completion": ("{b}", ["data.prompt={a}"]),
    "data.system": ("Be brief.", []),
    "data.max_rows": ("5", []),
    "data.max_eval_rows": ("6", []),
    "data.label": ("qtype", []),
    "data.labels": ('["no", "yes"]', ["task=classify"]),
    "data.text": ("sentence", ["task=classify"]),
    "data.text_pair": ("other", ["task=classify", "data.text=one"]),
    "data.split_seed": ("8", []),
    "data.skip_empty": ("true", []),
    "data.date": ('"2026-01-31"', []),
    "data.template": ("three-block", []),
    "partition.by": ("source", []),
    "partition.only": ('["a", "b"]', ["partition.by=source"]),
    "partition.kind": ("iid", ["partition.num_clients=2"]),
    "partition.num_clients": ("3", ["partition.kind=iid"]),
    "partition.alpha": (
        "0.5",
        ["partition.kind=dirichlet", "partition.num_clients=2", "partition.label=a"],
    ),
    "partition.label": (
        "qtype",
        ["partition.kind=dirichlet", "partition.num_clients=2", "partition.alpha=1.0"],
    ),
    "partition.partitioner": ("NaturalIdPartitioner", ["partition.kind=flwr-datasets"]),
    "partition.options": (
        '{ partition_by = "source", sizes = [1, 2.5], shuffle = false }',
        ["partition.kind=flwr-datasets", "partition.partitioner=ShardPartitioner"],
    ),
    "sampling.fraction": ("0.5", []),
    "sampling.num_clients": ("2", []),
    "sampling.quorum": ("0.75", []),
    "sampling.max_norm_ratio": ("9.5", []),
    "sampling.timeout_s": ("9.5", []),
    "train.batch_size": ("3", []),
    "train.accumulation": ("2", []),
    "train.local_steps": ("7", []),
    "train.local_epochs": ("2", []),
    "train.optimizer": ("sgd", []),
    "train.lr": ("0.5", []),
    "train.lr_min": ("1e-4", ["train.schedule=cosine"]),
    "train.schedule": ("cosine", []),
    "train.warmup_steps": ("2", []),
    "train.weight_decay": ("0.25", []),
    "train.clip_norm": ("0.5", []),
    "train.loss": ("python:my_rules:my_loss", []),
    "train.max_length": ("99", []),
    "train.packing": ("true", []),
    "prefer.loss": ("ipo", PREFER),
    "prefer.beta": ("0.5", PREFER),
    "prefer.label_smoothing": ("0.25", PREFER),
    "prefer.nll_weight": ("0.5", PREFER),
    "prefer.length_normalized": ("true", PREFER),
    "train.compat": ('["late-schedule"]', ["train.schedule=cosine"]),
    "server.data_fraction": ("0.25", []),
    "server.data_path": ("own.jsonl", []),
    "server.work": ("fine-tune", ["server.data_fraction=0.2"]),
    "server.epochs": ("3", []),
    "server.lr": ("1e-3", []),
    "server.weight": ("0.5", []),
    "distill.teacher": ("owner/larger", []),
    "distill.pretrain_epochs": ("4", []),
    "distill.teacher_epochs": ("0", []),
    "distill.lr": ("1e-4", []),
    "distill.temperature": ("1.5", []),
    "distill.kl": ("0.25", []),
    "distill.attention": ("0.5", []),
    "distill.attention_layers": ("[[0, 1], [1, 3]]", ["distill.attention=1.0"]),
    "distill.top_k": ("8", []),
    "distill.compat": ("raw-logits", []),
    "evaluate.every": ("2", []),
    "evaluate.metric": ("python:my_rules:my_metric", []),
    "evaluate.batch_size": ("3", []),
    "evaluate.server_path": ("own.jsonl", []),
    "evaluate.choose_by": (
        "server",
        ["evaluate.server_path=own.jsonl", "checkpoint.keep=best"],
    ),
    "checkpoint.every": ("2", []),
    "checkpoint.keep": ("all", []),
    "finish.local_steps": ("4", []),
    "finish.lr": ("0.5", ["finish.local_steps=4"]),
    "finish.interpolate": (
        "[0.0, 0.5]",
        ["finish.local_steps=4", "data.validation_fraction=0.2"],
    ),
    "checkpoint.keep_updates": ("true", []),
    "runtime.device": ("cpu", []),
    "runtime.threads": ("31", []),
    "runtime.name": ("flower", []),
    "runtime.together": ("5", []),
    "runtime.client_processes": ("2", []),
    "runtime.client_cpus": ("3", ["runtime.name=flower-simulation"]),
    "runtime.client_gpus": ("0.25", ["runtime.name=flower-simulation"]),
    "runtime.ray_address": ("10.0.0.1:6379", ["runtime.name=flower-simulation"]),
    "runtime.host": ("localhost", ["runtime.name=flower"]),
    "runtime.join_timeout_s": ("7.5", ["runtime.name=flower"]),
    "budget.bytes": ("12500", []),
    "budget.hours": ("1.5", []),
    "stop.patience": ("2", ["data.validation_fraction=0.2", "checkpoint.keep=best"]),
    "stop.min_delta": (
        "0.25",
        ["stop.patience=2", "data.validation_fraction=0.2", "checkpoint.keep=best"],
    ),
    "plan.measure": ("true", []),
    "track": ("medical", []),
    "report.page": ("false", []),
    "report.note": ("Made-up rows.", []),
    "report.samples": ("1", []),
    "report.max_new_tokens": ("9", []),
    "report.tracker": ("mlflow", []),
    "compare.arms": ("{ slow = { train = { lr = 1e-5 } } }", []),
    "compare.history": ("true", []),
    "compare.tune": ("{ lr = [1.5, 0.5], server_lr = [2.5, 0.25] }", []),
    "compare.validation_fraction": ("0.25", []),
    "compare.every": ("7", []),
    "compare.group": ("disease", []),
    "compare.centralized": ("false", []),
    "compare.seeds": ("5", []),
    "compare.algorithms": (
        '[{weights = "uniform", server_lr = 1.0, mu = 0.5, name = "fedprox"}]',
        [],
    ),
    "compare.only": ('["a"]', []),
    "compare.max_new_tokens": ("64", []),
    **{
        f"privacy.{key}": (value, ["privacy.unit=client", "algorithm.weights=uniform", *more])
        for key, (value, more) in {
            "unit": ("client", NOISE),
            "noise_multiplier": ("2.5", ["privacy.delta=0.1"]),
            "target_epsilon": ("2.5", ["privacy.delta=0.1"]),
            "delta": ("0.25", ["privacy.noise_multiplier=1"]),
            "clip_norm": ("2.5", NOISE),
            "clipping": ("adaptive", NOISE),
            "quantile": ("0.25", [*NOISE, "privacy.clipping=adaptive"]),
            "clip_lr": ("0.5", [*NOISE, "privacy.clipping=adaptive"]),
            "noise": ("seeded", NOISE),
            "noise_at": ("client", NOISE),
        }.items()
    },
    "privacy.max_participations": ("2", [*NOISE, "privacy.unit=record"]),
    **{
        f"secure_sum.{key}": (value, ["secure_sum.kind=masks", "secure_sum.range=1.0"])
        for key, value in {
            "kind": "masks",
            "range": "0.5",
            "min_cohort": "7",
            "max_examples": "99",
            "colluding": "2",
            "simulate": "true",
        }.items()
    },
    "wire.down": ("int8", []),
    "wire.up": ("int8", []),
    "wire.error_feedback": ("false", ["wire.up=int4"]),
    "wire.block": ("32", ["wire.up=int8"]),
    "wire.share": ("0.25", ["wire.up=topk"]),
    "sweep.keys": ('["train.lr=1e-4,1e-3"]', []),
    "sweep.runs": ('["train.lr=1e-4", "rounds=2"]', []),
    "sweep.search": ("9", []),
    "algorithm.weights": ("uniform", []),
    "algorithm.server_lr": ("0.5", []),
    "algorithm.mu": ("0.25", []),
    "algorithm.momentum": ("0.5", []),
    "algorithm.beta1": ("0.5", []),
    "algorithm.beta2": ("0.5", []),
    "algorithm.tau": ("0.25", []),
    "train.keep_moments": ("true", []),
    "algorithm.alpha": ("0.25", []),
    "algorithm.ridge": ("0.25", []),
    "algorithm.strength": ("0.25", []),
    "algorithm.variates": ("displacement", []),
    "algorithm.norm": ("0.25", []),
    "algorithm.attackers": ("2", []),
    "algorithm.selected": ("2", []),
    "algorithm.iterations": ("3", []),
    "algorithm.smoothing": ("0.25", []),
    "algorithm.by_norm": ("false", []),
    "algorithm.residual": ("export", []),
    "algorithm.residual_decay": ("0.5", []),
    "algorithm.residual_rank": ("3", []),
}


ONLY_VALUE = {
    (name, "algorithm.weights")
    for name, cfg in ALGORITHM_CONFIGS.items()
    if cfg.model_fields["weights"].annotation == Literal["uniform"]
}
"""Keys that have one value only: robust rules count clients, not what clients say of themselves."""


def keys_of(algorithm: str) -> set[str]:
    return set(known_keys(algorithm)) - set(sections()) - {"algorithm.name"}


@pytest.mark.parametrize(
    ("algorithm", "key"),
    [
        *(("fedavg", key) for key in sorted(keys_of("fedavg"))),
        *(
            (algorithm, key)
            for algorithm in sorted(ALGORITHMS)
            for key in sorted(keys_of(algorithm))
            if key.startswith("algorithm.") and algorithm != "fedavg"
            if (algorithm, key) not in ONLY_VALUE
        ),
    ],
)
def test_every_field_can_be_set_and_shows_in_the_resolved_recipe(recipe, algorithm, key):
    value, needed = OTHER[key]
    chosen = [f"algorithm.name={algorithm}", *needed]
    chosen += PLAIN_SGD if ALGORITHM_CONFIGS[algorithm]().needs_plain_sgd else []
    run = load_recipe(recipe, [*chosen, f"{key}={value}"])
    assert comes_back(run)
    shown: Any = tomllib.loads(to_toml(run))
    for part in key.split("."):
        shown = shown[part]
    try:
        expected = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        expected = value
    assert shown == expected
    section, _, name = key.rpartition(".")
    fields = sections(algorithm)[section].model_fields if section else RunConfig.model_fields
    default = fields[name].get_default(call_default_factory=True)
    assert shown != default, "the test sets the default"


def test_an_option_of_a_partitioner_that_is_not_a_plain_value_is_named():
    cut = {"kind": "flwr-datasets", "partitioner": "X", "options": {"a": {"b": 1}}}
    assert mistakes(plain(partition=cut)) == [
        "partition.options: 'a' should be a number, a string, true, false or a list of numbers."
    ]


def test_a_misspelt_key_is_not_also_reported_as_missing():
    # Bug: `data.complation` was reported, and also that prompt and completion belong together.
    table = {"rounds": 1, "data": {"path": "x", "prompt": "{q}", "complation": "{a}"}}
    with pytest.raises(ConfigError) as caught:
        parse(table)
    assert str(caught.value).startswith("1 mistake")
    assert "Did you mean data.completion?" in str(caught.value)


def test_a_wrong_type_does_not_hide_the_contradictions_of_its_section():
    # Bug: a wrong train.batch_size hid that local_steps and local_epochs exclude each other.
    table = {"rounds": 1, "data": {"path": "x"}}
    train = {"batch_size": "eight", "local_steps": 1, "local_epochs": 1}
    with pytest.raises(ConfigError) as caught:
        parse({**table, "train": train})
    assert "train.batch_size" in str(caught.value)
    assert "local_steps or local_epochs" in str(caught.value)


def test_a_wrong_item_of_a_list_ends_in_an_error():
    # Bug: an item cannot be removed by its key, so reading never ended.
    table = {"rounds": 1, "data": {"path": "x"}, "adapter": {"targets": [5]}}
    with pytest.raises(ConfigError, match=r"adapter\.targets\.0"):
        parse(table)
