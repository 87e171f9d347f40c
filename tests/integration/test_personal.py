"""FedSA-LoRA on a tiny model: what travels, what stays, and who can use it afterwards."""

import json

import pytest
import torch
from safetensors.torch import load_file

import silotune
from silotune.core.errors import ConfigError, RunFolderError
from silotune.federation.client_memory import load_memory
from silotune.federation.own_steps import personal
from silotune.federation.run_folder import RunFolder
from tests.conftest import hospital_rows, write_jsonl, write_tiny_recipe

CLIENTS = [f"hospital-{i}" for i in range(3)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model):
    place = tmp_path_factory.mktemp("personal")
    path = write_tiny_recipe(place, tiny_model, algorithm="fedsa_lora")
    write_jsonl(place / "hospitals.jsonl", hospital_rows(per_client=5))
    return path


@pytest.fixture(scope="module")
def done(recipe, tmp_path_factory):
    return silotune.run(recipe, ["report.samples=2"], out=tmp_path_factory.mktemp("run") / "run")


def own_of(run, name):
    return personal(RunFolder.open(run.path), name)


def test_only_a_travels_and_every_client_ends_with_a_b_of_its_own(done):
    shared = done.adapter()
    zeros = {n for n, t in shared.items() if not bool(t.any())}
    assert zeros == {n for n in shared if "lora_B" in n}, "the server never sees a B"
    sizes = {r["bytes_up"] for r in done.metrics if r["event"] == "train"}
    assert sizes == {4 * sum(t.numel() for n, t in shared.items() if n not in zeros)}
    kept = {name: own_of(done, name) for name in CLIENTS}
    assert all(own.keys() == zeros for own in kept.values())
    one = sorted(zeros)[0]
    assert len({kept[name][one].numpy().tobytes() for name in CLIENTS}) == 3
    assert all(bool(own[one].any()) for own in kept.values())


def test_a_client_is_scored_with_its_own_b_and_loads_it_by_name(done):
    shared, last = done.adapter(), done.summary["rounds"]
    scores = {
        r["client"]: r["loss"]
        for r in done.metrics
        if r["event"] == "evaluate" and r["round"] == last
    }
    for name in CLIENTS:
        loaded = done.load(client=name)
        for n, t in {**shared, **own_of(done, name)}.items():
            assert torch.equal(loaded.parameters[n].detach(), t)
        asked = silotune.Questions(client=name, base=False, max_new_tokens=2)
        found = silotune.evaluate(done.path, asked).scores["models"]["own"]["held-out"]["clients"]
        assert found[name]["loss"] == pytest.approx(scores[name], rel=1e-5)


def test_the_shared_part_alone_answers_like_the_base_and_is_refused(done):
    for use in (lambda: done.ask("What is a1?"), done.load, done.export, done.chat):
        with pytest.raises(ConfigError) as caught:
            use()
        assert "every client keeps a factor B of its own" in str(caught.value)
        assert "Name a client with --client: hospital-0, hospital-1" in str(caught.value)
    assert done.ask("What is a1?", base=True, max_new_tokens=2) is not None
    card = (done.path / "README.md").read_text(encoding="utf-8")
    assert '"your question" --client NAME' in card
    assert "without one, the adapter in this folder answers like the base" in card


def test_the_samples_in_the_report_are_answered_with_each_clients_own_b(done):
    for sample in done.samples:
        said = done.ask(sample["question"], client=sample["client"], max_new_tokens=128)
        assert sample["answers"]["federated"] == said.strip()


def test_an_export_of_a_client_holds_its_b(done, tmp_path):
    place = done.export(client="hospital-1", to=tmp_path / "out")
    saved = load_file(place / "adapter_model.safetensors")
    own = own_of(done, "hospital-1")
    assert all(torch.equal(saved[n], t) for n, t in own.items())


def test_it_resumes_to_the_same_bytes_with_every_clients_own_b(recipe, done, tmp_path, monkeypatch):
    from silotune.federation.run_folder import RunFolder as Folder

    saved, save = [], Folder.save

    def crash(self, state, **more):
        save(self, state, **more)
        saved.append(state.round)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Folder, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        silotune.run(recipe, ["report.samples=2"], out=tmp_path / "run")
    monkeypatch.setattr(Folder, "save", save)
    again = silotune.run(resume=tmp_path / "run")
    assert again.summary["adapter_sha256"] == done.summary["adapter_sha256"]
    for name in CLIENTS:
        mine, theirs = own_of(again, name), own_of(done, name)
        assert all(torch.equal(mine[n], t) for n, t in theirs.items())
    for path in (tmp_path / "run" / "clients" / "hospital-0").iterdir():
        path.unlink()
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(RunFolderError, match="the client trained in this round"):
        silotune.run(resume=tmp_path / "run")


def test_a_single_client_trains_as_by_itself(recipe, tmp_path):
    alone = [
        "data.max_rows=8",
        "partition.by=none",
        "partition.kind=iid",
        "partition.num_clients=1",
    ]
    personal_, plain = (
        silotune.run(recipe, [*alone, f"algorithm.name={name}"], out=tmp_path / name)
        for name in ("fedsa_lora", "fedavg")
    )
    name = next(iter(plain.summary["clients"]))
    held = {**personal_.adapter(), **own_of(personal_, name)}
    for n, t in plain.adapter().items():
        torch.testing.assert_close(held[n], t, rtol=1e-4, atol=1e-6)


def test_a_client_that_was_never_asked_begins_with_the_base(recipe, tmp_path):
    keys = ["sampling.num_clients=1", "rounds=1", "sampling.quorum=1.0"]
    run = silotune.run(recipe, keys, out=tmp_path / "run")
    trained = {r["client"] for r in run.metrics if r["event"] == "train"}
    new = next(name for name in CLIENTS if name not in trained)
    assert load_memory(RunFolder.open(run.path).client_folder(new), 9).tensors == {}
    by_round = {
        r["round"]: r["loss"]
        for r in run.metrics
        if r["event"] == "evaluate" and r["client"] == new
    }
    assert by_round[1] == pytest.approx(by_round[0], rel=1e-6), "A without B adds nothing"
    loaded = run.load(client=new)
    assert not any(bool(p.any()) for n, p in loaded.parameters.items() if "lora_B" in n)


def test_what_is_measured_from_outside_refuses_a_part_that_stays(recipe, done, tmp_path):
    with pytest.raises(ConfigError, match="own factor B, which is not part of the result"):
        silotune.audit(done.path)
    kept = silotune.run(recipe, ["checkpoint.keep_updates=true", "rounds=1"], out=tmp_path / "kept")
    with pytest.raises(ConfigError, match="scores with its own factor B, which is not kept"):
        silotune.contribution(kept.path)


def test_every_client_may_take_a_personal_arm(recipe, tmp_path):
    keys = ["algorithm.name=fedavg", 'compare.algorithms=["fedsa_lora", "fedprox"]', "rounds=1"]
    keys += ["compare.seeds=1", "compare.centralized=false", "data.validation_fraction=0.3"]
    compared = silotune.compare(recipe, keys, out=tmp_path / "c")
    best = compared.result["best"]
    choices = {"local", "federated", "federated: fedsa_lora"}
    losses: dict[str, dict[str, float]] = {arm: {} for arm in choices}
    for name in CLIENTS:
        lone = json.loads((tmp_path / "c" / "seed-3" / "local" / name / "part.json").read_text())
        losses["local"][name] = lone["validation_loss"]
    for arm in choices - {"local"}:
        place = tmp_path / "c" / "seed-3" / arm.replace(": ", "-") / "run"
        for row in silotune.Run(place).metrics:
            if row["event"] == "evaluate" and row["round"] == 1:
                losses[arm][row["client"]] = row["loss"]
    order = ["local", "federated", "federated: fedsa_lora"]
    for name in CLIENTS:
        wanted = min(order, key=lambda arm: losses[arm][name])
        assert best["takes"][name] == [wanted]
    assert not compared.result["rounds"], "the last round of every arm counts"
