"""Models by their name on the hub, against a stand-in for its interface."""

import dataclasses

import hub_stand_in
import huggingface_hub.constants
import pytest
from hub_stand_in import SHA, TOKEN
from huggingface_hub import HfApi

from cwm_jax import WorldModel
from cwm_jax.checkpoints import formats, hub_models, pretrained, weights
from cwm_jax.errors import UserError
from cwm_jax.runtime import hub_client


@pytest.fixture(scope="module")
def model(tiny, tiny_params, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / weights.NAME
    config = {"model": dataclasses.asdict(tiny), "sampler": {"ddim_steps": 1}}
    weights.write(path, tiny_params, {"step": 7, "config": config})
    return path.read_bytes()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub whose cache is empty."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "hf"))
    with hub_stand_in.running() as state:
        monkeypatch.setattr(hub_client, "HfApi", lambda: HfApi(endpoint=state.url))
        yield state


@pytest.fixture
def published(hub, model):
    hub.files = {
        "README.md": b"a card",
        "model.safetensors": model,
        "small/other.safetensors": model,
    }
    return hub


def test_a_name_says_repository_revision_and_folder():
    assert hub_models.parse("hf://a/b") == ("a/b", None, "")
    assert hub_models.parse("hf://a/b@v1.0") == ("a/b", "v1.0", "")
    assert hub_models.parse("hf://a/b@refs%2Fpr%2F1/small/x") == ("a/b", "refs/pr/1", "small/x")
    for name in ("hf://a/b", "hf://a/b@refs%2Fpr%2F1/small/x"):
        assert str(hub_models.parse(name)) == name
    for wrong in ("hf://a", "hf://", "hf://a/b/../../c", "hf://a b/c", "hf:///b"):
        with pytest.raises(UserError, match=r"wanted hf://USER/REPOSITORY\[@REVISION\]"):
            hub_models.parse(wrong)


def test_it_is_opened_by_name_and_kept(published, tiny):
    trained = formats.load("hf://them/things")
    assert (trained.step, trained.network.hidden_size) == (7, tiny.hidden_size)
    assert published.sent == ["model.safetensors"]
    path = pretrained.unless("hf://them/things")
    assert published.sent == ["model.safetensors"]
    assert pretrained.shown(path) == f"hf://them/things@{SHA}"
    assert formats.load("hf://them/things/small").step == 7
    assert formats.load("hf://them/things/small/other.safetensors").step == 7
    assert formats.load(f"hf://them/things@{SHA}").step == 7


def test_in_python_the_scheme_may_be_left_out(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert WorldModel.from_pretrained("them/things").trained.step == 7
    assert WorldModel.from_pretrained("them/things@main").trained.step == 7
    with pytest.raises(UserError, match="no file or folder them/nothing here, and the hub"):
        WorldModel.from_pretrained("them/nothing")
    with pytest.raises(UserError, match="no checkpoint at runs/a/b"):
        WorldModel.from_pretrained("runs/a/b")


def test_a_download_that_broke_off_goes_on_where_it_stopped(published, model, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 500)
    monkeypatch.setattr("time.sleep", lambda _: None)
    published.cut_off_after = 1000
    with pytest.raises(UserError, match="the hub answered 500"):
        hub_models.fetched(hub_models.parse("hf://them/things"))
    assert published.asked_from == [0, 1000]
    published.cut_off_after = 0
    published.asked_from.clear()
    path = hub_models.fetched(hub_models.parse("hf://them/things"))
    assert published.asked_from == [1000]
    assert path.read_bytes() == model


def test_a_file_that_is_not_the_hubs_is_fetched_again_or_refused(published, model):
    name = hub_models.parse("hf://them/things")
    published.damaged["model.safetensors"] = 1
    path = hub_models.fetched(name)
    assert published.sent == ["model.safetensors"] * 2
    path.write_bytes(model[:-1] + b"?")  # a disk that fails, a hand that edits
    assert hub_models.fetched(name).read_bytes() == model
    published.damaged["small/other.safetensors"] = 9
    with pytest.raises(UserError, match=r"small/other.safetensors of them/things arrives damaged"):
        hub_models.fetched(hub_models.parse("hf://them/things/small"))


def test_without_the_hub_what_was_fetched_by_that_name_is_used(published, monkeypatch, capsys):
    name = hub_models.parse("hf://them/things")
    path = hub_models.fetched(name)
    monkeypatch.setattr(hub_client, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9"))
    assert hub_models.fetched(name) == path
    assert f"the hub cannot be reached: hf://them/things@{SHA} is used" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"cannot reach http://127\.0\.0\.1:9"):
        hub_models.fetched(hub_models.parse("hf://them/things@v2"))
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"is kept in .* damaged; cannot reach"):
        hub_models.fetched(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf://them/things@v9", "them/things has no revision v9: name a branch, a tag or a commit"),
        ("hf://them/nothing", "the hub knows no them/nothing"),
        ("hf://them/things/large", "add one of model.safetensors, small/other.safetensors"),
    ],
)
def test_what_is_not_there_is_named(published, name, message):
    with pytest.raises(UserError, match=message):
        formats.load(name)


def test_a_repository_without_safetensors_is_refused(hub):
    hub.files = {"checkpoints/7/params": b"orbax", "model.stablehlo": b"a program"}
    with pytest.raises(UserError, match=r"has no safetensors file.*wanted model\.safetensors"):
        formats.load("hf://them/things")
    assert not hub.sent
