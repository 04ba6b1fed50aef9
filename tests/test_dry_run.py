"""The dry run suggests the mildest change with which a step fits."""

import dataclasses

import pytest

from configs import small
from cwm_jax import dry_run
from cwm_jax.dry_run import Memory
from cwm_jax.settings import Settings

SETTINGS = dataclasses.replace(
    Settings.from_config(small.get_config().to_dict()), remat="none", batch_size=6
)


@pytest.fixture
def tried(monkeypatch) -> list[tuple[str, int]]:
    """Compiles nothing: a step takes so much for its `remat`, over its parts. Gathers the tries."""
    tries = []
    working = {"none": 80, "gelu_norm": 60, "layer": 12}

    def compile_step(settings: Settings) -> Memory:
        tries.append((settings.remat, settings.accumulate_steps))
        return Memory(1, working[settings.remat] // settings.accumulate_steps)

    monkeypatch.setattr(dry_run, "compile_step", compile_step)
    monkeypatch.setattr(dry_run, "memory_of", lambda compiled: compiled)
    return tries


@pytest.mark.parametrize(
    ("limit", "remat", "parts"),
    [(70, "gelu_norm", 1), (31, "gelu_norm", 2), (14, "layer", 1), (5, "layer", 3)],
)
def test_the_mildest_change_that_fits(tried, limit, remat, parts):
    found = dry_run.what_fits(SETTINGS, limit)
    assert (found.remat, found.accumulate_steps) == (remat, parts)
    assert dataclasses.replace(found, remat="none", accumulate_steps=1) == SETTINGS


def test_what_is_set_already_is_not_tried_again(tried):
    settings = dataclasses.replace(SETTINGS, remat="gelu_norm")
    assert dry_run.what_fits(settings, 1) is None
    assert tried == [("gelu_norm", 2), *(("layer", parts) for parts in (1, 2, 3, 6))]
