"""What the documentation site has beside the pages of docs/: pages of other folders, a reference.

Links are written for a reader of the repository. Those to a page of the site lead there; those to
other files of the repository become plain text.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
# Pages of other folders: place in the repository → place in the site.
ELSEWHERE = {
    "README.md": "project.md",
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/RESULTS.md": "benchmarks/RESULTS.md",
    "benchmarks/POCKET.md": "benchmarks/POCKET.md",
    "checkpoints/pocket/README.md": "checkpoints/pocket.md",
}
_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^()\s]+)\)")


def on_files(files, config):
    for source, place in ELSEWHERE.items():
        content = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, place, content=content))
    for place, content in reference().items():
        files.append(File.generated(config, place, content=content))
    return files


def on_nav(nav, config, files):
    """Nothing is left out: a page that no entry of `nav` names is a fault."""
    named = {page.file.src_uri for page in nav.pages}
    lost = [file.src_uri for file in files.documentation_pages() if file.src_uri not in named]
    assert not lost, f"mkdocs.yml leaves out {lost}"
    return nav


def on_config(config):
    config.nav.append({"Reference": [*reference()]})
    return config


def on_page_markdown(markdown, page, config, files):
    places = {f"docs/{file.src_uri}": file.src_uri for file in files if not file.generated_by}
    places |= ELSEWHERE
    source = next((s for s, p in ELSEWHERE.items() if p == page.file.src_uri), None)
    source = source or f"docs/{page.file.src_uri}"
    if page.file.generated_by and source.startswith("docs/"):
        return markdown
    return _LINK.sub(lambda found: _link(found, source, page.file.src_uri, places), markdown)


def _link(found, source: str, place: str, places: dict[str, str]) -> str:
    text, target = found.groups()
    if "://" in target or target.startswith(("#", "mailto:")):
        return found[0]
    target, hash_, anchor = target.partition("#")
    wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if wanted in places:
        near = posixpath.relpath(places[wanted], posixpath.dirname(place) or ".")
        return f"{text}({near}{hash_}{anchor})"
    return found[0] if text.startswith("!") else text[1:-1]


def reference() -> dict[str, str]:
    """A page for each package, with its modules; one for those that lie beside the packages."""
    modules: dict[str, list[str]] = {}
    for path in sorted((ROOT / "cwm_jax").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "_shipped" in parts or parts[-1] == "__init__":
            continue
        name = parts[1] if len(parts) > 2 else "cwm_jax"
        modules.setdefault(name, []).append(".".join(parts))
    return {
        f"reference/{name}.md": f"# {name}\n\n" + "\n\n".join(f"::: {one}" for one in held) + "\n"
        for name, held in modules.items()
    }
