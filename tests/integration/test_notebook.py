"""The notebook runs from top to bottom on a reduced setting: tiny model, few made-up rows."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import write_jsonl

NOTEBOOK = Path(__file__).parents[2] / "examples" / "workshop.ipynb"
CATEGORIES = [
    "Drug Gene Relations",
    "Pharmacology",
    "Drug Meta",
    "SNP Disease Relations",
    "SMR Gene Disease Relations",
]


def outputs_of(cell) -> str:
    return "".join(str(output) for output in cell.get("outputs", []))


# ipykernel and its own libraries warn about one another (ipykernel 7.4, jupyter_client 8.10)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_tells_its_story_on_a_reduced_setting(tiny_model, tmp_path):
    rows = [
        {"bio_category": category, "question": f"What is {i}?", "answer": f"It is {category} {i}."}
        for category in CATEGORIES
        for i in range(4)
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    reduced = [
        f"model.name={tiny_model}",
        f"data.path={data}",
        "data.split=train",
        "data.eval_split=none",
        "data.label=none",
        "train.accumulation=1",
        "rounds=2",
        "runtime.threads=1",
        "compare.seeds=1",
        "compare.max_new_tokens=3",
        "report.note=made-up rows",
    ]
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    parameters = notebook.cells[1]
    assert parameters.source.count("overrides = [") == 1
    parameters.source = f"overrides = {reduced!r}"
    NotebookClient(
        notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    shown = [outputs_of(cell) for cell in notebook.cells]
    assert sum("image/png" in text for text in shown) == 5
    assert any("made-up rows" in text for text in shown)
    assert any("times smaller" in text for text in shown)
    assert any("one seed: no verdict" in text for text in shown)
    assert (tmp_path / "runs" / "workshop-comparison" / "report.html").is_file()


def test_the_notebook_is_kept_without_outputs():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert all(not cell.get("outputs") for cell in cells)
