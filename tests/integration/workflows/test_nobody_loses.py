"""What a client that a federation hurts can do: planted rows, and the arms of [finish]."""

import json

import pytest
import torch
from safetensors.torch import load_file

import silotune
from silotune.core.crossed import Estimate
from silotune.federation.own_steps import FILE
from silotune.recipes.parse import parse
from silotune.workflows.compare.compare import privacy_notes
from tests.conftest import build_tiny_model, hospital_rows, write_jsonl, write_tiny_recipe
from tests.integration.test_classify import ROWS, table_of
from tests.integration.workflows.test_tuned_comparison import Parts
from tests.tiny_encoders import build_tiny_encoder

ODD = "hospital-3"
"""It answers "no" where all others answer "yes"."""
EXTENDED = [
    f"{arm} + {way}" for arm in ("local", "federated") for way in ("own steps", "interpolation")
]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    place = tmp_path_factory.mktemp("planted")
    rows = [
        {
            "source": f"hospital-{c}",
            "question": f"Is {i} {chr(97 + i % 26)}?",
            "answer": ("no" if f"hospital-{c}" == ODD else "yes") * (1 + i % 3),
        }
        for c in range(4)
        for i in range(44)
    ]
    table = {
        "seed": 3,
        "rounds": 2,
        "model": {"name": str(build_tiny_model(place / "model")), "dtype": "float32"},
        "adapter": {"rank": 2, "targets": ["all-linear"]},
        "data": {
            "path": str(write_jsonl(place / "rows.jsonl", rows)),
            "validation_fraction": 0.2,
            "eval_fraction": 0.5,
        },
        "partition": {"by": "source"},
        "train": {"batch_size": 4, "local_steps": 2, "lr": 3e-2, "max_length": 64},
        "algorithm": {"name": "fedavg", "server_lr": 2.0},
        "runtime": {"device": "cpu", "threads": 1},
        "report": {"samples": 0},
        "finish": {"local_steps": 2, "interpolate": [0.0, 0.5, 1.0]},
        "compare": {"seeds": 3, "tune": False, "centralized": False, "every": 2},
    }
    return silotune.compare(parse(table), out=place / "c")


def scored(done, place, client=None):
    """The held-out losses of a part, row by row: of one client, or of all that are in it."""
    text = (done.path / place / "scores.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return [row["loss_sum"] for row in rows if client in (None, row["client"])]


def part(done, place):
    return json.loads((done.path / place / "part.json").read_text(encoding="utf-8"))


def test_the_federation_hurts_the_client_that_differs_and_it_takes_something_of_its_own(planted):
    result = planted.result
    odd = result["clients"][ODD]
    assert odd["verdicts"]["loss"]["federated"] == "lost"
    assert ODD in result["worse_off"]["federated"]
    takes = result["best"]["takes"][ODD]
    assert len(takes) == 3
    assert "federated" not in takes, "alone, or after steps of its own"
    # its own steps make good most of what it had lost
    gaps = odd["differences"]["loss"]
    assert abs(gaps["federated + own steps"]["mean"]) < 0.5 * gaps["federated"]["mean"]


def test_if_each_takes_its_best_nobody_is_worse_off_than_alone_beyond_noise(planted):
    best = planted.result["best"]
    for group in (*best["clients"].values(), best["overall"]):
        gap = Estimate(
            **{k: group["differences"]["loss"]["best"][k] for k in Estimate.__dataclass_fields__}
        )
        assert gap.low is not None
        assert gap.low <= 0
        assert group["verdicts"]["loss"]["best"] != "lost"
    assert set(best["takes"]) == set(planted.result["clients"])


def test_every_arm_that_goes_on_has_as_many_examples_as_its_counterpart(planted):
    costs = planted.result["arms"]
    assert list(costs) == ["base", "local", "federated", *EXTENDED]
    for way in ("own steps", "interpolation"):
        for key in ("examples", "steps", "tokens"):
            lone, joint = costs[f"local + {way}"][key], costs[f"federated + {way}"][key]
            assert lone == joint > costs["federated"][key]
    assert costs["federated + own steps"]["bytes_up"] == costs["federated"]["bytes_up"] > 0
    # 4 clients, 3 seeds, 2 steps of 4 rows
    more = costs["federated + own steps"]["examples"] - costs["federated"]["examples"]
    assert more == 4 * 3 * 2 * 4


def test_a_share_of_0_is_what_was_before_and_of_1_what_is_after_bit_for_bit(planted):
    seen, shares = set(), planted.result["shares"]
    for arm, start in (("local", "local/{}"), ("federated", "federated")):
        for client, by_seed in shares[f"{arm} + interpolation"].items():
            for seed, share in zip((3, 4, 5), by_seed, strict=True):
                mixed = scored(planted, f"seed-{seed}/interpolation/{arm}/{client}")
                after = scored(planted, f"seed-{seed}/own steps/{arm}/{client}")
                begun = scored(planted, f"seed-{seed}/{start.format(client)}", client)
                assert mixed == {0.0: begun, 1.0: after}.get(share, mixed)
                assert begun != after
                assert (mixed in (begun, after)) == (share in (0.0, 1.0))
                seen.add(share)
    assert seen == {0.0, 0.5, 1.0}


def test_nothing_of_the_federation_is_trained_again(planted):
    """The arm's own run, and the adapters of a run with the same [finish]."""
    arm = silotune.Run(planted.path / "seed-4" / "federated" / "run")
    assert arm.config.finish.local_steps == 0
    run = arm.config.model_copy(
        update={"finish": silotune.load_recipe("hospitals", ["finish.local_steps=2"]).finish}
    )
    alike = silotune.run(run, out=planted.path / "alike")
    assert alike.summary["adapter_sha256"] == arm.summary["adapter_sha256"]
    kept = load_file(planted.path / "seed-4" / "own steps" / "federated" / ODD / FILE)
    own = load_file(alike.path / "clients" / ODD / FILE)
    for name, tensor in own.items():
        assert torch.equal(tensor, kept[name]), name


def test_people_see_what_each_client_takes(planted):
    card = (planted.path / "README.md").read_text(encoding="utf-8")
    page = (planted.path / "report.html").read_text(encoding="utf-8")
    for text in (card, page):
        for words in ("If each client takes", "minus best alone", "“+ own steps”: up to 2 steps"):
            assert words in text
    assert "without validation rows" not in card


# --- tuned ----------------------------------------------------------------------------------------

KEYS = [
    *("rounds=1", "train.local_steps=1", "compare.seeds=1", "compare.tune={lr=[1e-2]}"),
    *("compare.centralized=false", "finish.local_steps=2", "finish.lr=0.02"),
]


def test_own_steps_get_the_same_trials_alone_and_federated(tiny_model, tmp_path):
    recipe = write_tiny_recipe(tmp_path, tiny_model)
    write_jsonl(tmp_path / "hospitals.jsonl", hospital_rows(2, 14))
    first, rest, whole = Parts("seed 3, federated + own steps, hospital-1"), Parts(), Parts()
    done = silotune.compare(recipe, KEYS, out=tmp_path / "whole", progress=whole)
    trials = done.result["num_trials"]
    assert trials == dict.fromkeys(trials, 2)
    assert set(trials) == {"local", "federated", "local + own steps", "federated + own steps"}
    for arm in ("local", "federated"):
        for client, chosen in done.result["chosen"][f"{arm} + own steps"].items():
            place = done.path / "tuning" / "own steps" / arm / client
            each = {p.parent.name: part(done, p.parent) for p in place.glob("*/part.json")}
            assert set(each) == {"lr 0.01, steps 2", "lr 0.01, steps 1"}
            best = min(each, key=lambda name: each[name]["validation_loss"])
            assert best == f"lr {chosen['lr']:g}, steps {chosen['steps']}"
    costs = done.result["tuning_costs"]
    assert costs["local + own steps"]["steps"] == costs["federated + own steps"]["steps"] == 6
    assert list((done.path / "tuning").rglob("scores.jsonl")) == []
    numbers = [text.split("]")[0] for text in whole.notes if text.startswith("[")]
    assert (numbers[0], numbers[-1]) == ("[1/22", "[22/22")
    with pytest.raises(KeyboardInterrupt):
        silotune.compare(recipe, KEYS, out=tmp_path / "c", progress=first)
    resumed = silotune.compare(resume=tmp_path / "c", progress=rest)
    assert first.begun[:-1] + rest.begun == whole.begun
    same = ("chosen", "best", "clients", "overall", "notes")
    assert {k: resumed.result[k] for k in same} == {k: done.result[k] for k in same}


def test_own_steps_start_where_their_arm_has_ended_also_with_a_head_of_its_own(tmp_path):
    """Steps that are too short to move a float32: the same losses, bit for bit."""
    write_jsonl(tmp_path / "rows.jsonl", ROWS[:40])
    build_tiny_encoder(tmp_path / "student", num_layers=2, seed=0)
    changes = {
        "rounds": 1,
        "adapter__head": "local",
        "data__validation_fraction": 0.3,
        "finish": {"local_steps": 1, "lr": 1e-30},
        "compare": {"seeds": 1, "tune": False, "centralized": False},
    }
    done = silotune.compare(parse(table_of(tmp_path, **changes)), out=tmp_path / "c")
    for client in ("cinema-0", "cinema-1"):
        for arm, start in (("local", f"local/{client}"), ("federated", "federated")):
            begun = scored(done, f"seed-3/{start}", client)
            assert scored(done, f"seed-3/own steps/{arm}/{client}") == begun
    lone, joint = (
        scored(done, f"seed-3/own steps/{arm}/cinema-0") for arm in ("local", "federated")
    )
    assert lone != joint


def test_a_note_says_that_own_steps_have_no_noise():
    keys = ["privacy.unit=record", "privacy.noise_multiplier=1.0", "privacy.delta=1e-3"]
    run = silotune.load_recipe("hospitals", keys)
    with_steps = silotune.load_recipe("hospitals", [*keys, "finish.local_steps=1"])
    bare = [note for note in privacy_notes(with_steps) if note not in privacy_notes(run)]
    assert bare == ["no noise protects the own steps: they are for the client that takes them"]
