"""The notebook: its two files say the same, and it runs from top to bottom on the shipped organism."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jupytext
import nbclient
import pytest

from probes.criteria import open_verdict

ROOT = Path(__file__).parents[1]
SCRIPT, NOTEBOOK = ROOT / "notebooks" / "main_job.py", ROOT / "notebooks" / "main_job.ipynb"
PLOTLY = "application/vnd.plotly.v1+json"


def cells(path: Path) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]


def test_script_and_notebook_are_in_step():
    assert cells(NOTEBOOK) == cells(SCRIPT), "run: jupytext --sync notebooks/main_job.py"


def test_notebook_is_committed_without_outputs():
    assert [cell for cell in jupytext.read(NOTEBOOK).cells if cell.get("outputs") or cell.get("execution_count")] == []


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The notebook after a run in an empty folder; a cell that raises fails the test with its traceback."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = jupytext.read(SCRIPT)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    client.execute(env=env)
    return notebook, folder


def test_notebook_draws_its_figures(executed):
    notebook, _ = executed
    asked = [cell.source for cell in notebook.cells if cell.cell_type == "code" and "figures." in cell.source]
    assert len(asked) == 5
    drawn = [
        output.data[PLOTLY]["layout"]["title"]["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if PLOTLY in output.get("data", {})
    ]
    assert drawn == [
        "Dose and response",
        "Effect at each layer",
        "Against directions that mean nothing",
        "Prompt by prompt",
        "Steering beside just asking",
    ]


def test_notebook_says_what_happened_and_leaves_a_report(executed):
    notebook, folder = executed
    printed = "".join(
        output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "stream"
    )
    verdict = open_verdict(folder / "runs" / "notebook")
    assert str(verdict) in printed
    assert verdict.verdict in (folder / "runs" / "notebook" / "report.html").read_text(encoding="utf-8")[:2000]
    assert all(cell.get("outputs") for cell in notebook.cells if cell.cell_type == "code")
