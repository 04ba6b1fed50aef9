"""The notebook runs from its first cell to its last, in a short form, in an empty folder."""

import dataclasses
import os
from pathlib import Path

import nbformat
import numpy as np
import pytest

from configs import debug
from cwm_jax.checkpoints import weights
from cwm_jax.models import dit
from cwm_jax.models.config import DiTConfig

nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[1]
_NETWORK = dict(hidden_size=16, depth=1, num_heads=1, patch_size=32, max_frames=4, history=1)
_REST = ["schedule.max_steps=2", "schedule.minutes=0.0", "data.clip_len=4"]
_REST += [f"{part}.every_steps=0" for part in ("validation", "evaluation", "rollouts")]
SETTINGS = [f"--config.model.{name}={size}" for name, size in _NETWORK.items()]
SETTINGS += [f"--config.{one}" for one in _REST]


@pytest.fixture
def short(tmp_path, make_data):
    """The notebook with a tiny model, trains one of its size, and has few of everything."""
    model = tmp_path / "tiny.safetensors"
    network = DiTConfig(**(debug.get_config().model.to_dict() | _NETWORK))
    rng, shapes = np.random.default_rng(0), dit.shapes(network)
    params = {name: 0.1 * rng.standard_normal(x.shape, np.float32) for name, x in shapes.items()}
    config = {"model": dataclasses.asdict(network), "sampler": {"ddim_steps": 1}}
    weights.write(model, params, {"step": 7, "config": config})
    notebook = nbformat.read(ROOT / "notebooks" / "coinrun.ipynb", as_version=4)
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    parameters.source += f"\nMODEL, MORE_SETTINGS = {str(model)!r}, {SETTINGS!r}"
    data = make_data(train=[[40]], val=[[40, 40]], test=[[40, 40]])
    parameters.source += f"\nDATA = {str(data)!r}"
    parameters.source += "\nFRAMES, CLIPS, HORIZON, DRIFT_FRAMES = 3, 2, 2, 32"
    return notebook


@pytest.mark.timeout(1200)
def test_it_runs_whole(short, tmp_path, monkeypatch):
    for name, value in {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "WANDB_MODE": "disabled",
        "MPLBACKEND": "agg",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setitem(os.environ, name, value)
    where = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(short, timeout=600, kernel_name="python3", resources=where)
    client.execute()
    shown = [o for c in short.cells for o in c.get("outputs", ())]
    videos = [o for o in shown if "<video" in str(o.get("data", {}).get("text/html", ""))]
    assert len(videos) == 2
    assert any("image/png" in o.get("data", {}) for o in shown)
    assert (tmp_path / "runs" / "notebook" / "metrics.json").is_file()


def test_it_is_kept_without_outputs():
    notebook = nbformat.read(ROOT / "notebooks" / "coinrun.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
