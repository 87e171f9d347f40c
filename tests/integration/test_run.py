"""Whole runs on the tiny model, in process: results, equivalences, and what is left on disk."""

import hashlib
import json
import os
import tomllib

import pytest
import torch
from safetensors.torch import load_file, save_file

import silotune
from silotune.cli.results import print_run
from silotune.core.errors import ConfigError, RunFolderError
from silotune.core.tree import l2_norm, sha256, subtract
from silotune.data import client_rows
from silotune.models.loading import num_base_loads, read_adapter
from silotune.recipes.parse import parse, to_toml
from silotune.results.summary import unused_rows
from silotune.workflows import provenance, write_results
from tests.conftest import (
    build_tiny_model,
    changed,
    hospital_rows,
    open_to_others,
    write_jsonl,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model):
    """One finished run that several tests look at."""
    place = tmp_path_factory.mktemp("finished")
    data = write_jsonl(place / "rows.jsonl", hospital_rows())
    before = num_base_loads()
    shown = {"report__page": True, "report__samples": 1}
    done = silotune.run(recipe_of(tiny_model, data, **shown), out=place / "run")
    return done, num_base_loads() - before


def recipe_of(model, data, **changes):
    table = {
        "seed": 3,
        "rounds": 3,
        "model": {"name": str(model), "dtype": "float32"},
        "adapter": {"rank": 2, "alpha": 4, "dropout": 0.1, "targets": ["q_proj", "v_proj"]},
        "data": {"path": str(data)},
        "partition": {"by": "source"},
        "train": {"batch_size": 2, "local_steps": 2, "lr": 1e-2, "max_length": 128},
        "runtime": {"device": "cpu", "threads": 1},
        "report": {"page": False, "samples": 0},
    }
    return parse(changed(table, changes))


@pytest.fixture
def go(tmp_path, tiny_model, hospital_file):
    """Run a variation of the tiny recipe; returns the run."""
    count = iter(range(100))

    def run(**changes):
        recipe = recipe_of(tiny_model, hospital_file, **changes)
        return silotune.run(recipe, out=tmp_path / f"run-{next(count)}")

    return run


# --- what a run leaves


def test_nobody_else_can_read_a_runs_folder_or_any_file_in_it(tmp_path, tiny_model, hospital_file):
    """samples.json and metrics.jsonl were readable by everybody on a shared machine."""
    before = os.umask(0o002)
    try:
        recipe = recipe_of(tiny_model, hospital_file, report__page=True, report__samples=1)
        done = silotune.run(recipe, out=tmp_path / "runs" / "run")
    finally:
        os.umask(before)
    assert (done.path / "samples.json").is_file()
    assert (done.path / "report.html").is_file()
    assert open_to_others(tmp_path / "runs") == []


def test_the_base_is_loaded_once(finished):
    done, loads = finished
    assert loads == 1
    assert done.summary["base_model_loads"] == 1


def test_summary_has_the_promised_keys(finished):
    summary = finished[0].summary
    assert set(summary) >= {
        *("clients", "bytes_up", "bytes_down", "seconds_total", "seconds_training"),
        *("base_model_loads", "tokens_trained", "peak_memory_bytes", "adapter_sha256"),
    }
    assert list(summary["clients"]) == ["hospital-0", "hospital-1", "hospital-2"]
    for client in summary["clients"].values():
        assert set(client) == {"base_loss", "federated_loss", "num_train", "num_eval"}
        assert client["federated_loss"] < client["base_loss"]
    assert 0 < summary["seconds_training"] < summary["seconds_total"]


def test_bytes_are_those_of_the_float32_adapter(finished):
    done, _ = finished
    one = sum(4 * t.numel() for t in done.adapter().values())
    assert done.summary["bytes_up"] == 3 * 3 * one  # rounds x clients
    assert done.summary["bytes_down"] == (2 + 1) * 3 * one  # not the first, but the last to score


def test_metrics_hold_one_object_per_round_client_and_event(finished):
    rows = finished[0].metrics
    trained = [(r["round"], r["client"]) for r in rows if r["event"] == "train"]
    scored = [(r["round"], r["client"]) for r in rows if r["event"] == "evaluate"]
    names = ["hospital-0", "hospital-1", "hospital-2"]
    assert sorted(trained) == [(r, n) for r in (1, 2, 3) for n in names]
    assert sorted(scored) == [(r, n) for r in (0, 1, 2, 3) for n in names]


def test_the_adapter_is_a_standard_peft_folder(finished):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done, _ = finished
    base = AutoModelForCausalLM.from_pretrained(done.config.model.name)
    model = PeftModel.from_pretrained(base, str(done.path / "adapter"))
    ours = done.load()
    tokenizer = AutoTokenizer.from_pretrained(done.path / "adapter")
    assert tokenizer.chat_template == ours.tokenizer.chat_template
    ids = torch.tensor([[5, 9, 20, 33]])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, ours.model(input_ids=ids).logits)


def test_the_result_is_the_last_checkpoint_and_its_fingerprint_is_the_files(finished):
    done, _ = finished
    checkpoint = done.path / "checkpoints" / "round-00003" / "adapter.safetensors"
    from safetensors.torch import load_file

    assert sha256(load_file(checkpoint)) == sha256(done.adapter())
    file = (done.path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert done.summary["adapter_sha256"] == hashlib.sha256(file).hexdigest()


def test_the_resolved_recipe_reads_back_as_the_same_config(finished):
    done, _ = finished
    table = tomllib.loads((done.path / "recipe.toml").read_text())
    assert parse(table) == done.config
    assert to_toml(parse(table)) == (done.path / "recipe.toml").read_text()


def test_provenance_names_versions_and_hashes(finished):
    provenance = json.loads((finished[0].path / "provenance.json").read_text())
    assert provenance["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert len(provenance["base"]["sha256"]) == len(provenance["data"]["sha256"]) == 64
    assert (provenance["device"], provenance["dtype"]) == ("cpu", "float32")


def test_the_model_card_says_what_was_trained_and_what_is_not_protected(finished):
    card = (finished[0].path / "README.md").read_text()
    for text in ("3 rounds of fedavg", "LoRA of rank 2", "without differential privacy"):
        assert text in card
    assert finished[0].summary["adapter_sha256"] in card


def test_nothing_in_a_run_folder_is_a_pickle(finished):
    kinds = {p.suffix for p in finished[0].path.rglob("*") if p.is_file()}
    assert kinds <= {
        ".json",
        ".jsonl",
        ".toml",
        ".safetensors",
        ".md",
        ".html",
        ".jinja",
        ".lock",
        ".sha256",
    }


def test_ask_answers_with_the_adapter_or_the_base(finished):
    done, _ = finished
    assert isinstance(done.ask("What is a1?", max_new_tokens=5), str)
    assert isinstance(done.ask("What is a1?", base=True, max_new_tokens=5), str)


# --- equal and different


def test_the_same_recipe_gives_the_same_bytes(go):
    assert go().summary["adapter_sha256"] == go().summary["adapter_sha256"]


def test_another_seed_gives_another_adapter(go):
    assert go().summary["adapter_sha256"] != go(seed=4).summary["adapter_sha256"]


def test_fedprox_with_mu_zero_is_fedavg_bit_for_bit(go):
    prox = go(algorithm={"name": "fedprox", "mu": 0.0})
    assert prox.summary["adapter_sha256"] == go().summary["adapter_sha256"]


def test_fedprox_acts_and_the_reply_proves_its_mu(go):
    plain, prox = go(), go(algorithm={"name": "fedprox", "mu": 5.0})
    assert plain.summary["adapter_sha256"] != prox.summary["adapter_sha256"]
    trained = [r for r in prox.metrics if r["event"] == "train"]
    assert {r["mu"] for r in trained} == {5.0}
    assert all(r["penalty"] > 0 for r in trained)
    assert all("mu" not in r for r in plain.metrics)


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_server_optimisers_run_and_differ_from_fedavg(go, name):
    done = go(algorithm={"name": name})
    assert done.summary["adapter_sha256"] != go().summary["adapter_sha256"]


def test_fedavgm_without_momentum_is_fedavg_bit_for_bit(go):
    heavy = go(algorithm={"name": "fedavgm", "momentum": 0.0})
    assert heavy.summary["adapter_sha256"] == go().summary["adapter_sha256"]


def test_one_client_one_sgd_step_is_a_plain_sgd_step(tmp_path, tiny_model):
    """Federated with one client and one round against the formula, through the whole machinery."""
    rows = [{**row, "source": "only"} for row in hospital_rows(1, 9)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    own = silotune.check(recipe_of(tiny_model, data)).rows["only"]
    recipe = recipe_of(
        tiny_model,
        data,
        rounds=1,
        adapter__dropout=0.0,
        train__optimizer="sgd",
        train__clip_norm=0.0,
        train__local_steps=1,
        train__batch_size=len(own.train),
        train__lr=0.5,
    )
    done = silotune.run(recipe, out=tmp_path / "run")
    from silotune.data.chat_templates import set_template
    from silotune.models.loading import load_model
    from silotune.training.tasks.instruct import INSTRUCT, collate, prepare

    loaded = load_model(recipe.model, recipe.adapter, seed=recipe.seed, device="cpu")
    set_template(loaded.tokenizer)
    batch = collate(prepare(own.train, loaded.tokenizer, 128).examples)
    start = read_adapter(loaded)
    loss = INSTRUCT.loss(loaded, batch).loss_sum / batch.num_trained
    loss.backward()
    for name, tensor in done.adapter().items():
        grad = loaded.parameters[name].grad
        assert grad is not None
        torch.testing.assert_close(tensor, start[name] - 0.5 * grad, rtol=1e-4, atol=1e-7)


def test_full_fine_tuning_trains_all_weights_and_saves_a_model_folder(go):
    from transformers import AutoModelForCausalLM

    done = go(adapter={"kind": "full"}, train__lr=1e-3)
    model = AutoModelForCausalLM.from_pretrained(done.path / "adapter")
    ours = done.load()
    ids = torch.tensor([[5, 9, 20, 33]])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, ours.model(input_ids=ids).logits)
    overall = done.summary["overall"]
    assert overall["federated_loss"] < overall["base_loss"]
    assert isinstance(done.ask("What?", base=True, max_new_tokens=3), str)


def test_partial_participation_samples_and_still_scores_everyone(go):
    done = go(rounds=4, sampling={"num_clients": 1})
    trained = [r["client"] for r in done.metrics if r["event"] == "train"]
    assert len(trained) == 4
    assert len(set(trained)) > 1
    assert all(c["federated_loss"] is not None for c in done.summary["clients"].values())


def test_keep_best_makes_the_best_round_the_result(go):
    # far too large a rate: later rounds are worse than earlier ones
    done = go(rounds=4, train__lr=3.0, checkpoint={"keep": "best"})
    from silotune.federation.metrics import held_out_losses

    losses = held_out_losses(done.metrics)
    losses.pop(0)
    assert done.summary["result_round"] == min(losses, key=lambda r: losses[r])
    assert done.summary["overall"]["federated_loss"] == min(losses.values())


def test_in_every_round_a_client_sees_other_rows(go, monkeypatch):
    from silotune.federation import client

    seen = []
    real = client.plan_steps
    monkeypatch.setattr(
        client,
        "plan_steps",
        lambda rows, *rest: (seen.append(tuple(rows)), real(rows, *rest))[1],
    )
    go(rounds=2, train__local_steps=1, sampling={"fraction": 1.0})
    first, second = seen[:3], seen[3:]
    for a, b in zip(first, second, strict=True):
        assert not set(a) & set(b)  # 2 rows of at least 6 each: the stream goes on


def test_weights_follow_the_rows_or_are_uniform(go):
    by_rows, uniform = go(), go(algorithm={"name": "fedavg", "weights": "uniform"})
    assert by_rows.summary["adapter_sha256"] != uniform.summary["adapter_sha256"]


def test_a_base_without_chat_template_can_be_trained_and_asked(tmp_path, hospital_file):
    bare = build_tiny_model(tmp_path / "bare", template=None)
    done = silotune.run(recipe_of(bare, hospital_file, rounds=1), out=tmp_path / "run")
    assert isinstance(done.ask("What is a1?", max_new_tokens=3), str)
    assert "### Assistant:" in (done.path / "adapter" / "chat_template.jinja").read_text()


def test_gradient_checkpointing_changes_memory_and_not_the_result(go):
    plain = go(rounds=1, adapter__dropout=0.0)
    saved = go(rounds=1, adapter__dropout=0.0, model__gradient_checkpointing=True)
    moved = subtract(plain.adapter(), saved.adapter())
    assert l2_norm(moved) <= 1e-4 * l2_norm(plain.adapter())


# --- resume and refusal


def test_resuming_a_finished_run_changes_nothing(finished):
    done, _ = finished
    before = {p: p.read_bytes() for p in done.path.rglob("*") if p.is_file()}
    again = silotune.run(resume=done.path)
    assert again.summary == done.summary
    after = {p: p.read_bytes() for p in done.path.rglob("*") if p.is_file()}
    assert before == after


def test_a_resumed_run_keeps_its_recipe(finished):
    done, _ = finished
    with pytest.raises(ConfigError, match="a resumed run keeps its recipe"):
        silotune.run(overrides=["train.lr=1"], resume=done.path)
    other = done.config.model_copy(update={"rounds": 9})
    with pytest.raises(ConfigError, match=r"differs from that of .* in: rounds"):
        silotune.run(other, resume=done.path)
    with pytest.raises(ConfigError, match="out and resume exclude each other"):
        silotune.run(resume=done.path, out="x")


def test_data_that_changed_under_a_run_is_noticed(go, hospital_file):
    done = go(rounds=1)
    (done.path / "summary.json").unlink()
    write_jsonl(hospital_file, hospital_rows(3, 9))
    with pytest.raises(RunFolderError, match=r"the data has changed since the run began"):
        silotune.run(resume=done.path)


def by_number(rows, fraction, _):
    """The held-out rows as they once were: drawn by how many rows there are."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(5)).tolist()
    held = {rows[n] for n in order[: max(1, round(fraction * len(rows)))]}
    return [row for row in rows if row not in held], [row for row in rows if row in held]


@pytest.fixture
def former_version(monkeypatch):
    """A version of silotune that chose held-out rows in another way, and did not say how."""
    with monkeypatch.context() as patch:
        patch.setattr(client_rows, "hold_out", by_number)
        patch.setattr(provenance, "HELD_OUT_RULE", None)
        yield patch


def test_a_run_that_began_with_other_held_out_rows_is_not_continued(go, former_version):
    """They would mix with the train rows, and scores would look better than they are."""
    done = go(rounds=1)
    former_version.undo()
    former = "began with another version of silotune, which chose the held-out rows"
    with pytest.raises(RunFolderError, match=former):
        silotune.evaluate(done.path)
    with pytest.raises(RunFolderError, match=former):
        silotune.audit(done.path)
    (done.path / "summary.json").unlink()
    with pytest.raises(RunFolderError, match=former):
        silotune.run(resume=done.path)


def test_a_run_from_before_whose_held_out_rows_are_a_file_is_continued(
    go, former_version, hospital_file, tmp_path
):
    held = write_jsonl(tmp_path / "held.jsonl", hospital_rows(3, 2))
    done = go(rounds=1, data__eval_path=str(held))
    former_version.undo()
    before = (done.path / "adapter" / "adapter_model.safetensors").read_bytes()
    (done.path / "summary.json").unlink()
    silotune.run(resume=done.path)
    assert (done.path / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_questions_are_not_asked_about_rows_that_have_changed(go, hospital_file):
    """Bug: they were scored as held out, although the run had trained on some of them."""
    done = go(rounds=1)
    write_jsonl(hospital_file, hospital_rows(3, 9))
    with pytest.raises(RunFolderError, match=r"the data has changed since the run began"):
        silotune.evaluate(done.path)


def test_an_unfinished_run_says_how_to_go_on(go):
    done = go(rounds=1)
    (done.path / "summary.json").unlink()
    with pytest.raises(RunFolderError, match=r"not finished[\s\S]*silotune run --resume"):
        _ = done.summary


def test_a_result_that_the_disk_does_not_hold_as_it_was_trained_is_no_result(
    tiny_model, hospital_file, tmp_path, monkeypatch
):
    """Others lost days to adapters that were trained well and saved as zeros (opacus 820)."""
    save = write_results.save_adapter

    def spoilt(loaded, folder, *, base):
        save(loaded, folder, base=base)
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        name = next(name for name in tensors if "lora_B" in name)
        save_file({**tensors, name: tensors[name] * 0}, path)

    with monkeypatch.context() as patch:
        patch.setattr(write_results, "save_adapter", spoilt)
        with pytest.raises(RunFolderError, match="is not there as it was trained"):
            silotune.run(recipe_of(tiny_model, hospital_file, rounds=1), out=tmp_path / "r")
    assert silotune.run(resume=tmp_path / "r").adapter()


def test_rounds_and_clients_are_data_frames(finished):
    done, _ = finished
    rounds, clients = done.rounds(), done.table()
    assert list(rounds["round"]) == [0, 1, 2, 3]
    assert rounds["held_out_loss"].iloc[-1] == done.summary["overall"]["federated_loss"]
    sent = sum(r.get("bytes_up", 0) + r.get("bytes_down", 0) for r in done.metrics)
    assert rounds["bytes"].sum() <= sent
    assert list(clients["client"]) == list(done.summary["clients"])


def test_rows_that_are_held_but_not_used_are_explained_beside_the_two_counts(
    tiny_model, tmp_path, capsys
):
    """The results had 39 train rows and the table of clients 40, without a word."""
    rows = hospital_rows()
    for row in rows[:2]:
        row["question"] += " really" * 30
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe = recipe_of(tiny_model, data, rounds=1, report__page=True)
    done = silotune.run(recipe, out=tmp_path / "run")
    (said,) = unused_rows(recipe, done.summary, done.split)
    assert said == (
        "2 rows cannot be used within train.max_length = 128, so the results count fewer rows "
        "than the clients hold: hospital-0 (2)."
    )
    for name in ("README.md", "report.html"):
        assert said in (done.path / name).read_text().replace("\\", ""), name
    print_run(done)
    assert said in capsys.readouterr().out
    used, held = done.summary["clients"]["hospital-0"], done.split["hospital-0"]
    assert sum(held[key] - used[key] for key in ("num_train", "num_eval")) == 2
