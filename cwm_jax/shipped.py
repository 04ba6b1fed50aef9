"""Where the files that come with the project are: its model, its embedded data, its configs.

They have the same names everywhere: `checkpoints/pocket`, `assets/coinrun`, `configs/NAME.py`. In a
checkout these are folders beside the package; in an installed package they lie inside of it. A
person may give such a name from any folder: what does not exist there is looked for here.
"""

from pathlib import Path

_PACKAGE = Path(__file__).parent
_INSTALLED = _PACKAGE / "_shipped"  # made when a wheel is built, see hatch_build.py

MODEL = "checkpoints/pocket"
DATA = "assets/coinrun"
CONFIGS = "configs"
PAGE = "web"  # sources of the page without a server


def is_checkout() -> bool:
    """Whether the package runs from a checkout, with its Makefile, and not as it was installed."""
    return (_PACKAGE.parent / "pyproject.toml").is_file()


def root() -> Path:
    """The folder that the names of this module are in."""
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
    """Why a name of this module is not here, and what would be right; empty where it is."""
    if (root() / name).exists():
        return ""
    if is_checkout():
        return f"{name} is not in this checkout: git checkout -- {name}"
    return f"this package was built without its {name}: install it from a whole wheel or a checkout"


def found(path: Path | str) -> Path:
    """`path`, or what comes with the project under that name where there is nothing at `path`."""
    path = Path(path)
    if path.exists() or path.is_absolute() or ".." in path.parts:
        return path
    here = root() / path
    is_ours = any(path.is_relative_to(name) for name in (MODEL, DATA, CONFIGS))
    return here if is_ours and here.exists() else path
