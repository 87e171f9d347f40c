"""The server's training between rounds: fine-tuning, distillation, the teacher, and what leaves."""

import json
from dataclasses import replace

import pytest
import torch

import silotune
from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.core.algorithm import LocalRule
from silotune.core.errors import ConfigError, DataError, ModelError, UpdateError
from silotune.core.tree import sha256
from silotune.core.types import ServerState
from silotune.federation.progress import Progress
from silotune.federation.recipe_model import load_for
from silotune.federation.run_folder import RunFolder
from silotune.federation.server_work import TEACHER, ServerWork, open_server_work, server_rows
from silotune.models.loading import read_adapter
from silotune.recipes.parse import parse
from silotune.runtime.flower.submit import travelling
from silotune.runtime.inprocess import InProcessClients
from silotune.workflows.check import check
from tests.conftest import build_tiny_model, build_tokenizer, changed, hospital_rows, write_jsonl
from tests.tiny_encoders import build_tiny_encoder

SENTENCES = [
    {"sentence": f"{'very ' * (i % 5)}{'good' if i % 2 else 'bad'} film {i}", "label": i % 2}
    for i in range(40)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models and rows of both tasks: a student, a teacher, and one that tokenizes differently."""
    here = tmp_path_factory.mktemp("teaching")
    write_jsonl(here / "talks.jsonl", hospital_rows())
    write_jsonl(here / "sentences.jsonl", SENTENCES)
    build_tiny_model(here / "lm", seed=0)
    build_tiny_model(here / "lm-teacher", seed=1)
    build_tiny_encoder(here / "bert", num_layers=2, seed=0)
    build_tiny_encoder(here / "bert-teacher", num_layers=4, seed=1)
    build_tiny_model(here / "stranger", seed=1)
    stranger = build_tokenizer()
    stranger.add_tokens(["hospital"])
    stranger.save_pretrained(here / "stranger")
    return here


def recipe(place, task="classify", **changes):
    """Two rounds; every change is section__key=value."""
    lm = task == "instruct"
    table = {
        "seed": 3,
        "rounds": 2,
        "task": task,
        "model": {"name": str(place / ("lm" if lm else "bert")), "dtype": "float32"},
        "adapter": {"rank": 2, "alpha": 4},
        "data": {"path": str(place / ("talks.jsonl" if lm else "sentences.jsonl"))},
        "partition": {"kind": "iid", "num_clients": 2},
        "train": {"batch_size": 4, "local_steps": 1, "lr": 1e-2, "max_length": 128},
        "server": {"data_fraction": 0.3, "work": "distill", "lr": 1e-2},
        "distill": {"teacher": str(place / ("lm-teacher" if lm else "bert-teacher"))},
        "runtime": {"device": "cpu", "threads": 1},
        "report": {"page": False, "samples": 0},
    }
    return parse(changed(table, changes))


@pytest.fixture(scope="module")
def adapter_of(place, tmp_path_factory):
    """The adapter of a run, as one fingerprint. Equal recipes are trained once for all tests."""
    found: dict[str, str] = {}

    def run(task="classify", **changes):
        wanted = recipe(place, task, **changes)
        key = wanted.model_dump_json(serialize_as_any=True)
        if key not in found:
            done = silotune.run(wanted, out=tmp_path_factory.mktemp("runs") / "run")
            found[key] = sha256(done.adapter())
        return found[key]

    return run


# --- equivalences ---------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["classify", "instruct"])
@pytest.mark.parametrize("algorithm", ["fedavg", "fedadam"])
def test_at_weight_0_the_adapter_is_that_of_the_clients_alone(adapter_of, task, algorithm):
    chosen = {"name": algorithm}
    plain = adapter_of(task, algorithm=chosen, server__work="none")
    assert adapter_of(task, algorithm=chosen, server__weight=0.0) == plain
    assert adapter_of(task, algorithm=chosen, server__weight=1.0) != plain


@pytest.mark.parametrize("task", ["classify", "instruct"])
def test_without_the_kl_term_distillation_is_fine_tuning(adapter_of, task):
    tuned = adapter_of(task, server__work="fine-tune")
    assert adapter_of(task, distill__kl=0.0) == tuned
    assert adapter_of(task, distill__kl=1.0) != tuned


def test_the_teacher_uses_the_servers_learning_rate_unless_it_has_its_own(adapter_of):
    assert adapter_of(distill__lr=1e-2) == adapter_of()
    alone = adapter_of(distill__kl=0.0, distill__lr=1e-3)
    assert alone == adapter_of(distill__kl=0.0), "the student's learning rate is unaffected"


def test_a_top_k_of_all_labels_changes_nothing(adapter_of):
    assert adapter_of(distill__top_k=2) == adapter_of()
    assert adapter_of("instruct", distill__top_k=10_000) == adapter_of("instruct")
    assert adapter_of("instruct", distill__top_k=5) != adapter_of("instruct")


@pytest.mark.parametrize(
    "changes",
    [
        {"distill__temperature": 1.0},
        {"distill__attention": 1.0},
        {"distill__teacher_epochs": 0},
        {"distill__lr": 1e-3},
        {"distill__pretrain_epochs": 2},
        {"distill__compat": "raw-logits"},
        {"server__epochs": 2},
        {"server__lr": 1e-3},
        {"server__data_fraction": 0.4},
        {"distill__attention": 1.0, "distill__attention_layers": [[0, 0], [1, 3]]},
    ],
    ids=lambda changes: ", ".join(f"{k}={v}" for k, v in changes.items()),
)
def test_a_setting_of_the_server_changes_the_adapter(adapter_of, changes):
    if "distill__attention_layers" in changes:  # not the even spread, which is (0, 1), (1, 3)
        assert adapter_of(**changes) != adapter_of(distill__attention=1.0)
    assert adapter_of(**changes) != adapter_of()


def work_of(run, folder, algorithm=None) -> ServerWork:
    opened = RunFolder.create(folder, run)
    found = open_server_work(
        run, opened, algorithm=algorithm or fedavg(FedAvgConfig()), progress=Progress()
    )
    assert found is not None
    return found


def first_state(run, round_=1) -> ServerState:
    return ServerState(round_, read_adapter(load_for(run)))


def test_a_weight_of_one_half_ends_half_way(place, tmp_path):
    states = {}
    for weight in (0.0, 0.5, 1.0):
        run = check(recipe(place, server__weight=weight)).run
        state, _ = work_of(run, tmp_path / str(weight)).improve(first_state(run))
        states[weight] = state.adapter
    for name, start in states[0.0].items():
        torch.testing.assert_close(states[0.5][name], (start + states[1.0][name]) / 2)


def test_two_halves_of_a_batch_are_one_batch(place, tmp_path):
    """The accumulated gradient of batches with unequal numbers of targets is that of all rows."""
    own = str(write_jsonl(tmp_path / "own.jsonl", hospital_rows()[:8]))
    server = {"data_path": own, "work": "fine-tune", "lr": 1e-2}
    adapters = []
    for size, parts in ((8, 1), (4, 2)):
        train = {"batch_size": size, "accumulation": parts, "local_steps": 1, "max_length": 128}
        run = check(recipe(place, "instruct", server=server, train=train)).run
        state, (row,) = work_of(run, tmp_path / str(size)).improve(first_state(run))
        assert row["num_steps"] == 1
        adapters.append(state.adapter)
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, atol=1e-5, rtol=1e-4)


# --- what the server keeps and what leaves --------------------------------------------------------


def test_the_teacher_keeps_learning_from_round_to_round_and_is_kept_in_the_state(place, tmp_path):
    run = check(recipe(place)).run
    work = work_of(run, tmp_path / "run")
    first, rows = work.improve(first_state(run))
    again, _ = work_of(run, tmp_path / "again").improve(replace(first, round=2))
    second, _ = work.improve(replace(first, round=2))
    assert set(first.extra) == {TEACHER}
    assert sha256(first.extra[TEACHER]) != sha256(second.extra[TEACHER])
    assert sha256(again.adapter) == sha256(second.adapter), (
        "the state holds everything that is needed"
    )
    assert sha256(again.extra[TEACHER]) == sha256(second.extra[TEACHER])
    (row,) = rows
    assert row["event"] == "server"
    assert {"loss", "teacher_loss", "divergence", "seconds", "num_tokens"} <= set(row)


def test_what_the_algorithm_freezes_stays_frozen_at_the_server(place, tmp_path):
    def only_b(name: str, round_: int) -> bool:
        return "lora_B" in name

    plain = fedavg(FedAvgConfig())
    rule = LocalRule(trains=only_b, personal=lambda name: ".layer.1." in name)
    run = check(recipe(place)).run
    work = work_of(run, tmp_path / "run", replace(plain, local=rule))
    before = first_state(run)
    after, _ = work.improve(before)
    moved = {n for n, t in after.adapter.items() if not torch.equal(t, before.adapter[n])}
    assert moved
    assert all("lora_B" in name and ".layer.1." not in name for name in moved)


def test_no_client_is_sent_the_teacher_or_the_path_of_the_servers_rows(place, tmp_path):
    own = str(write_jsonl(tmp_path / "own.jsonl", SENTENCES))
    run = recipe(place, server__data_fraction=0.0, server__data_path=own)
    for name in ("flower", "flower-simulation"):
        changed = run.model_copy(update={"runtime": run.runtime.model_copy(update={"name": name})})
        sent = travelling(changed).model_dump_json(serialize_as_any=True)
        assert own not in sent
        assert "teacher" not in json.loads(sent)["distill"] or "bert-teacher" not in sent


def test_clients_receive_only_the_adapter(place, tmp_path, monkeypatch):
    received = []
    real = InProcessClients.train

    def train(self, messages):
        received.append(next(iter(messages.values())))
        return real(self, messages)

    monkeypatch.setattr(InProcessClients, "train", train)
    done = silotune.run(recipe(place), out=tmp_path / "run")
    assert [b.round for b in received] == [1, 2]
    for broadcast in received:
        assert broadcast.extra == {}
        assert set(broadcast.adapter) == set(done.adapter())
    state = RunFolder.open(done.path).load_state()
    assert state is not None
    assert set(state.extra) == {TEACHER}, "even though the state holds a teacher"


def test_actors_of_a_simulation_leave_the_servers_share_alone(place):
    run = recipe(place, runtime__name="flower-simulation")
    assert travelling(run).server.data_fraction == run.server.data_fraction


def test_the_template_travels_to_deployed_clients(place):
    """Bug: deployed clients that share one data set used the model's own template."""
    run = recipe(place, "instruct", runtime__name="flower", data__template="three-block")
    assert travelling(run).data.template == "three-block"


def test_a_run_stopped_between_rounds_ends_as_if_it_had_not_stopped(place, tmp_path):
    class Stop(Progress):
        def end_round(self, round_, rows):
            raise KeyboardInterrupt

    run = recipe(place, distill__pretrain_epochs=1)
    whole = silotune.run(run, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        silotune.run(run, out=tmp_path / "run", progress=Stop())
    teacher = (tmp_path / "run" / "teacher" / "teacher.json").read_bytes()
    resumed = silotune.run(resume=tmp_path / "run")
    assert sha256(resumed.adapter()) == sha256(whole.adapter())
    assert (tmp_path / "run" / "teacher" / "teacher.json").read_bytes() == teacher


# --- the teacher before any run -------------------------------------------------------------------


def test_a_pretrained_teacher_gives_the_same_run_as_pretraining_in_it(place, tmp_path, adapter_of):
    run = recipe(place, distill__pretrain_epochs=2)
    teacher = silotune.pretrain_teacher(run, out=tmp_path / "teacher")
    record = json.loads((teacher / "teacher.json").read_text(encoding="utf-8"))
    assert record["epochs"] == 2
    assert record["num_rows"] == len(server_rows(run))
    assert 0 <= record["held_out"]["accuracy"] <= 1
    assert adapter_of(distill__teacher=str(teacher)) == adapter_of(distill__pretrain_epochs=2)
    # a run that would pre-train does not train it again
    both = {"distill__teacher": str(teacher), "distill__pretrain_epochs": 2}
    assert adapter_of(**both) == adapter_of(distill__teacher=str(teacher))


def test_a_pretrained_teacher_is_a_plain_model_folder(place, tmp_path):
    from transformers import AutoModelForSequenceClassification

    run = recipe(place, distill__pretrain_epochs=1)
    folder = silotune.pretrain_teacher(run, out=tmp_path / "teacher")
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    assert plain.config.id2label == {0: "0", 1: "1"}
    assert not list(tmp_path.glob(".*part"))


def test_pretraining_says_what_is_missing(place, tmp_path):
    for changes in (
        {"distill__pretrain_epochs": 0},
        {"distill__pretrain_epochs": 1, "server__data_fraction": 0.0, "server__work": "none"},
    ):
        with pytest.raises(ConfigError, match=r"distill\.pretrain_epochs of at least 1"):
            silotune.pretrain_teacher(recipe(place, **changes), out=tmp_path / "teacher")
    assert not (tmp_path / "teacher").exists()


# --- what is refused ------------------------------------------------------------------------------


def test_a_teacher_with_another_tokenizer_is_refused_before_training(place, tmp_path):
    run = recipe(place, "instruct", distill__teacher=str(place / "stranger"))
    with pytest.raises(ModelError, match=r"has a different tokenizer than model\.name") as caught:
        silotune.run(run, out=tmp_path / "run")
    assert "Choose a teacher of the same family" in str(caught.value)
    assert not (tmp_path / "run").exists(), "nothing was trained, so no folder is kept"


def test_layers_that_do_not_exist_are_refused(place, tmp_path):
    run = recipe(place, distill__attention=1.0, distill__attention_layers=[[0, 9]])
    with pytest.raises(ModelError, match=r"there is no pair \(0, 9\): the student has 2 layers"):
        silotune.run(run, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"server__data_fraction": 0.0}, "server.work: 'distill' needs rows at the server"),
        ({"server__data_path": "x.jsonl"}, "server.data_path: cannot be used with data_fraction"),
        (
            {"server": {"work": "fine-tune", "data_path": "e.jsonl"}, "data__eval_path": "e.jsonl"},
            "server.data_path: names the clients' rows",
        ),
        ({"distill__teacher": None}, "distill.teacher: is missing"),
        ({"distill__attention_layers": [[0, 1]]}, "attention_layers has no effect"),
        ({"adapter__head": "local"}, "adapter.head: 'local' leaves the server without a head"),
    ],
)
def test_contradictions_are_found_before_anything_is_loaded(place, changes, text):
    with pytest.raises(ConfigError) as caught:
        recipe(place, **{k: v for k, v in changes.items() if v is not None}) if None not in (
            changes.values()
        ) else parse(without_teacher(place))
    assert text in str(caught.value)


def without_teacher(place):
    table = recipe(place).model_dump(exclude_none=True, serialize_as_any=True)
    del table["distill"]["teacher"]
    return table


def test_an_empty_server_split_is_an_error_before_training(place):
    with pytest.raises(DataError, match=r"server\.data_fraction = 0\.01 of 40 rows"):
        check(recipe(place, server__data_fraction=0.01))


def test_a_loss_that_is_not_a_number_ends_the_run(place, tmp_path):
    run = recipe(place, server__lr=1e30, train__clip_norm=0.0, distill__teacher_epochs=2)
    with pytest.raises(UpdateError, match=r"Lower server\.lr"):
        silotune.run(run, out=tmp_path / "run")
