"""The house rules: names, imports and sizes that keep the code readable. They are read from the syntax trees.

Tests are left out: only the code that a user installs is judged.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

PACKAGES = ("utils", "model", "pipeline", "trainer")  # a package imports only itself and those before it
LONGEST_FUNCTION = 40
LONGEST_FILE = 400

# What breaks a rule today. An entry leaves when its code is mended; none may be added.
SHARED_NAMES: set[str] = set()
CIRCLES: set[frozenset[str]] = set()
LONG_FUNCTIONS = {
    "pipeline/rollout.py:rollout_passes",
}
LONG_FILES: set[str] = set()
RIDDLES: set[str] = set()


@cache
def sources() -> dict[str, ast.Module]:
    """Path in the repository -> syntax tree of every Python file outside the tests."""
    folders = [REPOSITORY / name for name in (*PACKAGES, "scripts")]
    files = [*REPOSITORY.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))]
    return {file.relative_to(REPOSITORY).as_posix(): ast.parse(file.read_text("utf-8")) for file in sorted(files)}


def module_name(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


@cache
def imports() -> dict[str, set[str]]:
    """Module -> the project's modules it imports anywhere: in functions and under TYPE_CHECKING too."""
    modules = {module_name(path) for path in sources()}
    found = {}
    for path, tree in sources().items():
        names: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inside = {f"{node.module}.{alias.name}" for alias in node.names} & modules
                names |= inside or {node.module}
        found[module_name(path)] = (names & modules) - {module_name(path)}
    return found


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """`path:name` and the node of every function, methods and inner functions included."""
    for path, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path}:{node.name}", node


def check(found: set, known: set, rule: str) -> None:
    """Fail on what breaks a rule and is not on its list."""
    assert not found - known, f"{rule}: {sorted(map(str, found - known))}"


def test_no_public_class_name_is_defined_twice():
    places = defaultdict(set)
    for path, tree in sources().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].add(path)
    shared = {name for name, paths in places.items() if len(paths) > 1}
    where = {name: sorted(places[name]) for name in shared - SHARED_NAMES}
    check(shared, SHARED_NAMES, f"one name, one thing {where}")


def test_no_imports_form_a_circle():
    circles, remaining = set(), {name: set(targets) for name, targets in imports().items()}
    while True:
        try:
            TopologicalSorter(remaining).prepare()
            break
        except CycleError as error:
            ring = error.args[1]
            circles.add(frozenset(ring))
            remaining[ring[1]].discard(ring[0])
    check(circles, CIRCLES, "modules that import each other, also in functions and under TYPE_CHECKING")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_packages_to_its_left(package):
    forbidden = {*PACKAGES[PACKAGES.index(package) + 1 :], "scripts", "train", "inference", "demo"}
    wrong = {
        f"{name} imports {target}"
        for name, targets in imports().items()
        if name.split(".")[0] == package
        for target in targets
        if target.split(".")[0] in forbidden
    }
    assert not wrong


def test_a_function_fits_on_a_screen():
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node in functions()}
    long = {name for name, lines in lengths.items() if lines > LONGEST_FUNCTION}
    check(long, LONG_FUNCTIONS, f"functions of more than {LONGEST_FUNCTION} lines")


def test_a_file_is_read_in_one_sitting():
    long = {path for path in sources() if (REPOSITORY / path).read_text("utf-8").count("\n") > LONGEST_FILE}
    check(long, LONG_FILES, f"files of more than {LONGEST_FILE} lines")


def test_no_docstring_begins_with_of():
    """ "Of a prompt, its embedding" is a riddle; "Return the embedding of a prompt" is a sentence."""
    found = set()
    for path, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if text.startswith("Of "):
                    found.add(f"{path}:{getattr(node, 'name', 'module')}")
    check(found, RIDDLES, "docstrings that begin with 'Of'")


def test_packages_print_nothing_and_take_no_defaults_from_a_configuration():
    """Programs print: the functions `main`, and `exit_code`, which shows a mistake in one line."""
    slips = [
        f"{name}:{node.lineno} {ast.unparse(node)[:60]}"
        for name, function in functions()
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if (node.func.id == "print" and name.split("/")[0] in PACKAGES and not name.endswith((":main", ":exit_code")))
        or (node.func.id == "getattr" and len(node.args) == 3 and re.search(r"config$", ast.unparse(node.args[0])))
    ]
    assert not slips
