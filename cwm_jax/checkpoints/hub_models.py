"""Models on the Hugging Face Hub, by name: `hf://USER/REPOSITORY[@REVISION][/FOLDER]`.

Only a safetensors file is fetched, never anything that could run. It is kept under HF_HOME, beside
the hub's own cache; a download that broke off, in this process or in one before, goes on where it
stopped; the file's checksum must be the hub's each time that it is opened. Where the hub cannot be
reached, what was fetched under the same name is used.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

from cwm_jax import files, shipped
from cwm_jax.errors import UserError, echo
from cwm_jax.files import HUB, MODEL_FILE, SAFETENSORS, written_whole
from cwm_jax.runtime import network

_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@]+))?(?:/(?P<folder>.+?))?/?")
_SHA256_DIGITS = 64
_REFERENCES, _SOURCE = "references.json", "source.json"


class HubName(NamedTuple):
    """What a name on the hub says."""

    repo: str
    revision: str | None  # a branch, a tag or a commit; the newest by default
    folder: str  # of the repository; empty for its top

    def __str__(self) -> str:
        at = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return HUB + "/".join(filter(None, [f"{self.repo}{at}", self.folder]))


def parse(text: str) -> HubName:
    """Reads `hf://USER/REPOSITORY[@REVISION][/FOLDER]`; a / in a revision is written %2F.

    Raises:
        UserError: it is no such name.
    """
    found = _NAME.fullmatch(text.removeprefix(HUB))
    if not found or ".." in text.split("/"):
        raise UserError(
            f"{text} names no model of the hub: wanted {HUB}USER/REPOSITORY[@REVISION][/FOLDER]"
        )
    revision = unquote(found["revision"]) if found["revision"] else None
    return HubName(found["repo"], revision, found["folder"] or "")


def may_be_one(text: str) -> bool:
    """Whether a text without hf:// has the form USER/REPOSITORY[@REVISION]."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[^/@]+)?", text) is not None


def fetched(name: HubName) -> Path:
    """The model's safetensors file on this machine, whole.

    Raises:
        UserError: no such repository or revision, or no safetensors file in it; the hub cannot be
            reached and nothing is kept; or the file arrives damaged.
    """
    with network.hub_settings_read():
        from cwm_jax.runtime import hub_client

    api = hub_client.client()
    home = _home(name.repo)
    try:
        commit, listed = hub_client.listing(api, name.repo, "model", name.revision)
    except hub_client.UnreachableError as error:
        return _kept(home, name, error)
    file = _chosen(name, listed)
    content = file.lfs.sha256 if file.lfs else file.blob_id
    path = home / content / Path(file.path).name
    if not hub_client.is_whole(path, file):
        hub_client.download(api, name.repo, "model", commit, file, path)
    _write(path.with_name(_SOURCE), {"name": str(name._replace(revision=commit))})
    _write(home / _REFERENCES, _references(home) | {str(name): f"{content}/{path.name}"})
    return path


def here(named: Path | str) -> Path:
    """Where a model lies on this machine: fetched, if it is named by its place on the hub.

    A path stays one, whether there is anything or not.

    Raises:
        UserError: as `fetched`.
    """
    if str(named).startswith(HUB):
        return fetched(parse(str(named)))
    return shipped.found(named)


def shown(path: Path) -> str:
    """How a report names a model: that of the hub by its name there, with its commit."""
    source = (path if path.is_dir() else path.parent) / _SOURCE
    try:
        return json.loads(source.read_text(encoding="utf-8"))["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return str(path)


def _home(repo: str) -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "cwm_jax" / repo


def _chosen(name: HubName, listed: list):
    """The one safetensors file of a folder: `model.safetensors`, or the only one."""
    models = [file for file in listed if file.path.endswith(SAFETENSORS)]
    inside = [file for file in models if str(Path(file.path).parent) == (name.folder or ".")]
    found = (
        [file for file in models if file.path == name.folder]
        or [file for file in inside if Path(file.path).name == MODEL_FILE]
        or inside
    )
    if len(found) == 1:
        return found[0]
    elsewhere = ", ".join(sorted(file.path for file in models))
    if models:
        raise UserError(f"{name} names no one model: add one of {elsewhere} after the repository")
    raise UserError(
        f"{name} has no safetensors file, and nothing else is opened by name: wanted "
        f"{MODEL_FILE}, as `cwm export … --format safetensors` writes it (`cwm hub fetch "
        f"{name.repo}` gets the repository as it is)"
    )


def _kept(home: Path, name: HubName, reason: UserError) -> Path:
    """What was fetched under a name before; raises `reason` where there is nothing."""
    path = home / _references(home).get(str(name), "")
    if not path.is_file():
        raise reason
    checksum = path.parent.name  # SHA-256; git's own for files that are small
    if len(checksum) == _SHA256_DIGITS and files.sha256(path) != checksum:
        raise UserError(f"{name} is kept in {path}, and that file is damaged; {reason}")
    echo(f"the hub cannot be reached: {shown(path)} is used, which was fetched as {name}")
    return path


def _references(home: Path) -> dict[str, str]:
    """For each name that was fetched, the file that it was then."""
    try:
        return json.loads((home / _REFERENCES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write(path: Path, content: dict[str, str]) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
