"""The documentation is correct: marked commands run, and all others have existing flags."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from forked_programs import run_each

from configs import base
from cwm_jax.programs import command as cwm
from cwm_jax.programs import train

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(?:ba)?sh(?P<run> run)?\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^    ((?:python|cwm) .*)$", re.MULTILINE)
SUBCOMMANDS = ("evaluate.py", "cwm_jax.tools.hub")
ORDER = ("doctor", "get-data", "train", "sample", "share")

# As in the documentation, but short and small.
_NETWORK = ["hidden_size=16", "depth=1", "num_heads=1", "patch_size=32", "max_frames=4"]
_REST = [
    "schedule.max_steps=1",
    "data.batch_size=2",
    "data.clip_len=4",
    "data.num_workers=1",
    "validation.batches=1",
    "sampler.ddim_steps=1",
    "rollouts.every_steps=0",
]
SHORT = {
    "train.py": [f"--config.model.{size}" for size in _NETWORK]
    + [f"--config.{setting}" for setting in _REST],
    "sample.py": ["--frames", "3", "--n-samples", "1", "--ddim-steps", "1"],
    "cwm_jax.tools.export": ["--ddim-steps", "1"],
}


def commands(page, *, marked):
    text = page.read_text()
    for block in BLOCK.finditer(text):
        if bool(block["run"]) == marked:
            yield from filter(None, block["body"].replace("\\\n", " ").splitlines())
    if not marked:
        yield from INDENTED.findall(text)


def program(command):
    """(program, arguments) of a command; None where it is not ours."""
    words = shlex.split(command, comments=True)
    while words and "=" in words[0] and not words[0].startswith("-"):
        words = words[1:]
    if words and Path(words[0]).name == "cwm" and words[1:] and words[1] in cwm.SUBCOMMANDS:
        module = cwm.SUBCOMMANDS[words[1]].module
        is_program = module.startswith("cwm_jax.programs.") and words[1] != "completion"
        return f"{words[1]}.py" if is_program else module, words[2:]
    if not words or Path(words[0]).name != "python":
        return None
    return (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])


@pytest.mark.timeout(900)
def test_marked_commands_run(tmp_path):
    """In order, in a folder of their own, without network use."""
    for name in ("configs", "assets", "checkpoints"):
        (tmp_path / name).symlink_to(ROOT / name)
    pages = [ROOT / "docs" / f"{name}.md" for name in ORDER]
    assert set(pages) >= {page for page in PAGES if any(commands(page, marked=True))}
    marked = [program(command) for page in pages for command in commands(page, marked=True)]
    module = lambda name: f"cwm_jax.programs.{name[:-3]}" if name.endswith(".py") else name
    lines = [[module(name), *words, *SHORT.get(name, ())] for name, words in marked]
    (tmp_path / "printed").mkdir()
    settings = dict(WANDB_MODE="disabled", JAX_PLATFORMS="cpu")
    ended = run_each(lines, tmp_path / "printed", cwd=tmp_path, **settings)
    for line, done in zip(lines, ended, strict=True):
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        assert "leaked" not in done.stderr, done.stderr  # shared memory of reading processes
    printed = "".join(done.stdout for done in ended)
    for made in ("preview.html", "generated.mp4", "generated.png", "bundle.mp4"):
        assert (tmp_path / made).exists(), made
    assert printed.count("resuming from step 1 of 1") == 1  # the second training was a resumption


def help_text(name, words, monkeypatch, capsys):
    """What `--help` prints; for a program with subcommands, that of the one in use."""
    sub = [word for word in words[:1] if name in SUBCOMMANDS and not word.startswith("-")]
    monkeypatch.setattr(sys, "argv", [name, *sub, "--help"])
    module = importlib.import_module(
        "tests.faults.__main__" if name == "tests.faults" else name.removesuffix(".py")
    )
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    return capsys.readouterr().out


def exists_in_config(flag):
    settings = base.get_config()
    for part in flag.removeprefix("--config").lstrip(".").split("."):
        if part and part not in settings:
            return False
        settings = settings[part] if part else settings
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_flag_exists(page, monkeypatch, capsys):
    for command in [*commands(page, marked=False), *commands(page, marked=True)]:
        name, words = program(command) or ("", [])
        flags = [word.partition("=")[0] for word in words if word.startswith("--")]
        if name.startswith("examples/"):  # these need extras: their flags are read in the source
            wrong = [f for f in flags if f'"{f}"' not in (ROOT / name).read_text()]
        elif name == "train.py":
            wrong = [f for f in flags if f[2:] not in train.flags.FLAGS and not exists_in_config(f)]
        else:
            known = help_text(name, words, monkeypatch, capsys) if name else ""
            wrong = [f for f in flags if not re.search(rf"{f}\b(?!-)", known)]
        assert not wrong, f"{page.name}: {command}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_make_targets_lead_somewhere(page):
    text, makefile = page.read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).is_file(), target
    for target in re.findall(r"`make ([\w-]+)", text):
        assert f"\n{target}:" in makefile, target


def test_the_checks_detect_errors():
    assert exists_in_config("--config.model.num_actions")
    assert not exists_in_config("--config.model.no_such_thing")
    assert program("A=1 .venv/bin/python -m cwm_jax.tools.check x --jobs 2  # or 3") == (
        "cwm_jax.tools.check",
        ["x", "--jobs", "2"],
    )
    assert program("cwm evaluate compare a.json") == ("evaluate.py", ["compare", "a.json"])
    assert program("cwm check x") == ("cwm_jax.tools.check", ["x"])
    assert program("make install") is None


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.stem)
def test_the_site_and_the_list_of_pages_name_each(page):
    site, listed = (ROOT / "mkdocs.yml").read_text(), (ROOT / "docs" / "README.md").read_text()
    assert re.search(rf"[-\[,] ?{re.escape(page.name)}\b", site), f"mkdocs.yml: {page.name}"
    assert page.name == "README.md" or f"({page.name})" in listed, f"docs/README.md: {page.name}"
