"""Assembles the page: the sources of `web/`, the model, the runtime and the clips in one folder.

    index.html, sw.js      the only files whose names do not depend on their content
    app-HASH/              the page's modules and style sheet
    assets/NAME.HASH       everything else; weights, graphs and runtimes are packed with gzip, under
                           a name for which no server sets a content encoding

index.html lists each file with its length and SHA-256, and the page checks them.
"""

import base64
import contextlib
import gzip
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cwm_jax import shipped
from cwm_jax.checkpoints.run_checkpoint import Trained
from cwm_jax.errors import UserError
from cwm_jax.onnx import folder
from cwm_jax.play.inference.engine import fingerprint
from cwm_jax.play.session.prompt_sources import ClipPrompts
from cwm_jax.static_page import npm_package, recorded_rollout, start_clips

SOURCE = shipped.page()
MOST_BYTES = 30_000_000
LEVEL = 9  # of compression
MARK = "cwm-web.json"  # marks a folder built by this module, which may be replaced
KERNELS = ("kernels.wasm", "kernels-shared.wasm")
_PACKED = (".onnx", ".bin", ".wasm")
_SCRIPTS = (".js", ".css")


def build(
    trained: Trained,
    prompts: ClipPrompts,
    out: Path,
    *,
    name: str,
    steps: tuple[int, ...],
    runtime: Path | None = None,
    dtype: str = "float16",
) -> int:
    """Writes the page atomically; returns its size in bytes.

    Args:
        name: of the model on the page.
        steps: the denoising steps to choose from.
        runtime: the archive of the runtime; fetched with npm by default.

    Raises:
        UserError: the network is of another game, a file is missing, or the page is too large.
    """
    _check(trained, prompts)
    assets = _model(trained, name, steps, dtype) | npm_package.files(runtime)
    assets |= start_clips.files(prompts)
    clip = start_clips.gallery(prompts)[0]
    assets |= {file: (SOURCE / file).read_bytes() for file in KERNELS}
    assets["rollout.png"] = recorded_rollout.picture(trained, prompts, clip)
    with _written_whole(out) as made:
        listed = {key: _put(made, key, data) for key, data in assets.items()}
        listed |= _scripts(made)
        _page(made, listed)
        size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
        if size > MOST_BYTES:
            raise UserError(
                f"the page has {size / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:.0f}: choose a "
                f"smaller network, fewer --ddim-steps, or --dtype float16"
            )
    return size


def _check(trained: Trained, prompts: ClipPrompts) -> None:
    network = trained.network
    if not SOURCE.is_dir():
        raise UserError(shipped.missing(shipped.PAGE))
    if not network.has_coinrun_actions or not prompts.known.is_procgen:
        raise UserError(
            f"the page has the keys of Procgen's games: 15 actions, and the network has "
            f"{network.num_actions} ({network.action_encoding}); the data has those of "
            f"{prompts.known.game}"
        )
    size = prompts.episodes[0].frames.shape[1]
    if network.image_size != size:
        raise UserError(f"the network's frames are {network.image_size} wide, the data's {size}")


def _model(trained: Trained, name: str, steps: tuple[int, ...], dtype: str) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory(prefix="cwm_jax_") as temporary:
        path = Path(temporary)
        about = folder.write(trained, path, steps=steps, dtype=dtype)
        about |= {"name": name, "fingerprint": fingerprint(trained.network, trained.params).hex()}
        wanted = (folder.WEIGHTS, "denoise.onnx", "encode.onnx")
        found = {file: (path / file).read_bytes() for file in wanted}
    return found | {folder.DESCRIPTION: json.dumps(about).encode()}


def _put(made: Path, name: str, data: bytes) -> dict:
    """Writes one asset, and returns how index.html lists it."""
    packed = name.endswith(_PACKED)
    data = gzip.compress(data, LEVEL, mtime=0) if packed else data
    path = Path(name)
    path = Path("assets", *path.parts[:-1], f"{path.stem}.{_hash(data)[:10]}{path.suffix}")
    target = made / (f"{path}.packed" if packed else path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    return _entry(made, target) | {"packed": packed}


def _entry(made: Path, path: Path) -> dict:
    data = path.read_bytes()
    where = path.relative_to(made).as_posix()
    return {"path": where, "bytes": len(data), "sha256": _hash(data)}


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _scripts(made: Path) -> dict[str, dict]:
    sources = [p for p in sorted(SOURCE.iterdir()) if p.suffix in _SCRIPTS and p.name != "sw.js"]
    every = b"".join(path.name.encode() + path.read_bytes() for path in sources)
    app = made / f"app-{_hash(every)[:10]}"
    app.mkdir()
    for path in sources:
        shutil.copyfile(path, app / path.name)
    return {path.name: _entry(made, app / path.name) for path in sources}


def _page(made: Path, listed: dict[str, dict]) -> None:
    app = listed["main.js"]["path"].rpartition("/")[0]
    modules = {f"./{e['path']}": _sri(made / e["path"]) for e in listed.values() if _is_module(e)}
    import_map = json.dumps({"integrity": modules})
    blanks = {
        "{app}": app,
        "{files}": json.dumps(listed),
        "{icon}": start_clips.data_url((SOURCE / "icon.svg").read_bytes()),
        "{rollout}": listed["rollout.png"]["path"],
        "{import_map}": import_map,
        "{import_map_hash}": _integrity(import_map.encode(), "sha256"),
        "{main_integrity}": _sri(made / app / "main.js"),
        "{style_integrity}": _sri(made / app / "style.css"),
    }
    text = (SOURCE / "index.html").read_text(encoding="utf-8")
    for blank, value in blanks.items():
        text = text.replace(blank, value)
    (made / "index.html").write_text(text, encoding="utf-8")
    names = [entry["path"] for entry in listed.values()]
    worker = (SOURCE / "sw.js").read_text(encoding="utf-8").replace("{files}", json.dumps(names))
    (made / "sw.js").write_text(worker, encoding="utf-8")
    (made / ".nojekyll").touch()  # GitHub Pages: serve the files unchanged
    about = {"made_by": "cwm_jax.tools.web", "files": len(names) + 2}
    (made / MARK).write_text(json.dumps(about) + "\n", encoding="utf-8")


def _is_module(entry: dict) -> bool:
    return entry["path"].endswith((".js", ".mjs"))


def _sri(path: Path) -> str:
    return _integrity(path.read_bytes(), "sha384")


def _integrity(data: bytes, kind: str) -> str:
    return f"{kind}-{base64.b64encode(hashlib.new(kind, data).digest()).decode()}"


@contextlib.contextmanager
def _written_whole(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out`, in place of an earlier page."""
    if out.exists() and not (out / MARK).is_file():
        raise UserError(f"{out} exists and is no page built by this program; choose another folder")
    temporary = out.with_name(f".{out.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(out, ignore_errors=True)
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
