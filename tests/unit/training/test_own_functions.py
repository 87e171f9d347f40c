"""A loss and a metric of a user's own: what they get, and what is wrong with them, in one error."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from silotune.core.errors import ConfigError, Declined
from silotune.core.types import Score
from silotune.federation.client_config import ClientConfig
from silotune.federation.client_recipe import own_recipe
from silotune.recipes.parse import parse
from silotune.training.own_functions import own_loss, own_metric
from silotune.training.scoring import RowScore, metrics
from silotune.training.tasks.base import Batch, Loss
from silotune.training.tasks.instruct import INSTRUCT

CODE = """
import torch
import torch.nn.functional as F

def doubled(logits, targets):
    return 2 * F.cross_entropy(logits, targets, reduction="none")

def scalar(logits, targets):
    return F.cross_entropy(logits, targets)

def detached(logits, targets):
    return doubled(logits, targets).detach()

def negative(logits, targets):
    return -doubled(logits, targets)

def one_argument(logits):
    return logits

def listed(logits, targets):
    return [0.0 for _ in targets]

def longest(rows):
    return max(row.num_tokens for row in rows)

def as_tensor(rows):
    return torch.tensor(0.25)

def text(rows):
    return "good"

def undefined(rows):
    return float("nan")

def no_argument():
    return 1.0

def divides(rows):
    return 1 / 0
"""


@pytest.fixture(autouse=True)
def rules(tmp_path, monkeypatch):
    (tmp_path / "own_rules.py").write_text(CODE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_rules", None)


LOGITS = torch.tensor([[1.0, 2.0, 0.0], [0.5, 0.0, 0.0]], requires_grad=True)
TARGETS = torch.tensor([2, 0])


def task_of(function):
    """The tiniest task whose logits do not depend on a model."""

    def loss(loaded, batch, *, attentions=False):
        return Loss(F.cross_entropy(LOGITS, batch.targets, reduction="sum"), LOGITS)

    return own_loss(f"python:own_rules:{function}", replace(INSTRUCT, loss=loss))


def test_an_own_loss_gets_logits_and_targets_and_is_summed():
    batch = Batch(TARGETS[None], torch.tensor([0, 1]), TARGETS, 2, torch.ones(1, 2).bool())
    found = task_of("doubled").loss(None, batch)
    expected = 2 * F.cross_entropy(LOGITS, TARGETS, reduction="sum")
    torch.testing.assert_close(found.loss_sum, expected)
    assert found.loss_sum.requires_grad
    assert torch.equal(found.logits, LOGITS)
    assert own_loss(None, INSTRUCT) is INSTRUCT


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (
            "dubled",
            r"does not exist: 'own_rules' has no function 'dubled'\. Did you mean 'doubled'\?",
        ),
        ("scalar", r"returns shape \(\) for targets of \(2,\)\.\n  Return one loss of at least 0"),
        ("detached", r"returns a tensor without a gradient\.\n"),
        ("negative", r"returns a loss below 0\.\n"),
        ("one_argument", r"fails: TypeError: .*\n  It is called with the logits and the targets\."),
        ("listed", r"returns a list\.\n  Return one loss of at least 0 for each target"),
    ],
)
def test_what_is_wrong_with_a_loss_is_one_error_before_training(function, why):
    with pytest.raises(ConfigError, match=rf"train\.loss: 'python:own_rules:{function}' {why}"):
        task_of(function)


def test_an_own_metric_is_a_number_of_a_clients_rows():
    rows = [RowScore(1.0, 2), RowScore(3.0, 7)]
    longest = own_metric("python:own_rules:longest")
    tensor = own_metric("python:own_rules:as_tensor")
    assert longest is not None
    assert tensor is not None
    assert longest(rows) == 7.0
    assert tensor(rows) == 0.25
    assert own_metric(None) is None


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("text", r"returns a str\.\n  Return a number\."),
        ("undefined", r"returns nan\.\n  Return a finite number for all rows\."),
        ("no_argument", r"fails: TypeError: .*\n  It is called with a client's scored rows\."),
        ("divides", r"fails: ZeroDivisionError: division by zero\.\n"),
        ("nobody", r"does not exist: 'own_rules' has no function 'nobody'"),
    ],
)
def test_what_is_wrong_with_a_metric_is_one_error_before_training(function, why):
    with pytest.raises(
        ConfigError, match=rf"evaluate\.metric: 'python:own_rules:{function}' {why}"
    ):
        own_metric(f"python:own_rules:{function}")


def test_the_metric_of_several_clients_is_a_mean_weighted_by_rows():
    scores = [Score("north", 1.0, 4, 2, 3, metric=1.0), Score("south", 1.0, 4, 2, 1, metric=-3.0)]
    assert metrics(scores)["metric"] == 0.0
    assert metrics(scores[:1])["metric"] == 1.0
    assert "metric" not in metrics([replace(s, metric=None) for s in scores])


BOTH = {"train": {"loss": "python:own_rules:doubled"}}
BOTH |= {"evaluate": {"metric": "python:own_rules:longest"}}


def recipe(**sections):
    return parse({"rounds": 1, "data": {"path": "x"}, **BOTH, **sections})


def test_a_real_client_runs_only_functions_that_its_limits_name():
    own = {"name": "north", "model": "/own/copy", "data": {"path": "own.jsonl"}}
    with pytest.raises(Declined) as caught:
        own_recipe(recipe(), ClientConfig.model_validate(own))
    for key in ("train.loss", "evaluate.metric"):
        assert f"{key} is code of the server's choice; this client runs it only if" in str(
            caught.value
        )
    named = ["python:own_rules:doubled", "python:own_rules:longest"]
    for one in named:
        with pytest.raises(Declined):
            own_recipe(
                recipe(), ClientConfig.model_validate({**own, "limits": {"functions": [one]}})
            )
    allowed = ClientConfig.model_validate({**own, "limits": {"functions": named}})
    assert own_recipe(recipe(), allowed).train.loss == "python:own_rules:doubled"
    assert "own_rules" not in sys.modules, "a recipe alone imports nothing"


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"train": {"loss": "python:no colon"}}, "train.loss: is not the path of a function. Name"),
        ({"evaluate": {"metric": "my_metric"}}, "evaluate.metric: is not the path of a function"),
        ({"evaluate": {**BOTH["evaluate"], "every": 0}}, "evaluate.metric: has no effect, because"),
        (
            {"privacy": {"unit": "record", "delta": 0.1, "noise_multiplier": 1.0}},
            "train.loss: cannot be used with privacy.unit = 'record'",
        ),
    ],
    ids=str,
)
def test_keys_that_cannot_be_right_are_refused(sections, why):
    with pytest.raises(ConfigError, match=re.escape(why)):
        recipe(**sections)


def test_the_how_to_page_shows_the_key_of_the_client():
    page = Path(__file__).parents[3] / "docs" / "how-to" / "add-a-metric-or-a-loss.md"
    limits = page.read_text(encoding="utf-8").split("[limits]")[1]
    assert 'functions = ["python:my_rules:smoothed", "python:my_rules:worst_tenth"]' in limits
