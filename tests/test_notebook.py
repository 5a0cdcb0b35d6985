"""The notebooks: each one's two files say the same, and they run from top to bottom on the shipped organism."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jupytext
import nbclient
import pytest

from probes.criteria import open_verdict
from training.grammar import ABILITIES

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ("main_job", "states", "training")
PLOTLY = "application/vnd.plotly.v1+json"


def cells(path: Path) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]


def path_of(name: str, suffix: str) -> Path:
    return ROOT / "notebooks" / f"{name}.{suffix}"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_script_and_notebook_are_in_step(name):
    assert cells(path_of(name, "ipynb")) == cells(path_of(name, "py")), f"run: jupytext --sync notebooks/{name}.py"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_committed_without_outputs(name):
    found = jupytext.read(path_of(name, "ipynb")).cells
    assert [cell for cell in found if cell.get("outputs") or cell.get("execution_count")] == []


def test_every_notebook_is_tested():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(NOTEBOOKS)


def execute(name: str, folder: Path) -> Any:
    """A notebook after a run in an empty folder; a cell that raises fails the test with its traceback."""
    notebook = jupytext.read(path_of(name, "py"))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    client.execute(env=env)
    return notebook


def titles(notebook: Any) -> list[str]:
    """Titles of the plotly figures, in order."""
    return [
        output.data[PLOTLY]["layout"]["title"]["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if PLOTLY in output.get("data", {})
    ]


def printed(notebook: Any) -> str:
    return "".join(
        output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "stream"
    )


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("notebook")
    return execute("main_job", folder), folder


def test_notebook_draws_its_figures(executed):
    notebook, _ = executed
    asked = [cell.source for cell in notebook.cells if cell.cell_type == "code" and "figures." in cell.source]
    assert len(asked) == 5
    assert titles(notebook) == [
        "Dose and response",
        "Effect at each layer",
        "Against directions that mean nothing",
        "Prompt by prompt",
        "Steering beside just asking",
    ]


def test_notebook_says_what_happened_and_leaves_a_report(executed):
    notebook, folder = executed
    verdict = open_verdict(folder / "runs" / "notebook")
    assert verdict.verdict == "PASS"
    assert str(verdict) in printed(notebook)
    assert verdict.verdict in (folder / "runs" / "notebook" / "report.html").read_text(encoding="utf-8")[:2000]
    assert all(cell.get("outputs") for cell in notebook.cells if cell.cell_type == "code")


def test_the_notebook_on_states_shows_what_carries_and_who_wrote_it(tmp_path):
    notebook = execute("states", tmp_path)
    assert titles(notebook) == [
        "What each channel carries",
        "Layer by layer",
        "How far the personas part the states",
        "What layer 4 says along the direction",
        "What one token looks back at",
    ]
    assert "the GDN states carry it" in printed(notebook)
    html = [
        o.data["text/html"]
        for cell in notebook.cells
        for o in cell.get("outputs", [])
        if "text/html" in o.get("data", {})
    ]
    assert any("Who wrote it: layer 4, head 1" in page for page in html)
    assert all(cell.get("outputs") for cell in notebook.cells if cell.cell_type == "code")


def test_the_notebook_on_training_verifies_trains_and_shows_what_moved(tmp_path):
    notebook = execute("training", tmp_path)
    said = printed(notebook)
    assert "no verdict for 'follow-direction'" in said
    assert "PASS follow-direction on organism" in said
    assert "wanted answers went from" in said
    assert last_of(tmp_path, "wanted") >= 0.9
    # before: 96.9 % of arithmetic, 100 % of the others (README); none may lose more than 3 points
    kept = {name: last_of(tmp_path, f"ability_{name}") for name in ABILITIES}
    assert kept.pop("arithmetic") >= 0.969 - 0.03
    assert min(kept.values()) >= 0.97, kept
    assert titles(notebook)[-2:] == ["What was kept", "How alike both gradients are"]
    assert all(cell.get("outputs") for cell in notebook.cells if cell.cell_type == "code")


def last_of(folder: Path, name: str) -> float:
    """The last value of a measure in a run's metrics."""
    rows = [json.loads(line) for line in (folder / "runs" / "notebook-training" / "metrics.jsonl").open()]
    return [row[name] for row in rows if name in row][-1]
