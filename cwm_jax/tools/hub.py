"""Downloads the dataset and models from the Hugging Face Hub, and uploads trained models.

    python -m cwm_jax.tools.hub download --to data/coinrun --shards 1
    python -m cwm_jax.tools.hub upload runs/small --repo you/coinrun-world-model --folder small
    python -m cwm_jax.tools.hub fetch you/coinrun-world-model --folder small --to models

Every file is checked against the hub's checksum. After an interruption, the same command downloads
the missing files. The token is that of `hf auth login` or of the variable HF_TOKEN; it is never
shown.
"""

import argparse
import collections
import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from cwm_jax.checkpoints import bundle, migration, run_checkpoint, weights
from cwm_jax.data import shards
from cwm_jax.errors import UserError, shown_to_user
from cwm_jax.files import path_flag, written_whole
from cwm_jax.runtime import network

with shown_to_user(), network.hub_settings_read():  # its variables are read when it is imported
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    from cwm_jax.runtime import hub_client

DATASET = "p-doom/coinrun-dataset"
_SPARE_BYTES = 100 << 20  # to stay free on the disk
_SOURCE = Path(".cache", "cwm_jax", "source.json")  # in a download folder: its repository


def download(
    api: HfApi, repo: str, folder: Path, *, splits: Sequence[str], count: int | None, jobs: int
) -> list[Path]:
    """Downloads a dataset: the first `count` shards of each split, or all.

    Raises:
        UserError: offline, unauthorised, no such dataset, too small a disk, or a damaged file.
    """
    revision, listed = hub_client.listing(api, repo, "dataset")
    wanted = [file for file in listed if "/" not in file.path and file.path.endswith(".json")]
    for split in splits:
        mine = [f for f in listed if PurePosixPath(f.path).match(f"{split}/{shards.PATTERN}")]
        if not mine:
            raise UserError(f"{repo} has no {split}/*.array_record files")
        wanted += sorted(mine, key=lambda file: file.path)[:count]
    return get(api, repo, "dataset", revision, wanted, folder, jobs=jobs)


def fetch(api: HfApi, repo: str, folder: Path, *, subfolder: str, jobs: int) -> Path:
    """Downloads a model, or one folder of its repository; returns its path.

    Raises:
        UserError: as `download`, or there is no such folder.
    """
    revision, listed = hub_client.listing(api, repo, "model")
    prefix = f"{subfolder}/" if subfolder else ""
    wanted = [f for f in listed if f.path.startswith(prefix) and f.path != ".gitattributes"]
    if not wanted:
        held = sorted({f.path.split("/")[0] for f in listed if "/" in f.path})
        raise UserError(f"{repo} has no folder {subfolder!r}; it has {', '.join(held) or 'none'}")
    get(api, repo, "model", revision, wanted, folder, jobs=jobs)
    return folder / subfolder


def get(api, repo, kind, revision, wanted: list[RepoFile], folder: Path, *, jobs) -> list[Path]:
    """Downloads files that are missing or incomplete, and checks each."""
    missing = [file for file in wanted if not hub_client.is_whole(folder / file.path, file)]
    _check_source(folder, repo, missing)
    _check_space(folder, sum(file.size for file in missing))
    with written_whole(folder / _SOURCE) as temporary:
        temporary.write_text(json.dumps({"repository": repo}) + "\n", encoding="utf-8")

    def one(file: RepoFile) -> None:
        path = folder / file.path
        place = dict(repo_type=kind, revision=revision, local_dir=folder)
        for _ in range(2):  # a damaged file is downloaded once more
            with hub_client.user_errors(api, repo):
                api.hf_hub_download(repo, file.path, **place, force_download=path.exists())
            if hub_client.is_whole(path, file):
                bar.update(file.size)
                return
        path.unlink()
        raise UserError(
            f"{file.path} of {repo} is damaged after download: its checksum is not the hub's"
        )

    total = sum(file.size for file in missing)
    with (
        _quiet(),
        tqdm(desc=repo, total=total, unit="B", unit_scale=True) as bar,
        ThreadPoolExecutor(jobs) as pool,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(pool.shutdown, cancel_futures=True)
        collections.deque(pool.map(one, missing), maxlen=0)
    return [folder / file.path for file in wanted]


def _check_source(folder: Path, repo: str, missing: list[RepoFile]) -> None:
    """Raises a UserError if files of another or an unknown repository would be replaced."""
    try:
        given = json.loads((folder / _SOURCE).read_text(encoding="utf-8"))["repository"]
    except (OSError, ValueError, KeyError, TypeError):
        given = None
    replaced = [folder / file.path for file in missing if (folder / file.path).exists()]
    if given not in (None, repo):
        raise UserError(f"{folder} contains files of {given}, not of {repo}: choose another folder")
    if given is None and replaced:
        raise UserError(
            f"{replaced[0]} exists already, and is not that of {repo}: choose another folder, or "
            "move it away"
        )


def _check_space(folder: Path, needed: int) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    free = shutil.disk_usage(folder).free
    if needed + _SPARE_BYTES > free:
        raise UserError(
            f"{needed / 1e9:.1f} GB to download, but {folder} has {free / 1e9:.1f} GB free: get "
            "fewer shards (--shards), or choose a folder on a larger disk"
        )


def upload(
    api: HfApi, source: Path, repo: str, *, folder: str, step: int | None, private: bool
) -> str:
    """Uploads a run's checkpoints, or an export, with a model card; returns the URL.

    Raises:
        UserError: there is nothing to upload, offline, or not allowed to write there.
    """
    contents, card = gather(source, step)
    prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
    contents = {prefix + name: path for name, path in contents.items()}
    if not get_token():
        raise UserError("uploading needs a token: hf auth login, or set HF_TOKEN")
    with hub_client.user_errors(api, repo):
        url = api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
        if private and not api.repo_info(repo, repo_type="model").private:
            raise UserError(
                f"--private: {repo} exists and is public, so nothing was uploaded: make it "
                f"private on the hub, or choose another"
            )
        readme = f"{prefix}README.md"
        operations = [CommitOperationAdd(name, path) for name, path in contents.items()]
        operations.append(CommitOperationAdd(readme, card(repo, prefix).encode()))
        if prefix and not api.file_exists(repo, "README.md", repo_type="model"):
            operations.append(CommitOperationAdd("README.md", card(repo, prefix).encode()))
        message = f"Upload {source.name}"
        api.create_commit(repo, operations, commit_message=message, repo_type="model")
    return str(url)


def gather(source: Path, step: int | None) -> tuple[dict[str, Path], Callable[[str, str], str]]:
    """The files to upload by their names in the repository, and the data for the model card."""
    if source.suffix == weights.SUFFIX:
        _, meta = weights.read(source)
        contents = {source.name: source}
    elif (source / weights.NAME).is_file() and not (source / run_checkpoint.FOLDER).is_dir():
        _, meta = weights.read(source / weights.NAME)
        contents = {weights.NAME: source / weights.NAME}
    elif bundle.is_bundle(source):
        meta = bundle.read_manifest(source)
        contents = _all_files(source, "")
    else:
        meta, contents = _gather_run(source, step)
    numbers = _last_metrics(source / "metrics.jsonl")
    return contents, lambda repo, prefix: model_card(repo, prefix, meta, numbers)


def _gather_run(source: Path, step: int | None) -> tuple[dict[str, Any], dict[str, Path]]:
    trained = run_checkpoint.load(source, step=step)
    meta = {"step": trained.step, "config": trained.config}
    root = source / run_checkpoint.FOLDER
    if not root.is_dir():  # one checkpoint, or an export of its parameters
        return meta, _all_files(trained.path, "")
    steps = [trained.path] if step is not None else [p for p in root.iterdir() if p.name.isdigit()]
    contents = {}
    for path in sorted(steps):
        contents |= _all_files(path, f"{run_checkpoint.FOLDER}/{path.name}/")
    for name in ("config.json", "metrics.jsonl", "curves.png"):
        if (source / name).is_file():
            contents[name] = source / name
    return meta, contents


def _all_files(folder: Path, prefix: str) -> dict[str, Path]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {prefix + path.relative_to(folder).as_posix(): path for path in paths}


def _last_metrics(path: Path) -> dict[str, float]:
    """The last value of each number that a run reported."""
    last: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            last |= {k: v for k, v in record.items() if isinstance(v, float)}
    return last


def model_card(repo: str, prefix: str, meta: dict[str, Any], numbers: dict[str, float]) -> str:
    """A README with the front matter that the hub reads, filled from config and metrics."""
    network = meta["config"].get("model", {})
    rest = {name: group for name, group in meta["config"].items() if name != "model"}
    plain = dict(migration.flattened(rest))
    table = lambda rows: "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    rounded = {name: f"{value:.5g}" for name, value in numbers.items() if "perf/" not in name}
    where = f" --folder {prefix.rstrip('/')}" if prefix else ""
    at = f"/{prefix.rstrip('/')}" if prefix else ""
    return f"""---
library_name: cwm_jax
tags: [jax, world-model, diffusion, coinrun]
datasets: [{DATASET}]
---

# {repo}

A playable world model: given frames and the buttons pressed, it generates the next frame. Trained
with `cwm_jax` for {meta["step"]} steps.

    cwm play --checkpoint hf://{repo}{at}
    cwm hub fetch {repo}{where} --to models
    cwm sample --checkpoint models/{prefix.rstrip("/")}

## Network

| | |
|---|---|
{table(network)}

## Training

| | |
|---|---|
{table(plain)}

## Last numbers

| | |
|---|---|
{table(rounded) if rounded else "| none reported | |"}
"""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Disables the library's progress bars, one for each file."""
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def main(argv: Sequence[str] | None = None) -> None:
    with shown_to_user():
        args = parser().parse_args(argv)
        if getattr(args, "jobs", 1) < 1 or (getattr(args, "shards", None) or 1) < 1:
            raise UserError("--jobs and --shards must be 1 or more")
        api = HfApi()
        hub_client.check_settings(api)
        try:
            print(_run(api, args))
        except KeyboardInterrupt:
            raise UserError("interrupted; run the same command to continue") from None


def _run(api: HfApi, args: argparse.Namespace) -> str:
    if args.job == "download":
        count = dict(splits=args.splits, count=args.shards, jobs=args.jobs)
        got = download(api, args.repo, args.to, **count)
        return f"{len(got)} files of {args.repo} in {args.to}, all checked"
    if args.job == "fetch":
        path = fetch(api, args.repo, args.to, subfolder=args.folder.strip("/"), jobs=args.jobs)
        return f"{path}: cwm sample --checkpoint {path}"
    kind = dict(folder=args.folder, step=args.step, private=args.private)
    return f"{args.source} → {upload(api, args.source, args.repo, **kind)}"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    jobs = parser.add_subparsers(dest="job", required=True)
    add = jobs.add_parser("download", help="a dataset").add_argument
    add("--to", type=path_flag, default=Path("data/coinrun"), help="(%(default)s)")
    add("--repo", default=DATASET, help="(%(default)s)")
    add("--shards", type=int, help="the first so many of each split (all)")
    add("--splits", nargs="+", default=shards.SPLITS, choices=shards.SPLITS, help="(all three)")
    add("--jobs", type=int, default=8, help="files at a time (%(default)s)")
    add = jobs.add_parser("fetch", help="a model to sample from or play").add_argument
    add("repo", help="such as you/coinrun-world-model")
    add("--folder", default="", help="one folder of it (everything)")
    add("--to", type=path_flag, default=Path("models"), help="(%(default)s)")
    add("--jobs", type=int, default=8, help="files at a time (%(default)s)")
    add = jobs.add_parser("upload", help="a run's checkpoints, or an export").add_argument
    add("source", type=path_flag, help="a run's workdir, an export, or a bundle")
    add("--repo", required=True, help="such as you/coinrun-world-model; created if missing")
    add("--folder", default="", help="folder in the repository (its root)")
    add("--step", type=int, help="one checkpoint of the run (all)")
    add("--private", action="store_true", help="make the repository private")
    return parser


if __name__ == "__main__":
    main()
