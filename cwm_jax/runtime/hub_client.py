"""The hub's client: what goes wrong with it in one sentence, files listed, and files checked."""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from cwm_jax.errors import UserError
from cwm_jax.runtime import network

with network.hub_settings_read():  # its variables are read when it is imported
    from huggingface_hub import HfApi, errors, get_session, get_token, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import WeakFileLock, build_hf_headers


class UnreachableError(UserError):
    """The hub gives no answer, or must not be asked."""


def client() -> HfApi:
    """The hub's client, where the settings that it reads can be used.

    Raises:
        UserError: naming the variable at fault.
    """
    api = HfApi()
    check_settings(api)
    return api


def listing(
    api: HfApi, repo: str, kind: str, revision: str | None = None
) -> tuple[str, list[RepoFile]]:
    """The commit of a repository's revision, the newest by default, and the files in it."""
    with user_errors(api, repo):
        revision = api.repo_info(repo, repo_type=kind, revision=revision).sha
        tree = api.list_repo_tree(repo, repo_type=kind, revision=revision, recursive=True)
        return revision, [entry for entry in tree if isinstance(entry, RepoFile)]


def is_whole(path: Path, file: RepoFile) -> bool:
    """Whether the file has the hub's size and checksum: SHA-256, or git's for small files."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if file.lfs is not None:
        with path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest() == file.lfs.sha256
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == file.blob_id


def download(api: HfApi, repo: str, kind: str, commit: str, file: RepoFile, path: Path) -> None:
    """Downloads one file to `path`, going on with what an earlier call left, and checks it.

    Raises:
        UserError: it cannot be had, or arrives damaged.
    """
    url = hf_hub_url(repo, file.path, repo_type=kind, revision=commit, endpoint=api.endpoint)
    part = path.with_name(f"{path.name}.part")
    with user_errors(api, repo):
        path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(path.with_name(f"{path.name}.lock")):
            for _ in range(2):  # a file that came damaged is asked for once more
                with part.open("ab") as content:
                    if content.tell() > file.size:
                        content.truncate(0)
                    headers = build_hf_headers(token=api.token)
                    http_get(
                        url,
                        content,
                        resume_size=content.tell(),
                        headers=headers,
                        expected_size=file.size,
                        displayed_filename=file.path,
                    )
                if is_whole(part, file):
                    os.replace(part, path)
                    return
                part.unlink()
    raise UserError(f"{file.path} of {repo} arrives damaged: its checksum is not the hub's")


@contextlib.contextmanager
def user_errors(api: HfApi, repo: str) -> Iterator[None]:
    """Turns what goes wrong with the hub into one clear sentence, which shows no secret."""
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError:
        raise UserError(f"{repo} is gated: ask for access on {api.endpoint}/{repo}") from None
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"{repo} has no revision {_asked_revision(error)}: name a branch, a tag or a commit "
            f"that {api.endpoint}/{repo} lists, or none for the newest"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"the hub knows no {repo}, or hides it from you: check the name, and log in if it is "
            "private (hf auth login, or HF_TOKEN)"
        ) from None
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        if code in (401, 403):
            raise UserError(
                f"the hub does not allow this on {repo} ({code}): log in with a token that may "
                "(hf auth login, or HF_TOKEN)"
            ) from None
        raise UserError(f"the hub answered {code} for {repo}; try again later") from None
    except errors.LocalEntryNotFoundError as error:  # no answer, and nothing kept from before
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            with user_errors(api, repo):
                raise error.__cause__ from None
        raise UnreachableError(_unreachable(api)) from None
    except errors.OfflineModeIsEnabled:
        raise UnreachableError("HF_HUB_OFFLINE keeps the hub from being asked: unset it") from None
    except (errors.HTTPError, errors.FileMetadataError):
        raise UnreachableError(_unreachable(api)) from None
    except errors.HFValidationError as error:
        raise UserError(f"{repo!r} is no name of a repository: {error}") from None
    except OSError as error:
        raise UserError(f"cannot store what comes from {repo}: {error.strerror or error}") from None
    except Exception as error:  # of the libraries below; its words may hold a password
        raise UserError(f"the hub could not be asked for {repo}: {type(error).__name__}") from None


def _unreachable(api: HfApi) -> str:
    through = [name for name in network.proxies() if name.lower() != "no_proxy"]
    asked = (
        f"does the proxy of {' and '.join(through)} work" if through else "is this machine online"
    )
    return f"cannot reach {api.endpoint}: {asked}? What is there already is kept."


def check_settings(api: HfApi) -> None:
    """Makes the hub's client once, so that settings at fault are named before anything is asked.

    Raises:
        UserError: naming the variable, and never its value: proxies and tokens are secrets.
    """
    try:
        token = get_token() or ""
    except OSError as error:
        raise UserError(f"cannot read the file of the hub's token: {error}") from None
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise UserError(
            "the token (HF_TOKEN, or that of hf auth login) has letters that no token has, such "
            "as … or a space: copy it whole, with the button on the hub's page"
        )
    endpoint = urlsplit(api.endpoint)
    if endpoint.scheme not in ("http", "https") or "@" in endpoint.netloc or not _port(endpoint):
        raise UserError(
            "HF_ENDPOINT is no address of a hub: wanted https://HOST or http://HOST:PORT"
        )
    wrong = network.faults()
    try:
        get_session()
    except Exception as error:  # of any library below; its words may hold a password
        names = ", ".join([*network.proxies(), "SSL_CERT_FILE, SSL_CERT_DIR"])
        wrong = wrong or [f"{type(error).__name__} from one of the settings {names}"]
    if wrong:
        raise UserError("the hub cannot be reached: " + "; ".join(wrong))


def _port(address: SplitResult) -> bool:
    """Whether host and port of an address can be used."""
    try:
        return bool(address.hostname) and address.port != 0
    except ValueError:
        return False


def _asked_revision(error: Exception) -> str:
    """The revision that a failed request was for; the last part of its address."""
    found = re.search(r"/(?:revision|resolve|tree)/([^/?]+)", str(error.response.url))
    return unquote(found[1]) if found else "of that name"
