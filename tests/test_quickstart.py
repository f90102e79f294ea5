"""docs/quickstart.ipynb, executed as a person would, with a short run."""

import json
import shlex

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def test_the_notebook_is_short_and_saved_without_results():
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    assert len(cells) <= 10
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")


@pytest.mark.slow
def test_the_notebook_runs_and_shows_pictures(small_set, cache, tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="pip install -r v3/requirements.txt")
    from nbclient import NotebookClient

    out = tmp_path / "run"
    short = (f"--data {shlex.quote(str(small_set))} --cache-folder {cache} --steps 2 --batch-size 4 --eval-every 0 "
             "--final-samples 8 --sample-steps 2 --device cpu")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    changes = {'MORE = ""': f"MORE = {short!r}", "checkpoints/quickstart": str(out), '!"{sys.executable}" -m pip install': "#",
               "--guidance 3": "--steps 2", "pictures": str(tmp_path), "prompts.txt": str(tmp_path / "prompts.txt")}
    for cell in notebook.cells:
        for written, tried in changes.items():
            cell.source = cell.source.replace(written, tried)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    shown = []
    for cell in notebook.cells:
        pictures = [output for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
        shown.append(len(pictures))
    assert sum(shown) == 3 and (out / "student" / "unet").is_dir()
