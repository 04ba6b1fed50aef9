"""The hub's tools against a stand-in for its HTTP interface, on this machine alone."""

import hashlib
import json
from types import SimpleNamespace

import hub_stand_in
import pytest
from hub_stand_in import TOKEN
from huggingface_hub import HfApi

from cwm_jax.checkpoints import bundle
from cwm_jax.errors import UserError
from cwm_jax.tools import hub


@pytest.fixture
def stand_in(monkeypatch):
    """A hub on the loopback interface; nothing here talks to any other."""
    with hub_stand_in.running() as state:
        monkeypatch.setattr(hub, "HfApi", lambda: HfApi(endpoint=state.url))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield state


@pytest.fixture
def dataset(stand_in):
    for split in ("train", "val", "test"):
        for number in range(3):
            name = f"{split}/data_{number:04d}.array_record"
            stand_in.files[name] = f"{split} {number}".encode() * 99
    stand_in.files["metadata.json"] = b"{}"
    stand_in.files["README.md"] = b"hello"
    return stand_in


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def data_names(folder):
    return [name for name in names(folder) if not name.startswith(".cache")]


def download(folder, *more):
    hub.main(["download", "--repo", "them/things", "--to", str(folder), "--jobs", "2", *more])


def test_the_first_shards_come_and_then_the_rest(dataset, tmp_path, capsys):
    download(tmp_path, "--shards", "1")
    first = [f"{split}/data_0000.array_record" for split in ("test", "train", "val")]
    assert data_names(tmp_path) == sorted(["metadata.json", *first])
    assert "4 files of them/things" in capsys.readouterr().out
    dataset.sent.clear()
    (tmp_path / "val/data_0000.array_record").write_bytes(b"cut short")
    download(tmp_path)
    again = [name for name in dataset.files if name.endswith("_0000.array_record")]
    assert sorted(dataset.sent) == sorted(
        [n for n in dataset.files if n not in again and n.endswith("record")] + [again[1]]
    )
    for name, content in dataset.files.items():
        if name != "README.md":
            assert (tmp_path / name).read_bytes() == content


def test_what_is_not_of_the_repository_is_not_replaced(dataset, tmp_path, capsys):
    mine = tmp_path / "metadata.json"
    mine.write_text("of my own")
    with pytest.raises(SystemExit):
        download(tmp_path, "--shards", "1")
    assert f"{mine} exists already, and is not that of them/things" in capsys.readouterr().err
    assert mine.read_text() == "of my own"
    mine.unlink()
    download(tmp_path, "--shards", "1")
    with pytest.raises(UserError, match="contains files of them/things, not of others/things"):
        hub._check_source(tmp_path, "others/things", [])


def test_a_damaged_file_is_asked_for_again_and_then_refused(dataset, tmp_path, capsys):
    name = "train/data_0001.array_record"
    dataset.damaged[name] = 1
    download(tmp_path)
    assert dataset.sent.count(name) == 2
    assert (tmp_path / name).read_bytes() == dataset.files[name]
    dataset.damaged["metadata.json"] = 9
    (tmp_path / "metadata.json").unlink()
    with pytest.raises(SystemExit):
        download(tmp_path)
    assert "metadata.json of them/things is damaged after download" in capsys.readouterr().err
    assert not (tmp_path / "metadata.json").exists()


def test_faults_are_reported_without_the_token(dataset, tmp_path, monkeypatch, capsys):
    def fails(*argv):
        with pytest.raises(SystemExit) as ended:
            hub.main([*argv, "--to", str(tmp_path / "new")])
        assert ended.value.code == 2
        printed = capsys.readouterr()
        assert TOKEN not in printed.out + printed.err
        return printed.err

    assert "knows no them/nothing" in fails("download", "--repo", "them/nothing")
    assert "no name of a repository" in fails("download", "--repo", "a/b/c")
    assert "no folder 'x'; it has test, train, val" in fails(
        "fetch", "them/things", "--folder", "x"
    )
    assert "must be 1 or more" in fails("download", "--shards", "-1")
    usage = SimpleNamespace(free=2 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(hub.shutil, "disk_usage", lambda _: usage)
        assert "GB free" in fails("download", "--repo", "them/things")
    dataset.needs_token = True
    monkeypatch.setenv("HF_TOKEN", TOKEN + "Old")
    assert "log in" in fails("download", "--repo", "them/things")
    monkeypatch.setattr(hub, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9"))
    assert "cannot reach http://127.0.0.1:9" in fails("download", "--repo", "them/things")
    assert not (tmp_path / "new").exists() or data_names(tmp_path / "new") == []


def export(folder, rest):
    """A bundle's files as far as uploading looks at them."""
    folder.mkdir()
    names = [*(f"{name}.stablehlo" for name in bundle.PROGRAMS), bundle.PARAMS]
    for name in names:
        (folder / name).write_bytes(b"program")
    digest = hashlib.sha256(b"program").hexdigest()
    printed = {"format": 1, "step": 70, "platforms": ["cpu", "cuda"], "config": rest}
    printed |= {"network": {}, "drawing": {}, "files": dict.fromkeys(names, digest)}
    (folder / bundle.MANIFEST).write_text(json.dumps(printed))


def test_a_model_is_uploaded_with_a_card_and_downloaded(stand_in, tmp_path, capsys):
    export(tmp_path / "mine", {"lr": 0.25, "model": {"hidden_size": 48}})
    metrics = '{"step": 9, "val/loss": 0.5}\n{"step": 70, "val/loss": 0.125}\ncut'
    (tmp_path / "mine" / "metrics.jsonl").write_text(metrics)
    upload = ["upload", str(tmp_path / "mine"), "--repo", "them/things", "--folder", "pocket"]
    stand_in.needs_token = True
    hub.main(upload)
    assert stand_in.created == ["things"]
    assert stand_in.files["pocket/draw.stablehlo"] == b"program"
    card = stand_in.files["README.md"].decode()
    assert card == stand_in.files["pocket/README.md"].decode()
    for line in ("| hidden_size | 48 |", "| lr | 0.25 |", "| val/loss | 0.125 |", "for 70 steps"):
        assert line in card
    assert "fetch them/things --folder pocket --to models" in card

    stand_in.files["README.md"] = b"my own words"
    hub.main(upload)
    assert stand_in.files["README.md"] == b"my own words"
    capsys.readouterr()
    hub.main(["fetch", "them/things", "--folder", "pocket", "--to", str(tmp_path / "got")])
    assert (tmp_path / "got/pocket/draw.stablehlo").read_bytes() == b"program"
    printed = capsys.readouterr().out
    assert f"cwm sample --checkpoint {tmp_path / 'got/pocket'}" in printed
    assert TOKEN not in printed + card


def test_uploading_needs_a_token_that_may_write(stand_in, tmp_path, monkeypatch, capsys):
    export(tmp_path / "mine", {})
    upload = ["upload", str(tmp_path / "mine"), "--repo", "them/things"]
    stand_in.needs_token = True
    for token, fault in (("", "uploading needs a token"), ("hf_other", "log in")):
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(hub, "get_token", lambda token=token: token or None)
        with pytest.raises(SystemExit):
            hub.main(upload)
        assert fault in capsys.readouterr().err
    assert not stand_in.files


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("HTTPS_PROXY", "http://user:p#ss@127.0.0.1:9", "HTTPS_PROXY is not a proxy address"),
        ("ALL_PROXY", "socks4://127.0.0.1:9", "ALL_PROXY is not a proxy address"),
        ("SSL_CERT_FILE", "/nonexistent/ca.pem", "SSL_CERT_FILE names /nonexistent/ca.pem"),
        ("HF_TOKEN", "hf_abc…def", "the token"),
        ("HF_TOKEN", "hf_abc def", "the token"),
    ],
)
def test_unusable_settings_are_named_without_their_values(
    stand_in, tmp_path, monkeypatch, capsys, name, value, message
):
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        download(tmp_path)
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert not {"p#ss", "hf_abc"} & set(printed.replace("@", " ").replace(":", " ").split())
    assert not stand_in.sent


@pytest.mark.parametrize("endpoint", ["hub.example.org", "ftp://h", "http://user:secret@h:8"])
def test_an_endpoint_that_is_no_address_is_named(tmp_path, monkeypatch, capsys, endpoint):
    monkeypatch.setattr(hub, "HfApi", lambda: HfApi(endpoint=endpoint))
    with pytest.raises(SystemExit):
        download(tmp_path)
    printed = capsys.readouterr().err
    assert "HF_ENDPOINT is no address" in printed
    assert "secret" not in printed


def test_whatever_the_library_raises_is_a_line(stand_in, tmp_path, monkeypatch, capsys):
    def odd(*_, **__):
        raise UnicodeError("with a password")

    monkeypatch.setattr(HfApi, "repo_info", odd)
    with pytest.raises(SystemExit):
        download(tmp_path)
    printed = capsys.readouterr().err
    assert "could not be asked for them/things: UnicodeError" in printed
    assert "password" not in printed


def test_a_model_that_is_to_be_private_does_not_become_public(stand_in, tmp_path, capsys):
    export(tmp_path / "mine", {})
    upload = ["upload", str(tmp_path / "mine"), "--repo", "them/things", "--private"]
    with pytest.raises(SystemExit):
        hub.main(upload)
    assert "public, so nothing was uploaded" in capsys.readouterr().err
    assert not stand_in.files
    stand_in.private = True
    hub.main(upload)
    assert stand_in.files
