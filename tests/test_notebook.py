"""The notebook runs from its first cell to its last, on shapes at toy size."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "docs" / "show_attend_and_tell.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(
        cell.outputs or cell.execution_count for cell in cells
    )  # committed without outputs
    monkeypatch.setenv("NOTEBOOK_SIZE", "toy")
    monkeypatch.setenv("NOTEBOOK_FOLDER", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    NotebookClient(
        notebook, timeout=400, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()

    shown = [str(output) for cell in cells for output in cell.outputs]
    assert not any(
        "error:" in text or "Traceback" in text for text in shown
    )  # a script that fails stops no cell
    assert (
        sum("image/png" in text for text in shown) == 7
    )  # contact sheet, curves, three captioned pictures, one from Python, comparison
    # what a cell prints may come in several pieces
    printed = ["".join(o.get("text", "") for o in cell.outputs) for cell in cells]
    table = next(text for text in printed if "variant" in text and "relation" in text)
    assert all(
        table.count(variant) == 2 for variant in ("lstm", "gru", "resnet18", "scheduled")
    )  # beams 1 and 5
    assert {path.name for path in tmp_path.iterdir()} >= {
        "data",
        "lstm",
        "gru",
        "resnet18",
        "scheduled",
        "captions",
    }
