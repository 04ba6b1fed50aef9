"""LPIPS against its authors' package, and its weights from good and bad archives."""

import hashlib
import io
import json
import pickle
import tarfile

import jax
import numpy as np
import pytest
from lpips_case import REFERENCE, pictures, weights

from cwm_jax.errors import UserError
from cwm_jax.evaluation import lpips, lpips_weights


@pytest.fixture(scope="module")
def net() -> lpips.Lpips:
    return lpips.from_arrays(weights(), "random")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cwm_jax"


# The network


def test_distances_are_those_of_the_authors_package(net):
    (wanted,) = json.loads(REFERENCE.read_text()).values()
    np.testing.assert_allclose(lpips.distances(net, *pictures()), wanted, rtol=0, atol=1e-6)


def test_identical_pictures_have_no_distance_at_all(net):
    a, b = pictures()
    found = lpips.distances(net, a, np.where(np.arange(12).reshape(-1, 1, 1, 1) % 2, a, b))
    assert (found[1::2] == 0).all()
    assert (found[::2] > 0).all()


def test_uint8_pictures_of_any_number_are_measured_each_by_itself(net):
    rng = np.random.default_rng(0)
    a, b = rng.integers(256, size=(2, 5, 15, 64, 64, 3)).astype(np.uint8)  # 75: two calls
    found = lpips.distances(net, a, b)
    assert found.shape == (5, 15)
    some = lpips.distances(net, a[4, 12:], b[4, 12:])
    np.testing.assert_allclose(found[4, 12:], some, rtol=1e-5)
    as_floats = lpips.distances(net, a[0, :1] / np.float32(127.5) - 1, b[0, :1] / 127.5 - 1)
    np.testing.assert_allclose(found[0, :1], as_floats, rtol=1e-5)
    assert lpips.distances(net, a[:0], b[:0]).shape == (0, 15)


def test_pictures_that_cannot_be_measured_are_refused(net):
    a, b = pictures()
    with pytest.raises(UserError, match=r"30×64 pixels.*31×31"):
        lpips.distances(net, a[:, :30], b[:, :30])
    assert np.isfinite(lpips.distances(net, a[:1, :31, :31], b[:1, :31, :31])).all()
    with pytest.raises(UserError, match="one size"):
        lpips.distances(net, a, b[:, :40])
    b[3, 5, 6, 1] = np.nan
    with pytest.raises(UserError, match=r"\(3,\) is not finite"):
        lpips.distances(net, a, b)


def test_nan_is_never_a_distance_of_zero(net):
    a, b = pictures()
    a[:, 0, 0] = b[:, 0, 0] = np.nan
    assert np.isnan(jax.device_get(lpips._distance(net.params, a, b))).all()


# The weights


def published(change=lambda tree: tree):
    """The pickle of an archive that holds the random weights under the published names."""
    named = weights()
    tree = {"AlexNet_0": {}}
    for i in range(5):
        layer = {kind: named[f"convs.{i}.{kind}"] for kind in ("kernel", "bias")}
        tree["AlexNet_0"][f"Conv_{i}"] = layer
        head = {"kernel": named[f"heads.{i}"].reshape(1, 1, -1, 1)}
        tree[f"NetLinLayer_{i}"] = {"Conv_0": head}
    return pickle.dumps(change(tree), protocol=4)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """archive(content): a file like the published one, whose checksum is taken for the true one."""

    def make(content: bytes, name: str = lpips_weights._MEMBER):
        monkeypatch.setattr(lpips_weights, "_SIZE", len(content))
        monkeypatch.setattr(lpips_weights, "_SHA256", hashlib.sha256(content).hexdigest())
        path = tmp_path / lpips_weights.ARCHIVE
        with tarfile.open(path, "w:gz", compresslevel=1) as tar:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        return path

    return make


def test_weights_of_an_archive_are_converted_once_and_found_in_the_cache(
    archive, cache, net, capsys
):
    assert lpips_weights.available() is None
    said = capsys.readouterr().err
    assert lpips_weights.FETCH in said
    assert said.count("\n") == 1
    lpips_weights.convert(archive(published()), lpips_weights.path())
    assert [path.parent for path in cache.iterdir()] == [cache]
    found = lpips_weights.available()
    assert found.source == lpips_weights._SHA256
    np.testing.assert_array_equal(*(lpips.distances(n, *pictures()) for n in (found, net)))


def refused(path, match):
    with pytest.raises(UserError, match=match) as raised:
        lpips_weights.convert(path, lpips_weights.path())
    assert "\n" not in str(raised.value)
    assert not lpips_weights.path().exists()


def test_damaged_and_foreign_archives_are_refused(archive, cache, monkeypatch):
    path = archive(published())
    whole = path.read_bytes()
    for content in (b"", b"no archive", whole[:5000], whole[:-5000]):
        path.write_bytes(content)
        refused(path, "no readable archive")
    refused(path.with_name("none.tar.gz"), "cannot read")
    refused(path.parent, "cannot read")
    refused(archive(published(), "other/alexnet.ckpt"), "holds no")
    path = archive(published())
    monkeypatch.setattr(lpips_weights, "_SHA256", "0" * 64)
    refused(path, r"SHA-256 [0-9a-f]{64}.*0{64}")
    monkeypatch.setattr(lpips_weights, "_SIZE", 100)
    refused(path, "the published one has 100")


class Calls:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tree: tree | {"extra": Calls()}, "refused and not run.*print"),
        (lambda tree: {"AlexNet_0": 1}, "refused.*other names"),
        (lambda tree: [], "refused.*other names"),
        (
            lambda tree: tree | {"NetLinLayer_2": {"Conv_0": {"kernel": np.ones(3, "f4")}}},
            r"heads\.2 is float32 \(3,\), not float32 \(384,\)",
        ),
        (
            lambda tree: (
                tree
                | {"NetLinLayer_0": {"Conv_0": {"kernel": np.full((1, 1, 64, 1), np.nan, "f4")}}}
            ),
            r"heads\.0 is not finite",
        ),
    ],
    ids=["calls", "names", "list", "shape", "nan"],
)
def test_a_pickle_of_anything_else_is_refused_and_not_run(archive, cache, change, match, capsys):
    refused(archive(published(change)), match)
    assert "run" not in capsys.readouterr().out


def test_a_cache_that_cannot_be_read_ends_nothing(monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", "/" + 300 * "x")
    assert lpips_weights.available() is None
    assert "left out" in capsys.readouterr().err


def test_damaged_weights_in_the_cache_are_said_in_one_line_and_left_out(archive, cache, capsys):
    lpips_weights.convert(archive(published()), lpips_weights.path())
    whole = lpips_weights.path().read_bytes()
    for content in (b"", b"no weights", whole[: len(whole) // 2]):
        lpips_weights.path().write_bytes(content)
        assert lpips_weights.available() is None
        said = capsys.readouterr().err
        assert "damaged" in said
        assert said.count("\n") == 1


def test_without_a_home_folder_lpips_is_left_out(monkeypatch, capsys):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", nobody)
    assert lpips_weights.available() is None
    assert "LPIPS is left out: there is no home folder" in capsys.readouterr().err
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        lpips_weights.path()
