"""adapter.start: a finished run or a PEFT folder as the first adapter of any task."""

import json
import shutil

import pytest
import torch

import silotune
from silotune.core.errors import ConfigError, Declined, RunFolderError
from silotune.core.tree import sha256
from silotune.core.types import Broadcast
from silotune.federation.client_config import ClientConfig
from silotune.federation.client_recipe import own_recipe
from silotune.federation.first_adapter import check_first_adapter
from silotune.federation.progress import Progress
from silotune.models.start import hash_of_start, read_start
from silotune.recipes.parse import load_recipe
from silotune.runtime.flower.submit import travelling
from tests.conftest import write_jsonl, write_tiny_recipe
from tests.integration.test_prefer_run import pairs


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model):
    path = write_tiny_recipe(tmp_path_factory.mktemp("start"), tiny_model)
    path.write_text(path.read_text().replace("dropout = 0.1", "dropout = 0"))
    return path


@pytest.fixture(scope="module")
def before(recipe, tmp_path_factory):
    return silotune.run(recipe, out=tmp_path_factory.mktemp("runs") / "before")


def test_a_run_goes_on_from_the_result_of_another(recipe, before, tmp_path):
    keys = ["rounds=1", f"adapter.start={before.path}"]
    done = silotune.run(recipe, keys, out=tmp_path / "run")
    losses = before.summary["overall"], done.summary["overall"]
    assert losses[1]["base_loss"] == losses[0]["federated_loss"], "the start is what is scored"
    about = json.loads((done.path / "provenance.json").read_text())["start"]
    assert about == {"path": str(before.path), "sha256": sha256(before.adapter())}
    start = read_start(str(before.path))
    checkpoint = done.adapter()
    assert start.keys() == checkpoint.keys()
    assert any(not torch.equal(start[n], checkpoint[n]) for n in start)


def test_a_run_says_what_it_starts_from(recipe, before, tmp_path):
    class Heard(Progress):
        notes = ()

        def note(self, text):
            self.notes = (*self.notes, text)

    heard = Heard()
    keys = ["rounds=1", f"adapter.start={before.path}"]
    silotune.run(recipe, keys, out=tmp_path / "run", progress=heard)
    assert f"training starts from {before.path}; its scores are called base" in heard.notes


def test_a_peft_folder_is_the_same_start_as_its_run(recipe, before, tmp_path):
    folder = shutil.copytree(before.path / "adapter", tmp_path / "peft")
    one, other = (
        silotune.run(recipe, ["rounds=1", f"adapter.start={place}"], out=tmp_path / str(n))
        for n, place in enumerate((before.path, folder))
    )
    assert one.summary["adapter_sha256"] == other.summary["adapter_sha256"]
    shutil.rmtree(folder)
    assert other.load().has_adapter, "the result does not need its start any more"


def test_preferences_follow_instruction_tuning(recipe, before, tmp_path):
    rows = write_jsonl(tmp_path / "pairs.jsonl", pairs())
    keys = ["task=prefer", f"data.path={rows}", f"adapter.start={before.path}"]
    done = silotune.run(recipe, [*keys, "rounds=2"], out=tmp_path / "run")
    base = [row for row in done.metrics if row["event"] == "evaluate" and row["round"] == 0]
    assert [row["reward_margin"] for row in base] == [0.0] * 3, "the start is the reference"
    plain = silotune.run(recipe, [*keys[:2], "rounds=2"], out=tmp_path / "plain")
    other = [row for row in plain.metrics if row["event"] == "evaluate" and row["round"] == 0]
    assert [r["win_rate"] for r in base] != [r["win_rate"] for r in other] or [
        r["loss"] for r in done.metrics if r["event"] == "evaluate" and r["round"] == 2
    ] != [r["loss"] for r in plain.metrics if r["event"] == "evaluate" and r["round"] == 2]
    found = silotune.evaluate(done).scores["models"]["federated"]["held-out"]["overall"]
    told = done.summary["scores"]["overall"]["federated"]
    assert found["reward_margin"] == pytest.approx(told["reward_margin"], abs=1e-6)
    compared = silotune.compare(
        recipe, [*keys, "compare.seeds=1", "rounds=1"], out=tmp_path / "c"
    ).result
    assert compared["overall"]["scores"]["reward_margin"]["base"]["mean"] == 0


def test_a_start_that_has_changed_is_noticed_at_resume(recipe, before, tmp_path, monkeypatch):
    folder = shutil.copytree(before.path / "adapter", tmp_path / "peft")

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("silotune.runtime.inprocess.run_rounds", stop)
        with pytest.raises(KeyboardInterrupt):
            silotune.run(recipe, [f"adapter.start={folder}"], out=tmp_path / "run")
    other = silotune.run(recipe, ["seed=5", "rounds=1"], out=tmp_path / "other")
    shutil.copy(other.path / "adapter" / "adapter_model.safetensors", folder)
    with pytest.raises(RunFolderError, match="the adapter that the run started from has changed"):
        silotune.run(resume=tmp_path / "run")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["adapter.rank=3"], "its r is 2: set adapter.rank = 2"),
        (["adapter.alpha=9"], "its lora_alpha is 4.0: set adapter.alpha = 4.0"),
        (["adapter.rslora=true"], "its use_rslora is false: set adapter.rslora = false"),
        (["adapter.kind=ia3", "adapter.targets=none"], "it is of the kind LORA"),
    ],
)
def test_an_adapter_of_another_kind_or_size_is_refused_with_the_key(recipe, before, keys, words):
    with pytest.raises(ConfigError, match="is another adapter than the recipe's") as caught:
        silotune.check(recipe, [*keys, f"adapter.start={before.path}"])
    assert words in str(caught.value)


def test_other_targets_are_named(recipe, before, tmp_path):
    keys = [f"adapter.start={before.path}", 'adapter.targets=["k_proj"]']
    with pytest.raises(ConfigError, match=r"It adapts: q_proj, v_proj\. Set adapter\.targets"):
        silotune.run(recipe, keys, out=tmp_path / "run")


def test_what_is_no_adapter_is_refused(recipe, before, tiny_model, tmp_path):
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "adapter_model.bin").write_bytes(b"")
    unfinished = shutil.copytree(before.path, tmp_path / "unfinished")
    (unfinished / "summary.json").unlink()
    for place, words in (
        (tmp_path / "none", "there is no such folder"),
        (tmp_path / "pickle", "a pickle, which is not read"),
        (tiny_model, "a model with all its weights"),
        (tmp_path, "it holds no adapter_config.json"),
        (unfinished, "the run is not finished"),
    ):
        with pytest.raises(ConfigError, match=words):
            silotune.check(recipe, [f"adapter.start={place}"])


def test_clients_are_told_a_hash_and_check_what_they_receive(recipe, before, tmp_path):
    keys = [f"adapter.start={before.path}", "runtime.name=flower"]
    sent = travelling(load_recipe(recipe, keys))
    assert sent.adapter.start == f"sha256:{hash_of_start(str(before.path))}"
    own = ClientConfig.model_validate({"name": "north", "model": "x", "data": {"path": "x.jsonl"}})
    here = own_recipe(sent, own)
    first = before.adapter()
    check_first_adapter(here, "north", Broadcast(1, first))
    other = {name: t + 1 for name, t in first.items()}
    check_first_adapter(here, "north", Broadcast(2, other))  # trained since
    with pytest.raises(Declined, match="the first adapter has the SHA-256"):
        check_first_adapter(here, "north", Broadcast(1, other))
    bad = sent.model_copy(
        update={"adapter": sent.adapter.model_copy(update={"start": str(tmp_path)})}
    )
    with pytest.raises(Declined, match=r"adapter.start names a path"):
        own_recipe(bad, own)
