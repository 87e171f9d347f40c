"""Runs whose changes travel through a codec: bytes as planned, and nothing lost in between."""

import pytest

import silotune
from silotune.compression.changes import CODECS
from silotune.core.errors import ConfigError
from silotune.core.processors import usable_threads
from silotune.federation.progress import Progress
from silotune.recipes.parse import load_recipe
from tests.conftest import hospital_rows, write_jsonl, write_tiny_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model):
    place = tmp_path_factory.mktemp("codecs")
    path = write_tiny_recipe(place, tiny_model)
    write_jsonl(place / "hospitals.jsonl", hospital_rows(per_client=4))
    return path


@pytest.fixture(scope="module")
def plain(recipe, tmp_path_factory):
    return silotune.run(recipe, out=tmp_path_factory.mktemp("plain") / "run")


class Stops(Progress):
    """Ends a run after two rounds, as a kill would."""

    def end_round(self, round_, rows):
        if round_ == 2:
            raise KeyboardInterrupt


def sizes(run):
    return {row["bytes_up"] for row in run.metrics if row["event"] == "train"}


@pytest.mark.parametrize("name", CODECS)
def test_a_run_sends_what_was_planned_and_a_resumed_one_ends_alike(recipe, plain, tmp_path, name):
    keys = [f"wire.up={name}", "wire.block=32"] if name != "bf16" else ["wire.up=bf16"]
    planned = silotune.plan(recipe, keys, measured=False).traffic
    done = silotune.run(recipe, keys, out=tmp_path / "run")
    assert sizes(done) == {planned.up}
    assert planned.up < max(sizes(plain)) / 1.9
    assert done.summary["bytes_up"] == planned.bytes_up
    assert done.summary["adapter_sha256"] != plain.summary["adapter_sha256"]
    with pytest.raises(KeyboardInterrupt):
        silotune.run(recipe, keys, out=tmp_path / "stopped", progress=Stops())
    again = silotune.run(resume=tmp_path / "stopped")
    assert again.summary["adapter_sha256"] == done.summary["adapter_sha256"]


@pytest.mark.parametrize("name", ["float32", *CODECS])
def test_what_comes_down_is_planned_too_and_a_resumed_run_ends_alike(recipe, plain, tmp_path, name):
    keys = [f"wire.down={name}", "wire.up=int8"]
    planned = silotune.plan(recipe, keys, measured=False).traffic
    done = silotune.run(recipe, keys, out=tmp_path / "run")
    assert done.summary["bytes_down"] == planned.bytes_down
    assert planned.news <= planned.down
    rows = [row for row in done.metrics if row["event"] == "train"]
    assert {row["bytes_down"] for row in rows if row["round"] > 1} == {planned.news}
    with pytest.raises(KeyboardInterrupt):
        silotune.run(recipe, keys, out=tmp_path / "stopped", progress=Stops())
    again = silotune.run(resume=tmp_path / "stopped")
    assert again.summary["adapter_sha256"] == done.summary["adapter_sha256"]
    # nobody knows what clients hold after an interruption, so they receive the whole adapter
    assert again.summary["bytes_down"] > done.summary["bytes_down"] or name == "float32"


@pytest.mark.parametrize("algorithm", ["ffa_lora", "rolora", "fed_sb", "fedsvd"])
def test_tensors_that_did_not_change_are_not_sent_again(recipe, tmp_path, algorithm):
    keys = [f"algorithm.name={algorithm}", "rounds=4"]
    planned = silotune.plan(recipe, keys, measured=False).traffic
    done = silotune.run(recipe, keys, out=tmp_path / "run")
    assert done.summary["bytes_down"] == planned.bytes_down
    last = [r["bytes_down"] for r in done.metrics if r["event"] == "train" and r["round"] == 4]
    assert (max(last) < 0.8 * planned.down) == (algorithm != "fedsvd")


def difference(run, other):
    a, b = run.adapter(), other.adapter()
    return sum(float((a[n] - b[n]).norm() ** 2) for n in a) ** 0.5


def test_fewer_bits_are_further_from_float32_and_feedback_is_nearer(recipe, plain, tmp_path):
    def far(name, *keys):
        done = silotune.run(
            recipe, [f"wire.up={name}", *keys], out=tmp_path / name / str(len(keys))
        )
        return difference(done, plain)

    off = {name: far(name) for name in ("bf16", "int8", "int4")}
    assert off["bf16"] < off["int8"] < off["int4"]
    assert off["int4"] != far("int4", "wire.error_feedback=false")


def test_share_and_block_decide_the_bytes(recipe):
    def up(*keys):
        return silotune.plan(recipe, keys, measured=False).traffic.up

    assert up("wire.up=topk", "wire.share=0.05") < up("wire.up=topk", "wire.share=0.5")
    assert up("wire.up=int8", "wire.block=256") < up("wire.up=int8", "wire.block=32")


@pytest.mark.parametrize(
    ("algorithm", "extra"),
    [
        ("scaffold", ["algorithm.variates=displacement"]),
        ("flora", []),
        ("rolora", []),
        ("median", []),
    ],
)
def test_algorithms_get_changes_of_their_own_shape(recipe, tmp_path, algorithm, extra):
    keys = [f"algorithm.name={algorithm}", "wire.up=int8", *extra]
    planned = silotune.plan(recipe, keys, measured=False).traffic
    done = silotune.run(recipe, keys, out=tmp_path / "run")
    assert done.summary["bytes_up"] == planned.bytes_up


def test_noise_comes_before_the_codec_and_costs_as_much_privacy(recipe, tmp_path):
    keys = [
        *("privacy.unit=record", "privacy.noise_multiplier=1", "privacy.delta=0.01"),
        *("privacy.clip_norm=0.5", "privacy.noise=seeded", "algorithm.weights=uniform"),
        *("train.optimizer=sgd", "evaluate.every=0"),
    ]
    plain, coded = (
        silotune.run(recipe, [*keys, *more], out=tmp_path / str(len(more)))
        for more in ([], ["wire.up=int8"])
    )
    assert coded.summary["privacy"] == plain.summary["privacy"]
    assert difference(plain, coded) < 0.05 * sum(float(t.norm()) for t in plain.adapter().values())


def test_alone_nothing_travels_so_nothing_is_left_out(recipe, tmp_path):
    keys = ["compare.seeds=1", "compare.tune=false", "compare.centralized=false"]
    plain, coded = (
        silotune.compare(recipe, [*keys, *more], out=tmp_path / str(len(more))).result
        for more in ([], ["wire.up=sign"])
    )
    of = {name: client["scores"]["loss"] for name, client in plain["clients"].items()}
    for name, client in coded["clients"].items():
        assert client["scores"]["loss"]["local"] == of[name]["local"]
        assert client["scores"]["loss"]["federated"] != of[name]["federated"]


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        (["wire.error_feedback=false"], "float32 leaves nothing out"),
        (["wire.block=32"], "only has an effect with int8, int4, sign or topk"),
        (["wire.up=bf16", "wire.block=32"], "only has an effect with int8, int4, sign or topk"),
        (["wire.up=int8", "wire.share=0.5"], "neither wire.up nor wire.down is topk"),
        (
            ["wire.up=int8", "secure_sum.kind=masks", "secure_sum.range=1.0"],
            "cannot be used with secure sums",
        ),
        (["wire.up=int3"], "int3"),
        (
            ["wire.down=int8", "algorithm.name=flora", 'adapter.ranks={ "hospital-0" = 1 }'],
            "clients of several ranks",
        ),
    ],
)
def test_what_cannot_be_is_refused(recipe, keys, why):
    with pytest.raises(ConfigError, match=why):
        load_recipe(recipe, keys)


@pytest.mark.engine
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["flower-simulation", "flower"])
def test_flower_sends_the_same_bytes_and_ends_alike(recipe, tmp_path, engine):
    keys = ["rounds=2", "data.max_rows=4", "wire.up=int4", "wire.down=int8"]
    runtime = [f"runtime.name={engine}"]
    if engine == "flower-simulation":
        runtime.append(f"runtime.client_cpus={usable_threads()}")  # one actor
    here = silotune.run(recipe, keys, out=tmp_path / "here")
    there = silotune.run(recipe, [*keys, *runtime], out=tmp_path / "there")
    assert there.summary["adapter_sha256"] == here.summary["adapter_sha256"]
    for key in ("bytes_up", "bytes_down"):
        assert there.summary[key] == here.summary[key]
