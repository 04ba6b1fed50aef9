"""The house keeps its order: imports run downward, importing changes nothing, names say what.

A room is a module of `cwm_jax`, or one of its packages, which counts as one.
"""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cwm_jax"

# From the ground up. A room imports only from floors strictly below its own.
FLOORS = (
    ("clock", "compile_cache", "errors", "kernels", "memory", "speed"),
    (
        "cluster",
        "coinrun",
        "displacement",
        "files",
        "motion",
        "npz",
        "pocket",
        "resume",
        "rope",
        "run_folder",
        "safe_pickle",
        "shared_memory",
        "stopping",
    ),
    (
        "attention",
        "checksums",
        "controls",
        "diffusion",
        "episodes",
        "keyboard",
        "metrics_file",
        "prompt",
        "wandb_run",
        "weights",
    ),
    ("distillation", "key_panel", "network"),
    ("layers",),
    (
        *("curves", "kernel_trials", "metrics", "model", "recordings", "sheet", "shards"),
        *("simulator", "video"),
    ),
    ("bundle", "change", "clips", "flops", "kernel_measure", "torch_format"),
    ("data", "denoiser", "kernel_choice"),
    ("objective", "parallel", "world"),
    ("sampler",),
    ("device_data", "training"),
    ("checkpoint", "report", "rollouts", "settings", "stages"),
    ("evaluation", "progress"),
    ("dry_run", "samplers"),
    ("loop",),
    ("play",),
    ("tools",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
VAGUE = {"utils", "util", "common", "base", "helpers", "misc", "core"}
READABLE = {".py", ".md", ".toml", ".txt", ".html", ".js", ".css", ".yml", ".svg", ""}
SETTERS = {"update", "setdefault", "pop", "putenv", "append", "insert", "extend", "clear"}


def parts(path):
    """`cwm_jax/tools/pack.py` → ("tools", "pack")."""
    return path.relative_to(PACKAGE).with_suffix("").parts


MODULES = {parts(path): path for path in sorted(PACKAGE.rglob("*.py"))}
NAMES = sorted(MODULES)
ROOF = ("__init__",)


def imports(tree, here):
    """Everything imported anywhere in a module, by absolute dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = ("cwm_jax", *here)[: len(here) + 1 - node.level]
                base = ".".join(filter(None, (*above, base)))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_of_ours(tree, here, modules):
    """Which of `modules` a module imports."""
    for name in imports(tree, here):
        first, *rest = name.split(".")
        for ending in ((), ("__init__",)):
            if first == "cwm_jax" and rest and (*rest, *ending) in modules:
                yield (*rest, *ending)


def faults_of_order(tree, here, modules=frozenset(MODULES)):
    """What is wrong with where a module's imports go."""
    for there in imports_of_ours(tree, here, modules):
        if there[0] == here[0]:
            if here[0] == "tools" and there not in (here, ("tools", "__init__")):
                yield f"tools do not import each other, but {here} imports {there}"
        elif FLOOR.get(there[0], -1) >= FLOOR.get(here[0], -1):
            yield f"{'.'.join(here)} imports {'.'.join(there)}, which is not on a floor below it"


def faults_of_import_time(tree):
    """Lines that change the process's environment or settings when a module is imported."""
    pending = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        pending += ast.iter_child_nodes(node)
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        touched = [ast.unparse(target) for target in targets if isinstance(target, ast.expr)]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in SETTERS:
                touched.append(ast.unparse(node.func.value))
            touched.append(ast.unparse(node.func))
        if any(
            re.match(r"(os\.)?(environ|putenv)\b|jax\.config\b|(sys\.)path\b", text)
            and not text.endswith(("environ.get", "environ.copy"))
            for text in touched
        ):
            yield f"line {node.lineno}: {ast.unparse(node)}"


def tree_of(name):
    return ast.parse(MODULES[name].read_text())


@pytest.mark.parametrize("name", [name for name in NAMES if name != ROOF], ids=".".join)
def test_imports_run_strictly_downward(name):
    assert name[0] in FLOOR, (
        f"cwm_jax/{name[0]} is a new room: place it in FLOORS of tests/test_packages.py, "
        "above everything it imports"
    )
    assert not list(faults_of_order(tree_of(name), name))


def test_the_package_itself_imports_nothing_of_its_own():
    assert not list(imports_of_ours(tree_of(ROOF), ROOF, MODULES))


@pytest.mark.parametrize("name", NAMES, ids=".".join)
def test_the_package_never_sees_the_configs_library(name):
    used = {imported.split(".")[0] for imported in imports(tree_of(name), name)}
    assert not used & {"ml_collections", "configs", "train", "sample", "evaluate", "tests"}


@pytest.mark.parametrize("name", NAMES, ids=".".join)
def test_importing_changes_nothing(name):
    assert not list(faults_of_import_time(tree_of(name)))


def test_names_say_what_is_inside():
    vague = [".".join(name) for name in MODULES if VAGUE & set(name)]
    assert not vague


def test_the_rules_catch_what_they_forbid():
    ours = {("model",), ("report",), ("tools", "pack"), ("tools", "hub"), ("tools", "__init__")}
    ours |= {("errors",), ("play", "__init__"), ("play", "page")}
    cases = {
        ("model",): "from cwm_jax import report",
        ("errors",): "def f():\n    import cwm_jax.models.dit",
        ("tools", "pack"): "from .hub import push",
        ("report",): "from cwm_jax.play import x",
        ("play", "__init__"): "from ..tools import pack",
    }
    for here, source in cases.items():
        assert list(faults_of_order(ast.parse(source), here, ours)), source
    downward = ast.parse("from cwm_jax import errors, model")
    assert not list(faults_of_order(downward, ("report",), ours))
    assert not list(faults_of_order(ast.parse("from . import page"), ("play", "__init__"), ours))
    for source in (
        "import os\nos.environ['A'] = '1'",
        "if True:\n    os.environ.setdefault('A', '1')",
        "jax.config.update('jax_enable_x64', True)",
        "jax.config.jax_enable_x64 = True",
        "class A:\n    sys.path.insert(0, '.')",
        "sys.path += ['.']",
        "del os.environ['A']",
    ):
        assert list(faults_of_import_time(ast.parse(source))), source
    for source in ("def f():\n    os.environ['A'] = '1'", "HOME = os.environ.get('HOME')"):
        assert not list(faults_of_import_time(ast.parse(source))), source


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only a checkout knows its files")
def test_no_file_names_a_place_on_somebodys_machine():
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    absolute = re.compile(r"(?<![\w.:/<])/(work|home|root|Users|opt|mnt|scratch)/\w|(?<!\w)C:\\")
    faults = []
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.suffix in READABLE and path.is_file() and path != Path(__file__):
            for number, line in enumerate(path.read_text(errors="ignore").splitlines(), start=1):
                if absolute.search(line):
                    faults.append(f"{name}:{number}: {line.strip()}")
    assert not faults
