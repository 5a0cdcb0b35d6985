"""The notebook runs, shows its figures, and is the same in both of its forms."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("source", SOURCES, ids=[path.stem for path in SOURCES])
def test_both_forms_hold_the_same_cells(source):
    script, notebook = jupytext.read(source), jupytext.read(source.with_suffix(".ipynb"))
    assert [(c.cell_type, c.source) for c in script.cells] == [(c.cell_type, c.source) for c in notebook.cells]
    assert not any(cell.get("outputs") for cell in notebook.cells)


def test_the_main_job_runs_and_shows_its_figures(tmp_path):
    notebook = nbformat.read(FOLDER / "main_job.ipynb", as_version=4)
    (tmp_path / "work").mkdir()
    done = NotebookClient(
        notebook, timeout=420, kernel_name="python3", resources={"metadata": {"path": str(tmp_path / "work")}}
    ).execute()
    outputs = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    figures = [
        o["data"]["application/vnd.plotly.v1+json"]
        for o in outputs
        if "application/vnd.plotly.v1+json" in o.get("data", {})
    ]
    text = "".join(o.get("text", "") for o in outputs)
    assert len(figures) == 5
    assert all(any(len(trace.get("x", trace.get("y", []))) for trace in figure["data"]) for figure in figures)
    assert "follow-direction on organism at resid" in text
    assert (tmp_path / "runs" / "notebook" / "report.html").stat().st_size > 1_000_000
