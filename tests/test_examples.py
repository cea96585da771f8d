"""The examples and the notebook run as a reader would run them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from shardtrain.viz import loss_figure

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run_example(name, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error::UserWarning"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart(tmp_path):
    out = run_example("quickstart.py", tmp_path)
    assert "hidden/kernel" in out
    before, after = map(float, re.findall(r"^loss (\S+) -> (\S+)$", out, re.MULTILINE)[0])
    assert before > 1.3
    assert after < 0.7 * before


def test_quickstart_is_short():
    code = (ROOT / "examples" / "quickstart.py").read_text().split("import shardtrain as st\n")[1]
    lines = [line for line in code.splitlines() if line.strip() and line.strip() != ")"]
    assert len(lines) <= 24


def test_lora_adapts_to_negatives(tmp_path):
    out = run_example("lora.py", tmp_path)
    before, after = map(float, re.findall(r"negatives, (?:before|after): accuracy (\S+)", out))
    assert before < 0.1
    assert after > 0.7
    assert "3.2% of the model's" in out


def test_digits_cnn_reads_handwriting(tmp_path):
    out = run_example("digits_cnn.py", tmp_path)
    (accuracy,) = re.findall(r"test accuracy (\S+)% on 400 digits", out)
    assert float(accuracy) > 97


def test_a_checkpoint_of_hugging_face_is_tuned_and_written_back(tmp_path):
    out = run_example("finetune_hf.py", tmp_path)
    before, after = map(float, re.findall(r"^loss (\S+) -> (\S+)$", out, re.MULTILINE)[0])
    assert before > 4
    assert after < 1
    assert len(list((tmp_path / "tuned").glob("model-*.safetensors"))) == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    errors = [
        o for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "error"
    ]
    assert errors == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_keeps_its_outputs_and_no_machine_paths(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in o.get("data", {}) for cell in code for o in cell.outputs)
    text = json.dumps([list(cell.outputs) for cell in code])
    assert not re.search(r"/(home|root|work|tmp|Users|usr|opt)/", text)


def test_there_is_a_notebook():
    assert {"explore.ipynb", "quickstart.ipynb", "recovery.ipynb"} <= {p.name for p in NOTEBOOKS}


def test_pictures_of_a_history_need_no_file():
    assert len(loss_figure([{"step": 1, "loss": 2.0}]).axes[0].lines) == 2
