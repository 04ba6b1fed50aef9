"""Paths of the files that are part of the project: its model, embedded data and configs.

They have the same names everywhere: `checkpoints/pocket`, `assets/coinrun`, `configs/NAME.py`. In a
checkout these are folders next to the package; in an installed package they are inside it. Users
may give such a name from any folder: if it does not exist there, it is found here.
"""

from pathlib import Path

_PACKAGE = Path(__file__).parent
_INSTALLED = _PACKAGE / "_shipped"  # created when a wheel is built, see hatch_build.py

MODEL = "checkpoints/pocket"
DATA = "assets/coinrun"
CONFIGS = "configs"
PAGE = "web"  # sources of the page without a server


def is_checkout() -> bool:
    """Whether the package runs from a checkout, with its Makefile, not as an installed package."""
    return (_PACKAGE.parent / "pyproject.toml").is_file()


def root() -> Path:
    """The folder of this module's names."""
    return _PACKAGE.parent if is_checkout() else _INSTALLED


def model() -> Path:
    return root() / MODEL


def data() -> Path:
    return root() / DATA


def page() -> Path:
    return root() / PAGE


def config(name: str) -> Path:
    """The config file of a name such as "small"; it need not exist."""
    return root() / CONFIGS / f"{name}.py"


def missing(name: str) -> str:
    """Why a name of this module is missing, with the fix; empty if it exists."""
    if (root() / name).exists():
        return ""
    if is_checkout():
        return f"{name} is not in this checkout: git checkout -- {name}"
    return (
        f"this package was built without its {name}: install it from a complete wheel or a checkout"
    )


def found(path: Path | str) -> Path:
    """`path`, or the project's file of that name if `path` does not exist."""
    path = Path(path)
    if path.exists() or path.is_absolute() or ".." in path.parts:
        return path
    here = root() / path
    is_ours = any(path.is_relative_to(name) for name in (MODEL, DATA, CONFIGS))
    return here if is_ours and here.exists() else path
