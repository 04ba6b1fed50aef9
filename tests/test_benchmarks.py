"""Benchmarks run on small sizes, count right, and know the configs' sizes."""

import dataclasses
import importlib
import json
import sys

import pytest
from conftest import TINY

from benchmarks import sample, sizes


@pytest.mark.parametrize("name", ["debug", "small", "large"])
def test_sizes_are_those_of_the_configs(name):
    config = importlib.import_module(f"configs.{name}").get_config().model
    known = dataclasses.asdict(sizes.network(name))
    assert {k: config[k] for k in known} == known


def test_operations_of_a_pass():
    """By hand, for one block: 24 D² per token and half, attention over space and time, patches."""
    config = sizes.network("small")
    tokens, size = 64, 512
    linears = tokens * 6 * 2 * 24 * size**2
    patches = tokens * 2 * 2 * size * 192
    attention = tokens * 6 * 4 * size * (64 + 32)
    assert sample.frame_flops(config, 32) == linears + patches + attention
    plain = sample.drawn_frame_flops(config, 10, "plain", 32)
    cached = sample.drawn_frame_flops(config, 10, "cached", 32)
    assert 28 < plain / cached < 30  # 320 passes against 11, less what attention costs each


def test_the_sampling_benchmark_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sizes, "network", lambda size, dtype: TINY)
    out = tmp_path / "sample.json"
    words = f"--size tiny --batch 2 --steps 2 --context 1,5 --dtype float32 --json {out}"
    monkeypatch.setattr(sys, "argv", ["sample", *words.split()])
    sample.main()
    rows = json.loads(out.read_text())["rows"]
    assert [(r["window"], r["context"]) for r in rows] == [
        (window, context) for context in (1, 5) for window in ("plain", "exact", "cached", "hop")
    ]
    assert all(r["ms/frame"] > 0 and r["frames/s"] > 0 for r in rows)
    assert "filled compilation cache" in capsys.readouterr().out
