"""Every notebook runs from top to bottom on a run of random parameters."""

import json
import os
import shutil
from pathlib import Path

import jupytext
import nbclient
import numpy as np
import pytest

from mmgpt.data.media import encode_png

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, model_run: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other = tmp_path / "other"
    shutil.copytree(model_run, other)
    body = json.loads((other / "config.json").read_text())
    body["optimizer"]["learning_rate"] = 0.125
    (other / "config.json").write_text(json.dumps(body))
    monkeypatch.setenv("MMGPT_RUN", str(model_run))
    monkeypatch.setenv("MMGPT_RUNS", f"{model_run}:{other}")
    monkeypatch.setenv("MMGPT_VISION", str(model_run.parent / "vision"))
    monkeypatch.setenv("MMGPT_PICTURES", str(_pictures(tmp_path / "pictures")))
    monkeypatch.setenv("MMGPT_OUT", str(tmp_path / "generated"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]))
    notebook = jupytext.read(path)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any({"image/svg+xml", "image/png"} & set(output.get("data", {})) for output in outputs)


def _pictures(folder: Path) -> Path:
    """A few pictures of colours that differ."""
    folder.mkdir()
    for i in range(6):
        picture = np.full((16, 16, 3), (40 * i, 255 - 40 * i, 128), np.uint8)
        picture[4:12, 2 * i : 2 * i + 4] = 255 - picture[0, 0]
        (folder / f"{i}.png").write_bytes(encode_png(picture))
    return folder
