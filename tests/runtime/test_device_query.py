"""The device is queried in another process."""

import pytest

from cwm_jax.errors import UserError
from cwm_jax.runtime import device_query


def test_a_device_is_found_by_another_process(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(device_query, "_PROBE", 'print("noise")\nprint(\'["gpu", "G", 7, "9.0"]\')')
    assert device_query.find() == ("gpu", "G", 7, "9.0")
    monkeypatch.setattr(device_query, "_PROBE", "raise RuntimeError('no driver')")
    with pytest.raises(UserError, match="no device: RuntimeError: no driver"):
        device_query.find()
