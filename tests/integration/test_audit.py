"""Attacks on our own runs: what must be found is found, and a true claim is never refuted."""

import json

import pytest
import torch
from typer.testing import CliRunner

import silotune
from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.cli import app
from silotune.core.algorithm import expected_layout
from silotune.core.errors import ConfigError, RunFolderError
from silotune.core.seeds import generator
from silotune.core.tree import l2_norm
from silotune.core.types import Broadcast, ServerState, Update
from silotune.data.client_rows import ClientRows
from silotune.federation import privacy_guarantee
from silotune.privacy import client_level
from silotune.privacy.accountant import spent
from silotune.privacy.base import PrivacyConfig
from silotune.privacy.noise import seeded_noise
from silotune.training.loop import stream
from silotune.workflows.audit import audit as audit_workflow
from silotune.workflows.audit.bounds import epsilon_lower_bound
from silotune.workflows.audit.canary_clients import CanaryClients, Guesses, guess, num_guesses
from silotune.workflows.audit.canary_rows import draw_canaries, with_canaries
from silotune.workflows.audit.membership import drawn_rows, membership_table
from silotune.workflows.audit.result import audit_lines, result_of
from tests.conftest import hospital_rows, write_jsonl, write_tiny_recipe

UNIFORM = "algorithm.weights=uniform"
CLIENT = ["privacy.unit=client", "privacy.delta=1e-3", "privacy.clip_norm=0.5", UNIFORM]
SMALL = ["rounds=1", "train.local_steps=1", "evaluate.every=0"]
LEARNS_BY_HEART = [
    *("rounds=1", "train.local_steps=100", "train.batch_size=16", "evaluate.every=0"),
    *("evaluate.batch_size=64", "adapter={kind='full'}", "data.max_rows=4"),
    "partition={kind='iid',num_clients=1}",
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model):
    return write_tiny_recipe(tmp_path_factory.mktemp("audited"), tiny_model)


@pytest.fixture
def few_others(monkeypatch):
    """Ranking secrets among 200 others is most of an audit's time on a tiny model."""
    monkeypatch.setattr(audit_workflow, "NUM_OTHERS", 15)


# --- the guard alone, without a model -------------------------------------------------------------

SHAPES = {f"layer-{n}": (50, 30) for n in range(4)}
Z, DELTA, COUNT, CLIP = 2.0, 1e-4, 1000, 0.5


class North:
    """One real client, whose change differs in every round."""

    def names(self):
        return ["north"]

    def num_rows(self):
        return {name: {"num_train": 5, "num_eval": 0} for name in self.names()}

    def train(self, messages):
        for name, broadcast in messages.items():
            gen = generator(1, name, broadcast.round)
            delta = {key: torch.randn(shape, generator=gen) for key, shape in SHAPES.items()}
            yield Update(name, broadcast.round, delta, 5, {})

    def evaluate(self, messages):
        assert list(messages) in ([], ["north"])
        return iter(())


def canaries_among(count: int, seed: int) -> tuple[CanaryClients, dict]:
    first = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    plain = fedavg(FedAvgConfig(weights="uniform"))
    layout = expected_layout(plain, ServerState(0, first))
    kinds = {"count": count, "clip_norm": CLIP, "layout": layout, "settings": {}, "seed": seed}
    return CanaryClients(North(), **kinds), first


def audit_of_the_guard(seed: int, *, noise: float = 1.0, rounds: int = 1) -> Guesses:
    """`noise`: what the mechanism really draws, by what it should."""
    clients, first = canaries_among(COUNT, seed)

    def source(round_: int):
        draw = seeded_noise(generator(seed, "privacy", round_))
        return lambda shape, std: draw(shape, noise * std)

    guarded = client_level.guarded(
        fedavg(FedAvgConfig(weights="uniform")),
        PrivacyConfig(unit="client", noise_multiplier=Z, delta=DELTA, clip_norm=CLIP),
        noise_multiplier=Z,
        num_planned=1 + COUNT,
        noise=source,
        write_down=lambda release: None,
    )
    state = ServerState(0, first, guarded.init(first, len(clients.names())))
    for round_ in range(1, rounds + 1):
        arrivals = list(
            clients.train(dict.fromkeys(clients.names(), Broadcast(round_, state.adapter)))
        )
        state = guarded.step(state, guarded.combine(state, arrivals))
    return guess(clients.coins, clients.scores(first, state.adapter), num_guesses(COUNT))


def bound(*found: Guesses) -> float:
    """Of several audits together: guesses on independent coins add up."""
    return epsilon_lower_bound(
        num_guesses=sum(own.num_guesses for own in found),
        num_correct=sum(own.num_correct for own in found),
        num_canaries=COUNT * len(found),
        delta=DELTA,
    )


CLAIM = spent(noise_multiplier=Z, num_releases=1, delta=DELTA).pld


def test_a_correct_mechanism_never_exceeds_its_claim_and_half_its_noise_is_caught():
    right = [audit_of_the_guard(seed) for seed in range(20)]
    assert max(bound(own) for own in right) <= CLAIM
    assert 0 < bound(*right) <= CLAIM, "an audit without power would pass too"
    halved = [audit_of_the_guard(seed, noise=0.5) for seed in range(20)]
    assert bound(*halved) > CLAIM


def test_without_noise_one_audit_finds_all_that_it_can():
    found = audit_of_the_guard(0, noise=1e-3)
    assert found.num_correct == found.num_guesses
    assert bound(found) > 2 * CLAIM


def not_at_all(delta, *, clip_norm, who):
    return {name: tensor.double() for name, tensor in delta.items()}, l2_norm(delta)


def tensor_by_tensor(delta, *, clip_norm, who):
    norms = {name: float(tensor.double().norm()) for name, tensor in delta.items()}
    scales = {name: min(1.0, clip_norm / max(norm, 1e-12)) for name, norm in norms.items()}
    return {name: t.double() * scales[name] for name, t in delta.items()}, l2_norm(delta)


@pytest.mark.parametrize("clip", [not_at_all, tensor_by_tensor])
def test_a_mechanism_that_clips_wrongly_is_caught(monkeypatch, clip):
    monkeypatch.setattr(client_level, "clip_by_global_norm", clip)
    assert bound(*(audit_of_the_guard(seed) for seed in range(2))) > CLAIM


def test_more_rounds_show_more():
    assert bound(audit_of_the_guard(0, rounds=6)) > bound(audit_of_the_guard(0)) + 0.5


def test_a_canary_is_in_with_its_own_direction_or_never_answers():
    clients, first = canaries_among(20, 4)
    cohort = clients.names()
    assert cohort == sorted(cohort)
    pairs = zip(clients.canaries, clients.coins, strict=True)
    assert cohort == [*(name for name, coin in pairs if coin), "north"]
    again = list(clients.train(dict.fromkeys(cohort, Broadcast(2, first))))
    once = clients.train(dict.fromkeys(cohort, Broadcast(1, first)))
    for one, other in zip(once, again, strict=True):
        if one.client == "north":
            continue
        assert l2_norm(one.delta) == pytest.approx(5.0, rel=1e-5)
        assert all(torch.equal(one.delta[name], other.delta[name]) for name in SHAPES)
    assert 3 < sum(clients.coins) < 17


# --- canary clients in whole runs -----------------------------------------------------------------


def test_next_to_no_noise_is_found_out_and_the_statement_counts_the_canaries(recipe, tmp_path):
    keys = [*CLIENT, *SMALL, "privacy.noise_multiplier=0.05"]
    found = silotune.audit(recipe, keys, out=tmp_path / "a")
    result = found.result
    assert result["attack"] == "canary clients"
    assert result["num_canaries"] == len(result["canaries"]) == 100
    assert result["num_guesses"] == 50
    assert result["epsilon_lower_bound"] > 1
    assert result["privacy"]["promise"]["num_planned"] == 103
    assert result["claim"]["epsilon"] > result["epsilon_lower_bound_at_most"]
    assert not found.is_refuted
    assert "no claim above" in result["verdict"]
    assert found.path == tmp_path / "a"
    with pytest.raises(RunFolderError, match="not a run folder"):
        silotune.run(resume=found.path)


def test_with_an_adaptive_norm_the_guard_is_replayed_and_the_norm_scored(recipe, tmp_path):
    keys = [*CLIENT, *SMALL, "privacy.noise_multiplier=0.25", "privacy.clipping=adaptive"]
    found = silotune.audit(recipe, keys, out=tmp_path / "a").result
    own = found["released_norm"]
    assert (own["noise_multiplier"], own["num_rounds"], own["is_refuted"]) == (0.25, 1, False)
    assert any("scored by change and norm together" in line for line in audit_lines(found))
    fixed = silotune.audit(recipe, [*keys, "privacy.clipping=fixed"], out=tmp_path / "b").result
    assert "released_norm" not in fixed


def test_the_command_exits_with_1_where_a_claim_is_refuted(recipe, tmp_path, monkeypatch):
    keys = [*CLIENT, *SMALL, "privacy.target_epsilon=1"]
    command = ["audit", str(recipe), *keys, "--canaries", "60"]
    right = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "right")])
    assert right.exit_code == 0, right.output
    assert "verdict: consistent with the claim" in right.stdout
    assert "claimed: epsilon 1.000" in right.stdout
    assert "a lower bound" in right.stdout

    monkeypatch.setattr(
        privacy_guarantee, "secure_noise", lambda shape, std: torch.zeros(tuple(shape))
    )
    wrong = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "wrong"), "--json"])
    assert wrong.exit_code == 1, wrong.output
    found = json.loads(wrong.stdout)
    assert found["is_refuted"]
    assert found["verdict"].startswith("REFUTED: epsilon is above")
    assert found["num_correct"] > 33


# --- canary rows ----------------------------------------------------------------------------------


def test_rows_that_are_learned_by_heart_are_found_and_their_secrets_exposed(
    recipe, tmp_path, few_others
):
    found = silotune.audit(recipe, LEARNS_BY_HEART, canaries=40, out=tmp_path / "a").result
    assert found["epsilon_lower_bound"] > 1
    assert found["claim"] is None
    assert found["verdict"] == "nothing is claimed"
    own, control = found["exposure"]["in"], found["exposure"]["out"]
    assert own["num_candidates"] == control["num_candidates"] == 16
    assert own["mean_bits"] > 3, "4 at most; seeds 3 to 5 give 3.1 to 3.9"
    assert control["mean_bits"] < 2.5, "what was never seen is not exposed"


@pytest.mark.slow  # test_planted_bugs.py attacks the noise of rows
def test_the_command_attacks_protected_rows_through_canary_rows(recipe, tmp_path, few_others):
    rows = ["privacy.unit=record", "privacy.delta=1e-3", "privacy.target_epsilon=1", UNIFORM]
    keys = [*SMALL, *rows, "train.optimizer=sgd", "--canaries", "40", "--json"]
    done = CliRunner().invoke(app, ["audit", str(recipe), *keys, "--out", str(tmp_path / "a")])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["attack"] == "canary rows"
    assert found["claim"]["epsilon"] == pytest.approx(1, abs=1e-3)
    assert found["epsilon_lower_bound"] <= found["claim"]["epsilon"]
    assert found["verdict"].startswith("consistent with the claim")


def test_canaries_that_no_step_has_met_are_told_and_nothing_is_found(recipe, tmp_path, few_others):
    keys = [*SMALL, "train.lr=0.0001"]
    found = silotune.audit(recipe, keys, canaries=40, out=tmp_path / "a").result
    assert found["epsilon_lower_bound"] == 0
    assert any("were not met by any step" in text for text in found["notes"])


def rows_of(*names: str, labels: tuple[str, ...] = ()) -> dict[str, ClientRows]:
    row = {"text": "fine", "label": "yes"} if labels else ({"role": "user", "content": "q"},)
    return {name: ClientRows(name, (row, row), (row,), labels=labels) for name in names}


def test_canary_rows_are_dealt_to_all_clients_and_only_those_that_are_in_are_planted():
    rows = rows_of("a", "b", "c")
    canaries = draw_canaries(rows, 30, seed=5, system="Be brief.", num_others=3)
    assert [c.client for c in canaries[:4]] == ["a", "b", "c", "a"]
    planted = with_canaries(rows, canaries)
    for name, own in planted.items():
        mine = [c.row for c in canaries if c.client == name and c.is_in]
        assert own.train == (*rows[name].train, *mine)
        assert own.evaluation == rows[name].evaluation
    questions = [c.row[1]["content"] for c in canaries]
    assert len(set(questions)) == 30
    assert {c.row[0]["role"] for c in canaries} == {"system"}
    for canary in canaries:
        assert len({row[2]["content"] for row in (canary.row, *canary.others)}) == 4
        assert {row[1]["content"] for row in canary.others} == {canary.row[1]["content"]}
    assert draw_canaries(rows, 30, seed=5, system="Be brief.", num_others=3) == canaries


def test_canary_rows_of_a_classifier_have_random_labels():
    rows = rows_of("a", "b", labels=("yes", "yes"))
    canaries = draw_canaries(rows, 40, seed=5, labels=["yes", "no"])
    assert {c.row["label"] for c in canaries} == {"yes", "no"}
    assert all(len(c.row["text"].split()) == 8 and not c.others for c in canaries)
    planted = with_canaries(rows, canaries)
    assert all(own.labels == tuple(r["label"] for r in own.train) for own in planted.values())


# --- finished runs --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hard(recipe, tmp_path_factory):
    """A run that has learned its rows by heart, with enough held-out rows for one rate."""
    folder = tmp_path_factory.mktemp("hard")
    rows = write_jsonl(folder / "rows.jsonl", hospital_rows(1, 40))
    keys = [key for key in LEARNS_BY_HEART if "max_rows" not in key]
    keys += [f"data.path={rows}", "data.eval_fraction=0.5"]
    return silotune.run(recipe, keys, out=folder / "run")


def test_a_run_that_knows_its_rows_by_heart_gives_them_away(hard):
    found = silotune.audit(hard.path)
    overall = found.result["overall"]
    (own,) = silotune.check(hard.config).rows.values()
    assert (overall["num_members"], overall["num_held_out"]) == (
        len(own.train),
        len(own.evaluation),
    )
    assert overall["auc"]["low"] > 0.6
    assert overall["tpr"]["0.01"] is None
    assert overall["tpr"]["0.1"]["mean"] > 0.3
    assert list(found.result["clients"]) == ["client-00"]
    assert found.path.parent == hard.path / "audits"
    claimed, note = audit_lines(found.result)
    assert claimed == "claimed: nothing"
    assert "does not bound epsilon" in note


def test_the_command_says_where_too_few_rows_are_held_out(hard):
    answer = CliRunner().invoke(app, ["audit", str(hard.path)])
    assert answer.exit_code == 0, answer.output
    assert "too few held-out rows (needs 100)" in answer.stdout
    assert "all together" in answer.stdout


def test_an_untrained_adapter_tells_nothing(recipe, tmp_path):
    done = silotune.run(recipe, [*SMALL, "train.lr=1e-12"], out=tmp_path / "r")
    auc = silotune.audit(done.path).result["overall"]["auc"]
    assert auc["low"] < 0.5 < auc["high"]


def test_only_rows_that_a_step_has_met_are_members(recipe, tmp_path):
    done = silotune.run(recipe, SMALL, out=tmp_path / "r")
    found = silotune.audit(done.path).result
    assert [own["num_members"] for own in found["clients"].values()] == [2, 2, 2]
    sizes = {name: len(own.train) for name, own in silotune.check(done.config).rows.items()}
    overall, size = found["overall"], sizes["hospital-1"]
    assert overall["num_members"] + overall["num_not_met"] == sum(sizes.values())
    met = drawn_rows(done.config, done.metrics, "hospital-1", size)
    flow = stream(size, done.config.seed, "hospital-1")
    assert met == sorted(next(flow) for _ in range(2))
    header, first, *_ = membership_table(found)
    assert dict(zip(header, first, strict=True))["members"] == "2"


def test_a_run_whose_rows_have_changed_is_refused(recipe, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", hospital_rows())
    done = silotune.run(recipe, [*SMALL, f"data.path={rows}"], out=tmp_path / "r")
    write_jsonl(rows, hospital_rows()[1:])
    with pytest.raises(RunFolderError, match="the data has changed since the run"):
        silotune.audit(done.path)


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "options", "message"),
    [
        ([], {"canaries": 3}, "canaries = 3: so few can hardly show anything"),
        (["runtime.name=flower"], {}, "runtime.name = 'flower': an audit adds canaries"),
        (["train.max_length=20"], {}, "train.max_length = 20 truncates canary rows"),
        (["train.lr=-1"], {}, "train.lr"),
    ],
)
def test_a_recipe_that_cannot_be_audited_is_refused_and_leaves_nothing(
    recipe, tmp_path, keys, options, message
):
    with pytest.raises(ConfigError) as caught:
        silotune.audit(recipe, keys, out=tmp_path / "a", **options)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_audit_is_never_overwritten(recipe, tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(RunFolderError, match="exists and is not overwritten") as caught:
        silotune.audit(recipe, out=tmp_path / "a")
    assert "resume" not in str(caught.value)


def test_a_run_takes_no_keys_and_a_folder_that_is_no_run_is_named(hard, tmp_path):
    for options in ({"overrides": ["rounds=1"]}, {"canaries": 50}, {"out": tmp_path / "x"}):
        with pytest.raises(ConfigError, match="is audited as it is"):
            silotune.audit(hard.path, **options)
    with pytest.raises(RunFolderError, match="is not a run folder"):
        silotune.audit(tmp_path)
    answer = CliRunner().invoke(app, ["audit", str(hard.path), "--canaries", "50"])
    assert answer.exit_code == 2
    assert "is audited as it is" in answer.stderr


def test_a_verdict_is_about_the_claim_that_was_made():
    coins, scores = [True] * 30 + [False] * 30, [1.0] * 30 + [0.0] * 30

    def told(epsilon):
        return {"promise": {"unit": "client", "delta": 1e-5}, "epsilon": {"pld": epsilon}}

    assert result_of(coins, scores, told(0.5), [])["is_refuted"]
    assert not result_of(coins, scores, told(9.0), [])["is_refuted"]
    assert result_of(coins, scores, told(None), [])["verdict"] == "nothing is claimed"
    assert result_of(coins, scores, None, [])["delta"] == 0
