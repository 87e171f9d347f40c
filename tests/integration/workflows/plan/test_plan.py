"""Bytes of published systems, estimates from shapes, and changes that fit a limit."""

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

import silotune
from silotune.core.errors import ConfigError, DataError, ModelError
from silotune.recipes.parse import load_recipe, parse
from silotune.workflows.plan.fit import Limits, Prediction, changed, find_changes
from silotune.workflows.plan.measure import is_at_hand
from silotune.workflows.plan.memory import (
    BatchShape,
    base_bytes,
    client_memory,
    kept_bytes,
    widest_batch,
)
from silotune.workflows.plan.shapes import build_shapes
from tests.conftest import write_tiny_recipe
from tests.published import published_config


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folders with a config.json but no weights."""

    def folder(size: str, **changes):
        place = tmp_path_factory.mktemp("configs") / size
        if size == "distilbert":
            AutoConfig.for_model("distilbert").save_pretrained(place)
            return place
        config = published_config(size)
        config.update(changes)
        config.save_pretrained(place)
        return place

    return folder


# --- bytes of published systems


@pytest.mark.parametrize(
    ("recipe", "size", "overrides", "values", "mib"),
    [
        ("flowertune-medical", "mistral_7b", ["rounds=10"], 13_631_488, "2080.62"),
        ("flowertune-medical", "mistral_7b", ["rounds=200"], 13_631_488, "41612.50"),
        ("flowertune-general", "mistral_7b", [], 13_631_488, "41612.50"),
        ("flowertune-code", "mistral_7b", [], 13_631_488, "41612.50"),
        ("flowertune-finance", "mistral_7b", [], 13_631_488, "104031.25"),
        ("medical-dora", "llama_3_8b", [], 13_795_328, "3158.91"),
        ("flowertune", "open_llama_3b", [], 10_649_600, "16255.08"),
        ("blueprint", "open_llama_3b", [], 10_649_600, "16255.08"),
        ("flowertune", "open_llama_7b", [], 16_777_216, "25606.25"),
        ("hospitals", "smollm2_135m", ["wire.up=float32"], 460_800, "88.62"),
        # up: 460,800 bytes and a scale of 2 bytes for every 256 of them, in two tensors
        ("hospitals", "smollm2_135m", [], 460_800, "55.39"),
    ],
)
def test_a_plan_counts_what_flowertunes_tracker_counted(
    published, recipe, size, overrides, values, mib
):
    # The expected numbers are the published ones, or were derived from the papers by hand.
    found = silotune.plan(recipe, [f"model.name={published(size)}", *overrides], measured=False)
    assert found.traffic.num_values == values
    assert f"{found.traffic.tracker_mib:.2f}" == mib


def test_the_head_of_a_classifier_counts_as_published(published):
    # the reference gives raw float32, without headers: 2.8213 MiB a message, 4 clients, 10 rounds
    found = silotune.plan("glue-cola", [f"model.name={published('distilbert')}"], measured=False)
    assert found.traffic.num_values == 739_586
    assert found.traffic.head_up == found.traffic.head_down == 4 * 592_130
    assert f"{found.traffic.up / 2**20:.4f}" == "2.8213"
    first = 4 * found.traffic.down  # ours are there already
    assert f"{(found.traffic.training + first) / 2**20:.1f}" == "225.7"


def test_what_metrics_count_is_values_alone_and_scores_too(published):
    found = silotune.plan(
        "flowertune-medical", [f"model.name={published('mistral_7b')}"], measured=False
    ).traffic
    one = 13_631_488 * 4
    assert (found.down, found.up) == (one, one)
    # before rounds 51, 101, 151 the 18 that are not asked, and all 20 at the end
    assert found.scoring == (3 * 18 + 20) * one
    training = (200 * 2 * 2 - 2) * one  # the first adapter is at the clients already
    assert found.total == training + found.scoring == found.bytes_down + found.bytes_up


def test_a_plan_ends_where_the_budget_ends_the_run(published):
    name, one, up = f"model.name={published('smollm2_135m')}", 460_800 * 4, 464_400
    # no first adapter comes down; evaluate.every is 5: only the base (with round 1) and the end
    three = 3 * 5 * up + (2 * 5 + 5) * one
    found = silotune.plan("hospitals", [name, f"budget.bytes={three}"], measured=False)
    assert (found.traffic.rounds, found.traffic.total) == (3, three)
    assert "budget.bytes ends the run after round 3 of 5" in found.notes
    less = silotune.plan("hospitals", [name, f"budget.bytes={three - 1}"], measured=False)
    assert less.traffic.rounds == 2
    with pytest.raises(ConfigError, match=r"budget.bytes = 1, but one round sends"):
        silotune.plan("hospitals", [name, "budget.bytes=1"], measured=False)


def test_a_model_without_a_configuration_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ModelError, match=r"its config\.json cannot be read"):
        silotune.plan("hospitals", [f"model.name={tmp_path}"], measured=False)


def test_missing_rows_that_are_needed_are_an_error(tmp_path, published):
    with pytest.raises(DataError, match="there is no such file"):
        silotune.plan(
            "hospitals",
            [f"model.name={published('smollm2_135m')}", f"data.path={tmp_path}/rows.jsonl"],
        )


# --- memory from shapes


def shapes_of(place, *overrides):
    run = load_recipe("hospitals", [f"model.name={place}", "model.dtype=float32", *overrides])
    return run, build_shapes(run)


def test_the_size_of_a_base_follows_from_the_format_of_its_weights(published):
    place = published("smollm2_135m")
    _, shapes = shapes_of(place, "runtime.device=cpu")
    embeddings, norms = 2 * 49_152 * 576, 61 * 576  # input and output
    layer = 576 * (576 + 192 + 192 + 576) + 3 * 576 * 1536
    assert base_bytes(shapes, "none", double=True) == 4 * (embeddings + norms + 30 * layer)
    largest = 2 * 576 * 1536
    blocks = 30 * layer // 64
    # the last group of scales in a layer may be incomplete, so count double quantisation by layer
    per_matrix = [n // 64 for n in (576 * 576, 576 * 192, 576 * 192, 576 * 576, *[576 * 1536] * 3)]
    groups = 30 * sum(math.ceil(n / 256) for n in per_matrix)
    rest = 4 * (embeddings + norms) + largest
    assert base_bytes(shapes, "nf4", double=False) == rest + 30 * layer // 2 + 4 * blocks
    assert base_bytes(shapes, "nf4", double=True) == rest + 30 * layer // 2 + blocks + 4 * groups
    rows = 30 * (576 + 192 + 192 + 576 + 1536 + 1536 + 576)
    assert base_bytes(shapes, "int8", double=True) == rest + 30 * layer + 4 * rows


@pytest.mark.parametrize(("optimizer", "per_value"), [("adamw", 8), ("sgd", 0), ("adamw_8bit", 2)])
def test_the_size_of_an_optimizer_is_that_of_its_moments(published, optimizer, per_value):
    run, shapes = shapes_of(published("smollm2_135m"), f"train.optimizer={optimizer}")
    found = client_memory(run, shapes, BatchShape(1, 8, 7))
    assert found.optimizer == per_value * 460_800
    assert found.adapter == 3 * 4 * 460_800


def test_what_a_forward_pass_keeps_is_what_autograd_keeps(tiny_model):
    # an oracle: the same model in memory, counting everything that autograd saves by its address
    from silotune.models.loading import load_model
    from silotune.training.tasks.base import Example
    from silotune.training.tasks.instruct import INSTRUCT

    run = load_recipe(
        "hospitals", [f"model.name={tiny_model}", "model.dtype=float32", "adapter.dropout=0"]
    )
    loaded = load_model(run.model, run.adapter, seed=1, device="cpu")
    example = Example(torch.arange(64), torch.arange(64) > 20)
    batch = INSTRUCT.collate([example] * 3)
    own = {p.untyped_storage().data_ptr() for p in loaded.model.parameters()}
    own |= {b.untyped_storage().data_ptr() for b in loaded.model.buffers()}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    loaded.model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = INSTRUCT.loss(loaded, batch)
    assert out.loss_sum.requires_grad
    found = kept_bytes(run, build_shapes(run), BatchShape(3, 64, batch.num_trained))
    assert found == pytest.approx(sum(kept.values()), rel=0.1)


def test_memory_grows_with_the_batch_and_falls_with_checkpointing(published):
    run, shapes = shapes_of(published("smollm2_135m"))
    one, two = (client_memory(run, shapes, BatchShape(n, 128, 64 * n)) for n in (1, 2))
    assert two.activations == pytest.approx(2 * one.activations, rel=0.01)
    recomputed = run.model_copy(
        update={"model": run.model.model_copy(update={"gradient_checkpointing": True})}
    )
    less = client_memory(recomputed, shapes, BatchShape(2, 128, 128))
    assert less.activations < two.activations / 8
    assert replace(less, activations=two.activations) == two


def test_a_group_holds_an_adapter_and_an_optimizer_for_each_of_its_clients(published):
    run, shapes = shapes_of(published("smollm2_135m"), "runtime.device=cpu")
    values, batch = 460_800, BatchShape(2, 64, 64)

    def memory(together, num_asked):
        runtime = run.runtime.model_copy(update={"together": together})
        changed = run.model_copy(update={"runtime": runtime})
        return client_memory(changed, shapes, batch, num_asked=num_asked)

    alone = client_memory(run, shapes, batch)
    assert memory(1, 9) == memory("auto", 1) == alone
    assert memory(5, 3) == memory(3, 9), "a group is not larger than the cohort"
    five = memory(5, 9)
    assert five.adapter == 5 * 3 * 4 * values + 4 * values
    assert five.optimizer == 5 * 8 * values
    assert five.activations == pytest.approx(5 * alone.activations, rel=0.01)
    # 256 tokens of a pass: two batches of 2 rows of 64 tokens, whatever the group holds
    joined = memory("auto", 9)
    assert joined.activations == pytest.approx(2 * alone.activations, rel=0.01)
    assert joined.optimizer == 9 * 8 * values
    assert (five.base, joined.base) == (alone.base, alone.base)


def test_the_widest_batch_is_what_the_recipe_allows():
    run = load_recipe("hospitals", ["train.batch_size=3", "train.max_length=100"])
    assert widest_batch(run) == BatchShape(3, 100, 297)


def test_a_folder_without_weights_is_not_available(published, tiny_model):
    assert not is_at_hand(load_recipe("hospitals", [f"model.name={published('smollm2_135m')}"]))
    assert is_at_hand(load_recipe("hospitals", [f"model.name={tiny_model}"]))
    assert not is_at_hand(load_recipe("hospitals", ["model.name=nobody/nothing-of-the-kind"]))


# --- what fits

TABLE = {
    "rounds": 8,
    "data": {"path": "medquad_mini"},
    "partition": {"by": "source"},
    "adapter": {"rank": 8},
    "train": {"batch_size": 4, "accumulation": 2},
}


def stand_in(run) -> Prediction:
    """Simple costs: memory in batch, bits, rank and checkpointing; bytes in rank and rounds."""
    bits = 100 if run.model.quantization == "none" else 25
    kept = 10 if not run.model.gradient_checkpointing else 4
    memory = bits + kept * run.train.batch_size + run.adapter.rank
    return Prediction(memory, run.adapter.rank * run.rounds, 60.0 * run.rounds)


def found_for(**limits):
    run = parse(TABLE)
    changes = find_changes(run, Limits(**limits), stand_in)
    return [(dict(change.overrides), change.needed.peak_bytes) for change in changes]


def test_single_changes_come_first_each_as_mild_as_it_can_be():
    # as it is: 100 + 40 + 8
    assert found_for(memory_bytes=128) == [
        ({"model.gradient_checkpointing": True}, 124),
        ({"train.batch_size": 2, "train.accumulation": 4}, 128),
        ({"model.quantization": "nf4"}, 73),
    ]


def test_changes_that_fit_only_together_are_found():
    smallest = {"train.batch_size": 1, "train.accumulation": 8, "model.quantization": "nf4"}
    # 25 + 4 + 8, or without checkpointing 25 + 10 + 2; no two changes come below 43
    assert found_for(memory_bytes=37) == [
        ({"model.gradient_checkpointing": True, **smallest}, 37),
        ({**smallest, "adapter.rank": 2}, 37),
    ]
    assert found_for(memory_bytes=36) == [({**smallest, "adapter.rank": 1}, 36)]


def test_bytes_fall_with_rank_or_rounds_and_hours_with_rounds():
    assert [c for c, _ in found_for(size_bytes=32)] == [{"adapter.rank": 4}, {"rounds": 4}]
    assert [c for c, _ in found_for(seconds=130.0)] == [{"rounds": 2}]
    assert found_for(memory_bytes=1) == []


def test_an_unknown_value_fits_no_limit():
    assert not Limits(memory_bytes=10).allow(Prediction(None, 1, None))
    assert not Limits(seconds=10).allow(Prediction(1, 1, None))
    assert Limits(size_bytes=10).allow(Prediction(None, 10, None))


def test_a_changed_recipe_is_the_recipe_with_these_keys():
    run = changed(parse(TABLE), {"rounds": 3, "adapter.rank": 2, "train.batch_size": 1})
    again = parse(
        {
            **TABLE,
            "rounds": 3,
            "adapter": {"rank": 2},
            "train": {"batch_size": 1, "accumulation": 2},
        }
    )
    assert run == again


def test_a_plan_says_what_would_fit(published):
    # fewer layers: what fits is a question of proportions, and each plan walks through all of them
    name = f"model.name={published('smollm2_135m', num_hidden_layers=4)}"
    free = silotune.plan("hospitals", [name], measured=False)
    assert free.fits is None
    now = free.peak_bytes
    assert now is not None
    roomy = Limits(memory_bytes=now, size_bytes=free.traffic.total)
    assert silotune.plan("hospitals", [name], measured=False, limits=roomy).fits
    tight = Limits(memory_bytes=now - 1, size_bytes=free.traffic.total // 2)
    found = silotune.plan("hospitals", [name], measured=False, limits=tight)
    assert found.fits is False
    first = found.changes[0]
    assert dict(first.overrides) == {"adapter.rank": 4}
    # the predicted figures equal those of a plan with these keys
    again = silotune.plan("hospitals", [name, "adapter.rank=4"], measured=False)
    assert first.needed == Prediction(again.peak_bytes, again.traffic.total, None)
    with_time = silotune.plan("hospitals", [name], measured=False, limits=Limits(seconds=1e9))
    assert with_time.fits is False
    assert any("no time is given" in note for note in with_time.notes)


def test_a_plan_is_json(tmp_path, tiny_model):
    found = silotune.plan(write_tiny_recipe(tmp_path, tiny_model), measured=False)
    numbers = json.loads(json.dumps(found.numbers()))
    assert numbers["traffic"]["total"] == found.traffic.total
    assert numbers["peak_bytes"] == found.peak_bytes
    assert numbers["measured"] is None
    assert "run" not in numbers
    assert replace(found, measured=None) == found
