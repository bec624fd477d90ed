"""Rules for names, imports and sizes that keep the code readable. The syntax trees of all files are checked.

Test files are not checked, only the code that a user installs.
"""

import ast
import re
import sys
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

# Code that breaks a rule today. Remove an entry when its code is corrected. Do not add any.
SHARED_NAMES: set[str] = set()
CIRCLES: set[frozenset[str]] = set()
LONG_FUNCTIONS = {
    "pipeline/rollout.py:rollout_passes",
}
LONG_FILES: set[str] = set()
RIDDLES: set[str] = set()

# Modules that a function may import. Everything else is imported at the top of its module.
LATE_IMPORTS = {
    # Optional packages, and required ones that take long to import: each has one place.
    "accelerate": "only if weights stay in RAM",
    "av": "only if a video is read or written",
    "diffusers": "only if the solver is UniPC",
    "gguf": "optional",
    "gradio": "only if the page is shown",
    "gradio.networking": "only with --share",
    "model.fused_kernels": "needs triton, which is optional",
    "ray.serve": "optional",
    "scripts.runs.fleet_parts": "needs ray, which is optional",
    "torch.distributed.tensor": "only if a checkpoint is written",
    "torch.utils.tensorboard": "optional",
    "torchao": "optional",
    "transformers": "only if a prompt is not in the cache",
    "vbench": "optional",
    "vbench2_beta_long": "optional",
    "wandb": "optional",
    # Boundaries inside a running program.
    "pipeline.pretrained": "`import pipeline` takes no time",
    "pipeline.serving.loaded": "the page is shown before torch is imported",
    "utils.video.write": "the same; it imports torch",
}


@cache
def sources() -> dict[str, ast.Module]:
    """Return path -> syntax tree of every Python file outside the tests."""
    folders = [REPOSITORY / name for name in (*PACKAGES, "scripts")]
    files = [*REPOSITORY.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))]
    return {file.relative_to(REPOSITORY).as_posix(): ast.parse(file.read_text("utf-8")) for file in sorted(files)}


def module_name(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


@cache
def imports() -> dict[str, set[str]]:
    """Return module -> the project's modules that it imports, also in functions and under TYPE_CHECKING."""
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
    """Yield `path:name` and the node of every function, method and inner function."""
    for path, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path}:{node.name}", node


def check(found: set, known: set, rule: str) -> None:
    """Fail if code breaks a rule and is not on the list of known cases."""
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


def test_no_public_function_name_means_two_things():
    """Every program has `main`, `run` and `parse_arguments`. An operator has the name of its kernel."""
    places = defaultdict(set)
    for path, tree in sources().items():
        for node in tree.body if path != "model/fused_kernels.py" else ():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
                places[node.name].add(path)
    shared = {name for name, paths in places.items() if len(paths) > 1} - {"main", "run", "parse_arguments"}
    assert not shared, {name: sorted(places[name]) for name in shared}


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


def late_imports() -> dict[str, list[tuple[str, str, str]]]:
    """Return file -> (outermost function, module, name) of every import in a function."""
    found = defaultdict(list)
    for path, tree in sources().items():
        outermost = [
            node for part in tree.body for node in ([part] if not isinstance(part, ast.ClassDef) else part.body)
        ]
        for function in outermost:
            for node in ast.walk(function) if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) else ():
                if isinstance(node, ast.Import):
                    found[path] += [(function.name, alias.name, alias.name) for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    found[path].append((function.name, node.module, node.names[0].name))
    return found


def is_program(path: str) -> bool:
    """Return whether a file is a program that is started by its path."""
    return "/" not in path or path.rpartition("/")[0] == "scripts"


def test_a_program_has_one_lazy_boundary():
    """A program first reads its arguments, so that --help is fast. Then it imports one module, which does the work."""
    programs = {path: found for path, found in late_imports().items() if is_program(path)}
    assert not {path for path, found in programs.items() if len({module for _, module, _ in found}) > 1}


def top_imports(path: str) -> set[str]:
    """Modules that a file imports when it is imported itself."""
    found = set()
    for node in sources()[path].body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module != "__future__":
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & {module_name(file) for file in sources()}
            found |= inside or {node.module}
    return found


@pytest.mark.parametrize("program", [path for path in sources() if is_program(path) and path != "setup.py"])
def test_help_needs_only_the_standard_library(program):
    """So it answers at once. The package of a module is imported too, and what it imports."""
    files = {module_name(path): path for path in sources()}
    waiting, seen = [module_name(program)], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        outer = {name.rpartition(".")[0]} & files.keys()
        waiting += [*outer, *(top_imports(files[name]) if name in files else ())]
    packages = {name.partition(".")[0] for name in seen if name not in files}
    assert not packages - sys.stdlib_module_names - {"scripts"}


def test_only_optional_packages_are_imported_in_functions():
    places = defaultdict(list)
    for path, found in late_imports().items():
        for function, module, name in found if not is_program(path) else ():
            full = f"{module}.{name}"
            places[full if full in LATE_IMPORTS else module].append(f"{path}:{function}")
    assert not places.keys() - LATE_IMPORTS.keys(), {name: places[name] for name in places.keys() - LATE_IMPORTS.keys()}
    assert not LATE_IMPORTS.keys() - places.keys(), "entries of the table that no function imports"
    assert not {name: found for name, found in places.items() if len(found) > 1}, "one place for each"


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
    """Only programs print: their function `main`, and `exit_code`, which prints a mistake in one line."""
    slips = [
        f"{name}:{node.lineno} {ast.unparse(node)[:60]}"
        for name, function in functions()
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if (node.func.id == "print" and name.split("/")[0] in PACKAGES and not name.endswith((":main", ":exit_code")))
        or (node.func.id == "getattr" and len(node.args) == 3 and re.search(r"config$", ast.unparse(node.args[0])))
    ]
    assert not slips
