"""Charts are self-contained SVG text. They follow the theme and do not rely on colour alone."""

import re
import subprocess
import sys
from itertools import pairwise, product
from xml.etree import ElementTree

import pytest

from silotune.results import charts, svg
from tests.unit.results.page_values import ARMS, HOSTILE, comparison_of, split_of

LOSSES = {name: {0: 2.5 + i / 10, 1: 2.3, 2: 2.2 - i / 10} for i, name in enumerate(HOSTILE)}
TRAINED = {name: {1: 2.3, 2: 2.2} for name in HOSTILE}
SPLIT = split_of(HOSTILE, num_labels=14)
COMPARED = comparison_of(HOSTILE)["clients"]
SCORES = {name: c["scores"]["loss"] for name, c in COMPARED.items()}
GAPS = {name: c["differences"]["loss"] for name, c in COMPARED.items()}
SECONDS = dict.fromkeys(HOSTILE, 3.0)
AXIS = {"metric": "held-out loss", "x_label": "held-out loss (nats per token)"}


@pytest.fixture(scope="module")
def drawn():
    return {
        "held out": charts.held_out_loss(LOSSES, {0: 2.5, 1: 2.3, 2: 2.2}),
        "training": charts.training_loss(TRAINED),
        "bytes": charts.bytes_per_round({1: 3e6, 2: 4e6}, {1: 2e6, 2: 1e6}),
        "seconds": charts.seconds_per_client(SECONDS, SECONDS),
        "rows": charts.rows_per_client(SPLIT),
        "labels": charts.labels_per_client(SPLIT),
        "tokens": charts.tokens_per_client(SPLIT),
        "scores": charts.scores(SCORES, ARMS, **AXIS),
        "differences": charts.differences(GAPS, ARMS, **AXIS),
    }


def texts(picture: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(picture).iter("text")]


def test_importing_charts_imports_neither_matplotlib_nor_torch():
    code = "import sys, silotune.results.charts; print({'matplotlib', 'torch'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_drawing_changes_no_global_setting_and_needs_no_pyplot():
    code = (
        "import sys, matplotlib\n"
        # looking at the backend chooses one, which imports pyplot
        "now = lambda: {k: v for k in matplotlib.rcParams if k != 'backend' "
        "for v in [matplotlib.rcParams[k]]}\n"
        "before = now()\n"
        "from silotune.results import charts; charts.held_out_loss({'a': {0: 2.0, 1: 1.0}}, {})\n"
        "print('matplotlib.pyplot' in sys.modules, before == now())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "True"]


def test_every_chart_is_well_formed_and_says_what_it_shows(drawn):
    for name, picture in drawn.items():
        root = ElementTree.fromstring(picture)  # fails on anything that is not XML
        assert root.attrib["role"] == "img"
        assert root.attrib["aria-label"] == root.findtext("title") != ""
        assert len(list(root.iter("path"))) > 5, name


def test_every_chart_names_the_unit_of_its_axis(drawn):
    units = {
        "held out": "held-out loss (nats per token)",
        "training": "training loss (nats per token)",
        "bytes": "sent per round (MB)",
        "seconds": "time over all rounds (seconds)",
        "rows": "number of rows",
        "labels": "share of the client's rows (%)",
        "tokens": "length of a row (tokens)",
        "scores": "held-out loss (nats per token)",
        "differences": "held-out loss (nats per token)",
    }
    for name, unit in units.items():
        assert unit in texts(drawn[name]), name


def test_charts_hold_no_markup_of_names_no_script_and_no_address(drawn):
    for picture in drawn.values():
        assert not re.search(r"<(script|img|style|metadata|!|\?)", picture)
        assert "http" not in picture
        assert not re.search(r"url\((?!#)|href=\"(?!#)", picture)


def test_names_are_shown_as_they_are_and_not_read_as_mathematics(drawn):
    for name in ("<script>alert(1)</script>", "$x_1^2$", "東京大学医学部附属病院"):
        for key in ("held out", "seconds", "rows", "tokens", "scores"):
            assert name in texts(drawn[key]), key
    assert "_underscore #010203 font-family: x; " in texts(drawn["rows"])


def test_text_axes_and_grid_are_in_the_colour_of_the_page(drawn):
    for picture in drawn.values():
        for tag in re.findall(r"<[^>]*>", picture):
            assert svg.INK not in tag
            assert not tag.startswith("<text") or "fill: currentColor" in tag
        hues = {hue.upper() for hue in re.findall(r": (#[0-9a-fA-F]{6})", picture)}
        assert hues <= set(charts.PALETTE)


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_palette_is_readable_on_white_and_on_near_black():
    for colour, paper in product(charts.PALETTE, ("#ffffff", "#14171b")):
        dark, light = sorted((luminance(colour), luminance(paper)))
        assert (light + 0.05) / (dark + 0.05) >= 3, (colour, paper)


def test_lines_and_labels_differ_by_more_than_their_colour():
    looks = [charts._look(i) for i in range(32)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 32
    assert len({look["marker"] for look in looks[:8]}) == 8
    segments = [charts._segment(i) for i in range(charts.MAX_LABELS)]
    assert len({(s["facecolor"], s["hatch"]) for s in segments}) == charts.MAX_LABELS
    assert all(a["hatch"] != b["hatch"] for a, b in pairwise(segments))


def test_drawing_twice_gives_the_same_text(drawn):
    assert charts.labels_per_client(SPLIT) == drawn["labels"]
    assert charts.scores(SCORES, ARMS, **AXIS) == drawn["scores"]


def test_ids_of_different_charts_differ_and_every_reference_is_met(drawn):
    ids = {name: re.findall(r' id="([^"]*)"', picture) for name, picture in drawn.items()}
    assert len({i for found in ids.values() for i in found}) == sum(map(len, ids.values()))
    for name, picture in drawn.items():
        assert set(re.findall(r"(?:url\(|href=\")#(\w+)", picture)) == set(ids[name]), name


def test_with_many_clients_only_the_lowest_and_the_highest_are_named():
    many = {f"client-{i:02d}": {0: 2.5, 1: 2.4 - i / 100} for i in range(20)}
    said = texts(charts.held_out_loss(many, {0: 2.5, 1: 2.3}))
    assert {"lowest: client-19", "highest: client-00", "the other 18 clients"} <= set(said)
    assert not any("client-07" in text for text in said)
    assert "all, weighted by tokens" in said


def test_rare_labels_are_grouped(drawn):
    assert "other (5 labels)" in texts(drawn["labels"])
    few = texts(charts.labels_per_client(split_of(["a", "b"], num_labels=10)))
    assert not any("other" in text for text in few)


def test_differences_are_drawn_with_a_zero_line_and_only_for_compared_arms(drawn):
    said = texts(drawn["differences"])
    assert "centralized" in said
    assert "local" not in said
    one = {"a": {"federated": {"mean": -0.1, "low": -0.2, "high": 0.1}}}
    with_zero = charts.differences(one, ARMS, **AXIS)
    without = charts.scores(one, ARMS, **AXIS)
    assert with_zero.count("<path") == without.count("<path") + 1


def test_an_arm_looks_the_same_in_both_charts_of_a_metric(drawn):
    for key in ("scores", "differences"):
        assert charts.PALETTE[4].lower() in drawn[key], "centralized is the fifth arm"
    assert charts.PALETTE[1].lower() not in drawn["differences"], "local is not drawn"


def test_an_interval_without_bounds_is_a_dot():
    dot = charts.scores({"a": {"local": {"mean": 2.0}}}, ["local"], **AXIS)
    line = charts.scores({"a": {"local": {"mean": 2.0, "low": 1, "high": 3}}}, ["local"], **AXIS)
    assert "local" in texts(dot)
    assert dot.count("<path") < line.count("<path")


def test_a_chart_without_data_is_an_empty_string():
    unlabelled = split_of(["a"])
    unlabelled["a"]["tokens"] = {}
    assert charts.held_out_loss({}, {}) == ""
    assert charts.training_loss({"a": {}}) == ""
    assert charts.bytes_per_round({1: 0}, {1: 0}) == ""
    assert charts.seconds_per_client({}, {}) == ""
    assert charts.rows_per_client({}) == ""
    assert charts.labels_per_client(unlabelled) == ""
    assert charts.tokens_per_client(unlabelled) == ""
    assert charts.scores({"a": {}}, ARMS, **AXIS) == ""
    assert charts.differences({}, ARMS, **AXIS) == ""


def test_biggest_keeps_the_clients_with_most_rows_in_their_own_order():
    sizes = {"a": {"num_train": 1}, "b": {"num_train": 9}, "c": {"num_train": 5}}
    assert charts.biggest(sizes, 2) == ["b", "c"]
    assert charts.biggest(sizes) == ["a", "b", "c"]


@pytest.mark.parametrize("letter", ["n", "W", "m", "東", "Щ", "😀"])
def test_a_long_name_is_shortened_to_a_line(letter):
    cut = svg.short(letter * 200)
    assert cut.endswith("…")
    assert 25 <= len(cut) <= 53
    assert svg.short(letter * 5) == letter * 5


def test_a_name_with_controls_stays_one_line_in_its_own_direction():
    assert svg.short("a\nb\u202ec\x00d") == "a bcd"
