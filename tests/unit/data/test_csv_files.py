"""CSV as Excel, LibreOffice, R and databases write it: a right table, or one clear error."""

import csv
import io
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silotune.data.csv_files import read_csv
from silotune.data.files import read_rows
from tests.unit.data.row_files import SECRET, error_of

WANTED = [
    {"source": "north", "question": "Why, then?", "answer": "3,5 mg; twice"},
    {"source": "süd", "question": 'A "b"?', "answer": "two\nlines"},
]

EXCEL_GERMAN = (
    "\ufeffsource;question;answer\r\n"
    'north;Why, then?;"3,5 mg; twice"\r\n'
    'süd;"A ""b""?";"two\nlines"\r\n'
)
WRITTEN = {
    "Excel, comma": '\ufeffsource,question,answer\r\nnorth,"Why, then?","3,5 mg; twice"\r\n'
    'süd,"A ""b""?","two\nlines"\r\n',
    "Excel, semicolon": EXCEL_GERMAN,
    "Excel, sep=": "sep=;\r\n" + EXCEL_GERMAN.removeprefix("\ufeff"),
    "Excel, sep= behind the mark": "\ufeffsep=;\r\n" + EXCEL_GERMAN.removeprefix("\ufeff"),
    "Excel, formatted columns and rows": EXCEL_GERMAN.replace("answer\r", "answer;;\r")
    .replace('twice"\r', 'twice";;\r')
    .replace('lines"\r', 'lines";;\r')
    + ";;;;\r\n;;;;\r\n",
    "Excel, tab": "source\tquestion\tanswer\r\nnorth\tWhy, then?\t3,5 mg; twice\r\n"
    'süd\t"A ""b""?"\t"two\nlines"\r\n',
    "LibreOffice, all quoted": '"source";"question";"answer"\n"north";"Why, then?";"3,5 mg; twice"'
    '\n"süd";"A ""b""?";"two\nlines"\n',
    "R, write.csv2": '"source";"question";"answer"\n"north";"Why, then?";"3,5 mg; twice"\n'
    '"süd";"A ""b""?";"two\nlines"\n\n\n',
    "PostgreSQL, bars": "source|question|answer\nnorth|Why, then?|3,5 mg; twice\n"
    'süd|"A ""b""?"|"two\nlines"\n',
    "a blank line above": "\n" + EXCEL_GERMAN.removeprefix("\ufeff"),
}


@pytest.mark.parametrize("how", WRITTEN)
def test_a_spreadsheet_is_read_as_it_was_written(tmp_path, how):
    path = tmp_path / "rows.csv"
    path.write_bytes(WRITTEN[how].encode())
    assert read_rows(path) == WANTED


def test_row_names_of_r_are_a_column_without_a_name(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('"","question","answer"\n"1","a","b"\n"2","c","d"\n')
    assert read_rows(path)[0] == {"": "1", "question": "a", "answer": "b"}


def test_row_names_of_r_without_a_column_are_one_error(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text(f'"question"\t"answer"\n"1"\t"{SECRET}"\t"b"\n"2"\t"c"\t"d"\n')
    text = error_of(read_rows, path)
    assert text.splitlines()[0] == f"{path}:1: every row has one cell more than the header."
    assert "row.names = FALSE" in text


def test_what_r_and_excel_write_for_no_value_is_a_note(tmp_path):
    text = 'question,answer,label\na,NA,NA\nb,NA,x\nc,"a NA b",#N/A\n'
    notes = read_csv(text, tmp_path / "r.csv").notes
    assert len(notes) == 3
    assert "2 cells of column 'answer' read 'NA'" in notes[0]


def test_cells_of_any_length_are_read(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\na," + "b" * 300_000 + "\n")
    before = csv.field_size_limit()
    assert len(read_rows(path)[0]["answer"]) == 300_000
    assert csv.field_size_limit() == before, "a setting of the whole process"


def test_columns_with_values_but_without_names_are_one_mistake(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f"question,answer,,\na,b,{SECRET},{SECRET}\n")
    assert f"{path}:1: 2 columns have values, but no name: number 3, 4." in error_of(
        read_rows, path
    )


@pytest.mark.parametrize("sign", ["a", '"', "'", " "])
def test_an_odd_declared_separator_is_an_error(tmp_path, sign):
    path = tmp_path / "rows.csv"
    path.write_text(f"sep={sign}\nquestion,answer\na,b\n")
    assert "'sep=' is followed by a character that cannot separate columns." in error_of(
        read_rows, path
    )


def test_commas_win_where_everything_fits(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("question;x,answer;y\na;b,c;d\n")
    assert read_rows(path) == [{"question;x": "a;b", "answer;y": "c;d"}]


def test_decimal_commas_do_not_make_columns(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("dose, mg;answer, short\n1,5;b\n2,5;c\n")
    assert read_rows(path)[0] == {"dose, mg": "1,5", "answer, short": "b"}


def test_all_mistakes_of_a_messy_file_come_at_once(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f'question,answer\na,b,c\n"{SECRET}" x,b\ngood,row\nd,e,f,g\n')
    assert error_of(read_rows, path).splitlines()[:3] == [
        f"{path}:2: the row has 3 cells, the header has 2.",
        f"{path}:3: not valid CSV: a quote is misplaced or not closed.",
        f"{path}:5: the row has 4 cells, the header has 2.",
    ]


CELLS = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=8)


@given(
    st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=6),
    st.sampled_from(",;\t|"),
    st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_whatever_a_writer_of_csv_writes_is_read_back(rows, sign, quoting, end):
    """An oracle: Python's own writer, with each separator."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=sign, quoting=quoting, lineterminator=end)
    names = ("one", "two", "three")
    writer.writerows([names, *rows])
    found = read_csv(out.getvalue(), "x.csv")
    wanted = [dict(zip(names, r, strict=True)) for r in rows if any(c.strip() for c in r)]
    assert [row.columns for row in found.rows] == wanted
    assert not found.mistakes


def test_reading_a_wide_header_with_no_rows_costs_little():
    tracemalloc.start()
    read_csv(";" * 100_000, "x.csv")
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
