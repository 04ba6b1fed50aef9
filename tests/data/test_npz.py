"""Arrays are written under exactly the name that the user gave."""

import numpy as np
import pytest

from cwm_jax.data import npz


@pytest.mark.parametrize("name", ["raw", "k.NPZ", "k.npz", "y.mp4"])
def test_the_file_has_the_given_name_and_holds_the_arrays(name, tmp_path):
    npz.write(tmp_path / name, {"frames": np.arange(5), "seed": 7})
    assert [path.name for path in tmp_path.iterdir()] == [name]
    found = npz.read(tmp_path / name, ["frames", "seed"])
    assert found["frames"].tolist() == [0, 1, 2, 3, 4]
    assert found["seed"] == 7
