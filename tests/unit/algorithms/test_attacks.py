"""The table of docs/robust.md: that the script prints it, and that the page's claims follow."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[3]
PAGE = HOUSE / "docs" / "robust.md"
ROBUST = ("norm_bound", "median", "trimmed_mean", "geometric_median", "krum", "multi_krum")


@pytest.fixture(scope="module")
def attacks():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("attacks", HOUSE / "benchmarks" / "attacks.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["attacks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["attacks"]


def printed() -> str:
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(r"<!-- Printed by benchmarks/attacks.py. -->\n(.*?)<!-- end -->", text, re.S)
    assert found is not None
    return found[1]


def cells() -> dict[tuple[str, str, str], str]:
    """(hostile, rule, attack) -> the cell."""
    head, _, *rows = [
        [c.strip() for c in line.strip("|").split("|")] for line in printed().strip().split("\n")
    ]
    return {
        (row[0], row[1].strip("`"), attack): cell
        for row in rows
        for attack, cell in zip(head[2:], row[2:], strict=True)
    }


def error(hostile, rule, attack) -> float:
    cell = cells()[hostile, rule, attack]
    return float("inf") if cell.startswith("over") else float(cell.split()[0])


def usable(hostile):
    return [r for r in ROBUST if not cells()[hostile, r, "scaled"].startswith("needs")]


ALL = ("1 of 5", "2 of 10", "4 of 10")
SENT = ("sign-flip", "scaled", "random", "colluding")


def test_one_loud_client_is_enough_against_the_mean():
    for hostile in ALL:
        assert (
            error(hostile, "fedavg", "scaled") == error(hostile, "fedavg", "random") == float("inf")
        )


def test_up_to_a_fifth_every_rule_holds():
    for hostile in ALL[:2]:
        assert usable(hostile) == list(ROBUST)
        assert max(error(hostile, rule, sent) for rule in ROBUST for sent in SENT) <= 0.2


def test_quiet_collusion_is_not_stopped():
    mean = error("2 of 10", "fedavg", "colluding")
    assert all(mean < error("2 of 10", rule, "colluding") for rule in ROBUST)


def test_at_four_of_ten_most_rules_give_way():
    left, hostile = usable("4 of 10"), "4 of 10"
    assert set(ROBUST) - set(left) == {"krum", "multi_krum"}
    calm = {rule: error(hostile, rule, "no attack") for rule in left}
    holds = {s: [r for r in left if error(hostile, r, s) < 4 * calm[r]] for s in SENT}
    assert holds["scaled"] == ["geometric_median"]
    assert holds["random"] == left
    assert holds["sign-flip"] == holds["colluding"] == []


def test_nothing_is_free():
    for hostile in ALL:
        mean = error(hostile, "fedavg", "no attack")
        for rule in usable(hostile):
            price = error(hostile, rule, "no attack") - mean
            assert price >= mean * 0.99 if rule == "krum" else price <= 0.02


def test_the_script_prints_these_cells(attacks):
    for rule in ("fedavg", "median"):
        for attack in ("none", "colluding"):
            shown = "no attack" if attack == "none" else attack
            again = attacks.cell(attacks.RULES[rule], attack, 10, 2)
            assert again == cells()["2 of 10", rule, shown]


def test_a_rule_without_enough_updates_says_how_many_it_needs(attacks):
    assert attacks.cell(attacks.RULES["krum"], "scaled", 10, 4) == "needs 11"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_script_prints_the_table_of_the_page(attacks):
    assert attacks.table() == printed()
