"""The packages: imports run downward, importing changes nothing, the tree names every module."""

import ast
import graphlib
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cwm_jax"

# From the lowest up. A package (or a module beside them) imports only from lines above its own.
PACKAGES = (
    ("errors", "coinrun", "shipped"),
    ("files", "config_group", "arguments"),
    ("controls", "runtime"),
    ("data", "models", "rendering"),
    ("diffusion", "simulator"),
    ("sampling",),
    ("training",),
    ("checkpoints",),
    ("onnx", "world_model"),
    ("evaluation", "play", "environment"),
    ("experiment", "static_page"),
    ("tools", "programs"),
)
PARTS_OF_PLAY = (("inference",), ("session",), ("web",))
# Modules that import upward still. Nothing may be added, and what is cut must be taken out.
EXCEPTIONS = set()
VAGUE = {"utils", "util", "common", "base", "helpers", "misc", "core"}
READABLE = {".py", ".md", ".toml", ".txt", ".html", ".js", ".css", ".yml", ".svg", ""}
IN_CONTAINERS = {"Dockerfile", "devcontainer.json"}  # which name places of their own images
SETTERS = {"update", "setdefault", "pop", "putenv", "append", "insert", "extend", "clear"}


def parts(path):
    """`cwm_jax/tools/pack.py` → ("tools", "pack"); a package's `__init__.py` → ("tools",)."""
    found = path.relative_to(PACKAGE).with_suffix("").parts
    return found[:-1] if found[-1] == "__init__" else found


MODULES = {parts(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TOP = ()  # cwm_jax/__init__.py
NAMES = sorted(name for name in MODULES if name != TOP)


def dotted(name):
    return ".".join(name) or "cwm_jax"


def imports(tree):
    """Everything imported anywhere in a module, by absolute dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_of_ours(tree, modules):
    """Which of `modules` a module imports; `from cwm_jax.data import loader` is `loader` alone."""
    found = set()
    for name in imports(tree):
        first, *rest = name.split(".")
        if first == "cwm_jax" and rest and tuple(rest) in modules:
            found.add(tuple(rest))
    return {one for one in found if not any(one == two[:-1] for two in found)}


def level(name, lines):
    """The number of the line of `lines` on which a package stands, from the lowest; None: none."""
    return next((number for number, line in enumerate(lines) if name in line), None)


def is_downward(here, there):
    """Whether a module may import another."""
    if here[0] != there[0]:
        mine, other = level(here[0], PACKAGES), level(there[0], PACKAGES)
    elif here[0] in ("tools", "programs") and there != ("programs", "command"):
        return here[:2] == there[:2] or there == (here[0],)
    elif here[0] == "play" and len(here) > 1 and len(there) > 1 and here[1] != there[1]:
        mine, other = level(here[1], PARTS_OF_PLAY), level(there[1], PARTS_OF_PLAY)
    else:
        return True
    return None not in (mine, other) and other < mine


def upward(tree, here, modules=frozenset(MODULES)):
    """The modules that a module imports and may not, but for the exceptions."""
    for there in sorted(imports_of_ours(tree, modules)):
        if not is_downward(here, there) and (dotted(here), dotted(there)) not in EXCEPTIONS:
            yield dotted(there)


def without_type_checking(tree):
    """A module without what it imports for annotations alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    return tree


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


@pytest.mark.parametrize("name", NAMES, ids=dotted)
def test_imports_run_strictly_downward(name):
    assert level(name[0], PACKAGES) is not None, (
        f"cwm_jax/{name[0]} is in no line of PACKAGES in tests/test_packages.py: put the module "
        "into a package, or a new package above everything that it imports"
    )
    assert not list(upward(tree_of(name), name))


def test_obsolete_exceptions_are_removed():
    found = {
        (dotted(here), dotted(there))
        for here in NAMES
        for there in imports_of_ours(tree_of(here), MODULES)
        if not is_downward(here, there)
    }
    assert found == set(EXCEPTIONS)


def test_there_are_no_import_cycles():
    graph = {
        name: imports_of_ours(without_type_checking(tree_of(name)), MODULES) - {name}
        for name in NAMES
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises a CycleError that names the circle


def test_the_package_itself_imports_nothing_of_its_own():
    assert not imports_of_ours(tree_of(TOP), MODULES)


@pytest.mark.parametrize("name", [TOP, *NAMES], ids=dotted)
def test_the_package_does_not_import_the_configs_library(name):
    used = {imported.split(".")[0] for imported in imports(tree_of(name))}
    assert "" not in used, "imports are absolute here"
    known_to_programs = {"ml_collections"} if name == ("programs", "train") else set()
    forbidden = {"ml_collections", "configs", "train", "sample", "evaluate", "tests"}
    assert not used & forbidden - known_to_programs


@pytest.mark.parametrize("name", [TOP, *NAMES], ids=dotted)
def test_importing_changes_nothing(name):
    assert not list(faults_of_import_time(tree_of(name)))


def test_module_names_are_specific():
    vague = [dotted(name) for name in NAMES if VAGUE & set(name)]
    assert not vague


def test_the_tree_of_the_readme_has_a_line_for_each_module():
    text = (ROOT / "README.md").read_text()
    block = re.search(r"^```\n(cwm_jax/\n.*?)^```$", text, re.MULTILINE | re.DOTALL)[1]
    listed, folders = set(), {}
    for line in block.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth] = name
        if depth and name.endswith(".py"):
            listed.add("".join(folders[d] for d in range(1, depth + 1)))
    modules = {str(path.relative_to(PACKAGE)) for path in MODULES.values()}
    assert listed == {name for name in modules if not name.endswith("__init__.py")}


def test_the_rules_catch_what_they_forbid():
    ours = {("errors",), ("models",), ("models", "dit"), ("sampling", "sampler"), ("tools",)}
    ours |= {("tools", "pack"), ("tools", "hub"), ("play", "web", "page"), ("play", "session", "x")}
    forbidden = {
        ("models", "dit"): "from cwm_jax.sampling import sampler",
        ("errors",): "def f():\n    import cwm_jax.models.dit",
        ("tools", "pack"): "from cwm_jax.tools.hub import push",
        ("sampling", "sampler"): "from cwm_jax.play.web.page import build",
        ("play", "session", "x"): "from cwm_jax.play.web import page",
    }
    for here, source in forbidden.items():
        assert list(upward(ast.parse(source), here, ours)), source
    allowed = {
        ("sampling", "sampler"): "from cwm_jax import errors\nfrom cwm_jax.models import dit",
        ("play", "web", "page"): "from cwm_jax.play.session import x",
        ("tools", "pack"): "import cwm_jax.tools\nfrom cwm_jax.models.dit import DiT",
    }
    for here, source in allowed.items():
        assert not list(upward(ast.parse(source), here, ours)), source
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
        if path.name in IN_CONTAINERS:
            continue
        if path.suffix in READABLE and path.is_file() and path != Path(__file__):
            for number, line in enumerate(path.read_text(errors="ignore").splitlines(), start=1):
                if absolute.search(line):
                    faults.append(f"{name}:{number}: {line.strip()}")
    assert not faults
