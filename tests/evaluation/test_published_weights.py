"""Weights from good and bad archives to the user's cache."""

import hashlib
import io
import pickle
import tarfile

import i3d_case
import lpips_case
import numpy as np
import pytest

from cwm_jax.data import safe_pickle
from cwm_jax.errors import UserError
from cwm_jax.evaluation import i3d_weights, lpips, lpips_weights, published_weights
from cwm_jax.evaluation.published_weights import Published


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cwm_jax"


def published(change=lambda tree: tree):
    """The pickle of LPIPS's archive, with random weights."""
    named = lpips_case.weights()
    tree = {"AlexNet_0": {}}
    for i in range(5):
        layer = {kind: named[f"convs.{i}.{kind}"] for kind in ("kernel", "bias")}
        tree["AlexNet_0"][f"Conv_{i}"] = layer
        head = {"kernel": named[f"heads.{i}"].reshape(1, 1, -1, 1)}
        tree[f"NetLinLayer_{i}"] = {"Conv_0": head}
    return pickle.dumps(change(tree), protocol=4)


@pytest.fixture
def archive(tmp_path):
    """archive(content, of): a file like the published one, and what it would be published as."""

    def make(content: bytes, of: Published = lpips_weights.PUBLISHED, name: str = "", kind="gz"):
        path = tmp_path / of.archive
        quickly = {"compresslevel": 1} if kind else {}
        with tarfile.open(path, f"w:{kind}", **quickly) as tar:
            entry = tarfile.TarInfo(name or of.member)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        return path, of._replace(size=len(content), sha256=hashlib.sha256(content).hexdigest())

    return make


def test_weights_of_an_archive_are_converted_once_and_found_in_the_cache(archive, cache, capsys):
    path, of = archive(published())
    assert published_weights.available(of) is None
    printed = capsys.readouterr().err
    assert lpips_weights.FETCH in printed
    assert printed.count("\n") == 1
    published_weights.convert(of, path, published_weights.path(of))
    assert [path.parent for path in cache.iterdir()] == [cache]
    found = published_weights.available(of)
    wanted = lpips_case.weights()
    assert set(found) == set(wanted) == set(lpips.shapes())
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)


def test_the_archive_of_i3d_is_read_as_well(archive):
    content = pickle.dumps(i3d_case.published(), protocol=4)
    path, of = archive(content, i3d_weights.PUBLISHED, kind="")
    published_weights.convert(of, path, published_weights.path(of))
    found = published_weights.available(of)
    params = i3d_case.published()["params"]
    np.testing.assert_array_equal(
        found["mixed.0.units.2.conv.kernel"],
        params["Mixed_3b"]["Branch_1/Conv3d_0b_3x3"]["Conv_0"]["kernel"],
    )


def refused(path, of, match):
    with pytest.raises(UserError, match=match) as raised:
        published_weights.convert(of, path, published_weights.path(of))
    assert "\n" not in str(raised.value)
    assert not published_weights.path(of).exists()


def test_damaged_and_foreign_archives_are_refused(archive):
    path, of = archive(published())
    whole = path.read_bytes()
    for content in (b"", b"no archive", whole[:5000], whole[:-5000]):
        path.write_bytes(content)
        refused(path, of, "no readable archive")
    refused(path.with_name("none.tar.gz"), of, "cannot read")
    refused(path.parent, of, "cannot read")
    refused(*archive(published(), name="other/alexnet.ckpt"), "contains no")
    path, of = archive(published())
    refused(path, of._replace(sha256="0" * 64), r"SHA-256 [0-9a-f]{64}.*0{64}")
    refused(path, of._replace(size=100), "the published one has 100")
    refused(path, i3d_weights.PUBLISHED, "contains no .*i3d-kinetics")


class Calls:
    def __reduce__(self):
        return print, ("run",)


def broken_norm(tree):
    layers = tree["batch_stats"]
    return tree | {"batch_stats": layers | {"Mixed_5c": {"Branch_0/Conv3d_0a_1x1": 3}}}


def missing_layer(tree):
    return tree | {"params": {k: v for k, v in tree["params"].items() if k != "Mixed_4e"}}


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
def test_a_pickle_of_anything_else_is_refused_and_not_run(archive, change, match, capsys):
    refused(*archive(published(change)), match)
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize("change", [broken_norm, missing_layer, lambda tree: [1, 2]])
def test_other_values_than_the_weights_of_i3d_are_refused(change):
    with pytest.raises(safe_pickle.RefusedError, match="other names or values"):
        published_weights._renamed(i3d_weights.PUBLISHED, change(i3d_case.published()))


def test_a_cache_that_cannot_be_read_ends_nothing(monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", "/" + 300 * "x")
    assert lpips_weights.available() is None
    assert i3d_weights.available() is None
    assert capsys.readouterr().err.count("left out") == 2


def test_damaged_weights_in_the_cache_are_reported_in_one_line_and_left_out(archive, capsys):
    path, of = archive(published())
    file = published_weights.path(of)
    published_weights.convert(of, path, file)
    whole = file.read_bytes()
    for content in (b"", b"no weights", whole[: len(whole) // 2]):
        file.write_bytes(content)
        assert published_weights.available(of) is None
        printed = capsys.readouterr().err
        assert "damaged" in printed
        assert printed.count("\n") == 1


def test_without_a_home_folder_weights_are_left_out(monkeypatch, capsys):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", nobody)
    assert lpips_weights.available() is None
    assert "LPIPS is left out: there is no home folder" in capsys.readouterr().err
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        published_weights.path(lpips_weights.PUBLISHED)
