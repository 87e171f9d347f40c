"""Charts as files and tables for papers: what is written is what the page shows."""

import csv
import io
import os
import xml.etree.ElementTree as xml

import pandas as pd
import pytest

from silotune.core.errors import ConfigError
from silotune.results import charts
from silotune.results.paper import as_csv, as_latex, check_kinds, write_charts, write_tables
from silotune.results.svg import saving

LOSSES = {"north": {0: 3.0, 1: 2.5}, "south": {0: 3.1, 1: 2.75}}


def draw() -> str:
    return charts.held_out_loss(LOSSES, {0: 3.0, 1: 2.6})


def test_what_a_page_draws_is_kept_as_a_file_and_the_page_stays_the_same():
    plain = draw()
    with saving("svg") as saved:
        assert draw() == plain
        assert charts.bytes_per_round({}, {}) == "", "a chart with nothing to draw is no file"
    (one,) = saved
    root = xml.fromstring(one.data)
    assert root.tag.endswith("svg")
    assert "north" in "".join(root.itertext())
    assert b"currentColor" not in one.data, "it stands alone"
    with saving("svg") as again:
        draw()
    assert again == saved, "the same chart has the same bytes"
    with saving(None) as none:
        draw()
    assert none == []
    draw()
    assert len(saved) == 1, "nothing is kept outside"


def test_a_pdf_is_one_with_fonts_inside_and_says_which_letters_it_lacks():
    with saving("pdf") as saved:
        draw()
        charts.held_out_loss({"東京": {0: 3.0, 1: 2.0}}, {})
    assert [chart.data[:5] for chart in saved] == [b"%PDF-"] * 2
    assert all(b"/TrueType" in chart.data or b"/CIDFontType2" in chart.data for chart in saved)
    assert [chart.lacks_glyphs for chart in saved] == [False, True]


def test_files_of_one_format_replace_each_other_and_leave_others(tmp_path, capsys):
    for kind in ("svg", "pdf"):
        with saving(kind) as saved:
            draw()
            charts.held_out_loss({"東京": {0: 3.0, 1: 2.0}}, {})
        place = write_charts(tmp_path, saved)
    with saving("pdf") as saved:
        draw()
    assert write_charts(tmp_path, saved) == place == tmp_path / "charts"
    name = "held-out-loss-nats-per-token-per-round-and-client"
    assert sorted(os.listdir(place)) == [f"01-{name}.pdf", f"01-{name}.svg", f"02-{name}.svg"]
    assert "note: 1 chart with letters that the PDF's font lacks" in capsys.readouterr().err
    assert write_charts(tmp_path, []) is None


def test_a_csv_holds_unrounded_numbers_and_no_formula():
    """A client chooses its name, and a spreadsheet computes a cell that begins with '='."""
    names = ["=1+1", "+2", "-3", "@sum", "a,b", 'quo"te', "two\nlines", "東京", "plain"]
    table = pd.DataFrame({"client": names, "loss": [-1 / 3 + n for n in range(len(names))]})
    rows = list(csv.DictReader(io.StringIO(as_csv(table))))
    assert [float(row["loss"]) for row in rows] == list(table["loss"])
    assert [row["client"][0] for row in rows[:4]] == ["'"] * 4
    assert [row["client"] for row in rows[4:6]] == ["a,b", 'quo"te']
    assert "\n" not in rows[6]["client"]
    assert [row["client"] for row in rows[7:]] == ["東京", "plain"]


def test_a_latex_table_holds_the_text_with_its_signs_escaped():
    found = as_latex([("client", "95 %", "a_b"), ("R&D #1", "$2", "{x}\\"), ("~", "^", "-0.5")])
    head, *lines = found.splitlines()
    assert head == r"\begin{tabular}{lrr}"
    assert lines[1] == r"client & 95 \% & a\_b \\"
    assert lines[3] == r"R\&D \#1 & \$2 & \{x\}\textbackslash  \\"
    assert lines[4].startswith(r"\textasciitilde")
    assert lines[-1] == r"\end{tabular}"


def test_tables_are_written_by_name_and_empty_ones_left_out(tmp_path):
    texts = {"clients": [("client", "loss"), ("north", "2.5")], "labels": []}
    place = write_tables(tmp_path, "latex", numbers=dict, texts=lambda: texts)
    assert os.listdir(place) == ["clients.tex"]
    frames = {"rounds": pd.DataFrame({"round": [0], "loss": [2.5]})}
    write_tables(tmp_path, "csv", numbers=lambda: frames, texts=dict)
    assert sorted(os.listdir(place)) == ["clients.tex", "rounds.csv"]
    assert (place / "rounds.csv").read_text() == "round,loss\n0,2.5\n"
    assert write_tables(tmp_path, None, numbers=dict, texts=dict) is None


def test_an_unknown_kind_is_one_error_with_the_known_ones():
    with pytest.raises(
        ConfigError, match=r"charts = 'png' is unknown\.\n  Choose one of: svg, pdf"
    ):
        check_kinds("png", None)
    with pytest.raises(ConfigError, match="Choose one of: csv, latex"):
        check_kinds(None, "tex")
    check_kinds("svg", "latex")
