"""Consent to a run: who is asked, what an answer is about, and what is remembered."""

import json

import pytest

from silotune.core.errors import AwaitsConsent, ConfigError, Declined
from silotune.federation.approval import MOST_WAITING, check_approved, consent_sha256
from silotune.federation.approval_files import APPROVED, WAITING, answer, read_request, requests
from silotune.federation.client_config import ClientConfig, RunsConfig
from silotune.federation.client_recipe import MOST_BYTES, check_version, read_recipe
from silotune.recipes.parse import parse
from silotune.runtime.recipe_hash import named_sha256


def recipe(**sections):
    return parse(
        {
            "rounds": 3,
            "model": {"name": "copy:tiny"},
            "data": {"path": "each client's own", "prompt": "{question}", "completion": "{answer}"},
            "runtime": {"name": "flower"},
            **sections,
        }
    )


def told(run, run_id="a1"):
    text = run.model_dump_json(serialize_as_any=True)
    return {"run": run_id, "recipe": text, "base_sha256": "ab", "version": "0.4.1"}


def client(tmp_path, **runs):
    data = {"path": "rows.jsonl"}
    return ClientConfig.model_validate(
        {"name": "north", "state": str(tmp_path / "state"), "data": data, "runs": runs}
    )


def no_names(name):
    raise AssertionError(f"nobody may look for {name}")


def check(own, run, run_id="a1", hash_of=no_names, log=None):
    """`log` gets what the client's log of operators would."""

    def tell(what, **facts):
        if log is not None:
            log.append((what, facts))

    check_approved(own, run, told(run, run_id), hash_of, tell)


def test_without_a_wish_every_run_is_accepted_and_nothing_is_written(tmp_path):
    check(client(tmp_path), recipe())
    assert not (tmp_path / "state").exists()


def test_a_run_waits_until_it_is_approved_and_then_runs(tmp_path):
    own, run = client(tmp_path, approve="ask"), recipe()
    for _ in range(2):
        with pytest.raises(AwaitsConsent, match="'north' has not agreed to this run yet"):
            check(own, run)
    (request,) = requests(tmp_path / "state")
    assert (request.run, request.state, request.version) == ("a1", WAITING, "0.4.1")
    assert request.sha256 == consent_sha256(run)
    answer(tmp_path / "state", request, approved=True)
    check(own, run)
    assert read_request(tmp_path / "state", "a1").state == APPROVED


def test_a_yes_can_be_withdrawn_and_given_again(tmp_path):
    own, run, state = client(tmp_path, approve="ask"), recipe(), tmp_path / "state"
    with pytest.raises(AwaitsConsent):
        check(own, run)
    request = read_request(state, "a1")
    answer(state, request, approved=True)
    answer(state, request, approved=False)
    with pytest.raises(Declined, match="its people declined this run"):
        check(own, run)
    answer(state, request, approved=True)
    check(own, run)


def test_a_changed_recipe_asks_again_and_so_does_another_run(tmp_path):
    own, run, state = client(tmp_path, approve="ask"), recipe(), tmp_path / "state"
    with pytest.raises(AwaitsConsent):
        check(own, run)
    answer(state, read_request(state, "a1"), approved=True)
    check(own, run)
    with pytest.raises(AwaitsConsent):
        check(own, recipe(rounds=4))
    assert read_request(state, "a1").state == WAITING
    with pytest.raises(AwaitsConsent):
        check(own, run, run_id="b2")
    assert {own.run: own.state for own in requests(state)} == {"a1": WAITING, "b2": WAITING}


def test_the_log_says_who_asks_and_what_has_changed_since_the_answer_and_nothing_twice(tmp_path):
    own, state, log = client(tmp_path, approve="ask"), tmp_path / "state", []
    for rounds in (3, 3, 4, 5):  # nobody has answered: a change is no news
        with pytest.raises(AwaitsConsent):
            check(own, recipe(rounds=rounds), log=log)
    assert [(what, facts["run"]) for what, facts in log] == [("run asks for consent", "a1")]
    assert not read_request(state, "a1").changed
    for approved, word in ((True, "approved"), (False, "declined")):
        answer(state, read_request(state, "a1"), approved=approved)
        other = recipe(rounds=10 + approved)
        for _ in range(2):
            with pytest.raises(AwaitsConsent):
                check(own, other, log=log)
        assert log[-1][1]["why"] == f"its recipe has changed since it was {word}"
        assert log[-1][1]["recipe_sha256"] == consent_sha256(other)
        assert read_request(state, "a1").changed
    assert len(log) == 3


def test_a_server_that_asks_without_end_leaves_a_few_files_and_one_line(tmp_path):
    own, run, state, log = client(tmp_path, approve="ask"), recipe(), tmp_path / "state", []
    for number in range(MOST_WAITING + 30):
        with pytest.raises(AwaitsConsent) as error:
            check(own, run, run_id=f"run{number}", log=log)
    assert f"is not asked: {MOST_WAITING} runs wait for its people already" in str(error.value)
    assert len(list((state / "approvals").iterdir())) == len(requests(state)) == MOST_WAITING
    kept = {what: {str(facts) for seen, facts in log if seen == what} for what, _ in log}
    assert len(kept["run asks for consent"]) == MOST_WAITING
    assert len(kept["run not asked about"]) == 1, "every time the same, and so written once"
    # a run that already waits may still change, and an answer makes room for the next one
    with pytest.raises(AwaitsConsent, match="has not agreed"):
        check(own, recipe(rounds=9), run_id="run3")
    answer(state, read_request(state, "run3"), approved=False)
    with pytest.raises(AwaitsConsent, match="has not agreed"):
        check(own, run, run_id="onemore")


def test_a_recipe_longer_than_any_is_refused_unread():
    text = recipe().model_dump_json(serialize_as_any=True)
    assert read_recipe(text + " " * (MOST_BYTES - len(text))).rounds == 3
    with pytest.raises(Declined, match=f"has {MOST_BYTES + 1} bytes, and a client reads"):
        read_recipe(text + " " * (MOST_BYTES - len(text) + 1))


def test_an_answer_to_the_recipe_before_is_no_answer_to_the_one_that_asks_now(tmp_path):
    """Somebody reads a request, and the recipe changes before they say yes."""
    own, state = client(tmp_path, approve="ask"), tmp_path / "state"
    with pytest.raises(AwaitsConsent):
        check(own, recipe())
    read_before = read_request(state, "a1")
    with pytest.raises(AwaitsConsent):
        check(own, recipe(rounds=400))
    answer(state, read_before, approved=True)
    with pytest.raises(AwaitsConsent):
        check(own, recipe(rounds=400))


ASKS = {
    "rounds": {"rounds": 4},
    "columns": {"data": {"path": "x", "prompt": "{hiv}", "completion": "{answer}"}},
    "model": {"model": {"name": "copy:other"}},
    "steps": {"train": {"local_steps": 7}},
    "algorithm": {"algorithm": {"name": "fedprox"}},
    "adapter": {"adapter": {"rank": 3}},
    "seed": {"seed": 5},
}


@pytest.mark.parametrize("what", ASKS)
def test_the_hash_is_about_everything_that_a_client_does(what):
    assert consent_sha256(recipe(**ASKS[what])) != consent_sha256(recipe())


def test_the_hash_is_not_about_the_day_the_servers_machine_or_the_servers_own_sections():
    run = recipe()
    day = run.data.model_copy(update={"date": "2026-11-30"})
    machine = run.runtime.model_copy(update={"threads": 7, "join_timeout_s": 9.0})
    stop = run.stop.model_copy(update={"patience": 3})
    others = run.model_copy(update={"data": day, "runtime": machine, "stop": stop})
    assert others != run
    assert consent_sha256(others) == consent_sha256(run)


def test_listed_recipes_are_known_by_hash_or_by_a_name_that_the_client_resolves(tmp_path):
    run = recipe()
    by_hash = client(tmp_path, approve="listed", recipes=[consent_sha256(run)])
    check(by_hash, run)
    with pytest.raises(Declined, match=f"SHA-256 {consent_sha256(recipe(rounds=4))}, is not in"):
        check(by_hash, recipe(rounds=4))
    by_name = client(tmp_path, approve="listed", recipes=["ours"])
    check(by_name, run, hash_of={"ours": consent_sha256(run)}.__getitem__)
    with pytest.raises(Declined):
        check(by_name, recipe(rounds=4), hash_of={"ours": consent_sha256(run)}.__getitem__)


def test_the_name_of_a_recipe_file_means_what_the_file_says_here(tmp_path):
    (tmp_path / "ours.toml").write_text('rounds = 3\n[data]\npath = "rows.jsonl"\n')
    before = named_sha256("ours.toml", tmp_path)
    assert before == named_sha256("ours.toml", tmp_path)
    (tmp_path / "ours.toml").write_text('rounds = 4\n[data]\npath = "rows.jsonl"\n')
    assert named_sha256("ours.toml", tmp_path) != before
    with pytest.raises(ConfigError):
        named_sha256("no-such-recipe", tmp_path)


@pytest.mark.parametrize("runs", [{"approve": "listed"}, {"recipes": ["x"]}, {"approve": "no"}])
def test_settings_that_contradict_each_other_are_refused(runs):
    with pytest.raises(ValueError, match=r"listed|ask"):
        RunsConfig.model_validate(runs)


def test_a_run_id_is_never_a_path(tmp_path):
    for run_id in ("../x", "a/b", "", ".", "a b"):
        with pytest.raises(Declined, match="letters and digits"):
            check(client(tmp_path, approve="ask"), recipe(), run_id)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sha256": 1}', "\x00"])
def test_damaged_files_are_one_clear_error(tmp_path, text):
    own, state = client(tmp_path, approve="ask"), tmp_path / "state"
    with pytest.raises(AwaitsConsent):
        check(own, recipe())
    (state / "approvals" / "a1" / "asked.json").write_text(text)
    with pytest.raises(ConfigError, match=r"asked\.json"):
        read_request(state, "a1")


def test_an_answer_that_nobody_wrote_here_counts_as_none(tmp_path):
    own, state = client(tmp_path, approve="ask"), tmp_path / "state"
    with pytest.raises(AwaitsConsent):
        check(own, recipe())
    facts = {"sha256": consent_sha256(recipe()), "answer": "perhaps"}
    (state / "approvals" / "a1" / "answer.json").write_text(json.dumps(facts))
    with pytest.raises(AwaitsConsent):
        check(own, recipe())


@pytest.mark.parametrize(
    ("versions", "server", "fits"),
    [
        (None, "", True),
        (["0.4"], "0.4.1", True),
        (["0.4"], "0.4", True),
        (["0.4"], "0.40.1", False),
        (["0.4.1"], "0.4.1", True),
        (["0.4.1"], "0.4.10", False),
        (["0.3", "0.4"], "0.3.9", True),
        (["0.4"], "", False),
        ([], "0.4", False),
    ],
)
def test_a_client_can_say_which_versions_of_the_server_it_accepts(tmp_path, versions, server, fits):
    limits = {} if versions is None else {"versions": versions}
    data = {"path": "rows.jsonl"}
    own = ClientConfig.model_validate({"name": "north", "data": data, "limits": limits})
    if fits:
        check_version(own, server)
    else:
        with pytest.raises(Declined, match=r"limits\.versions"):
            check_version(own, server)
