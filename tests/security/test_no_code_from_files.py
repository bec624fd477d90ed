"""No file that the project reads can run code: only utils/unpickle.py reads pickles.

The test searches the syntax trees of all sources for names that unpickle or evaluate. JUDGED lists harmless uses of
such names, each with its reason.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOOR = "utils/unpickle.py"
SOURCES = sorted(
    path for path in ROOT.rglob("*.py") if not {"tests", "build", "venv"} & set(path.relative_to(ROOT).parts[:1])
)

MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "jsonpickle",
    "pandas",
    "hickle",
}
"""Modules that unpickle or evaluate."""
CALLS = {
    "torch.load": "unpickles",
    "torch.jit.load": "runs code",
    "torch.package.PackageImporter": "runs code",
    "torch.hub.load": "downloads and runs code",
    "torch.export.load": "runs code",
    "numpy.load": "unpickles with allow_pickle",
    "yaml.load": "constructs any object",
    "yaml.load_all": "constructs any object",
    "yaml.unsafe_load": "constructs any object",
    "yaml.full_load": "constructs objects",
    "eval": "runs code",
    "exec": "runs code",
    "__import__": "imports by name",
    "runpy.run_path": "runs code",
}
NAMES = {
    "FileSystemReader": "torch.distributed.checkpoint unpickles its metadata",
    "broadcast_object_list": "unpickles what another process sends",
    "scatter_object_list": "unpickles what another process sends",
    "all_gather_object": "unpickles what another process sends",
    "gather_object": "unpickles what another process sends",
    "recv_object_list": "unpickles what another process sends",
    "send_object_list": "pickles what another process reads",
    "allow_pickle": "unpickles",
    "trust_remote_code": "runs downloaded code",
    "unsafe_load": "constructs any object",
    "UnsafeLoader": "constructs any object",
    "Unpickler": "unpickles",
    "read_pickle": "unpickles",
    "dcp": "torch.distributed.checkpoint unpickles its metadata",
}
JUDGED: dict[tuple[str, str], str] = {}
"""(file, name) -> why it is harmless."""


def imported_names(tree: ast.AST) -> dict[str, str]:
    """Return the name in the file -> the imported object, such as {"np": "numpy", "load": "torch.load"}."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                first = each.name.partition(".")[0]
                names[each.asname or first] = each.name if each.asname else first
        elif isinstance(node, ast.ImportFrom):
            names |= {(each.asname or each.name): f"{node.module}.{each.name}" for each in node.names}
    return names


def dotted(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)) is not None:
        return f"{base}.{node.attr}"
    return None


def dangers(source: str) -> Iterator[tuple[str, str]]:
    """Yield (name, reason) for everything in a source that could run the content of a file."""
    tree = ast.parse(source)
    known = imported_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            for module in modules:
                if module.partition(".")[0] in MODULES:
                    yield module, "unpickles or evaluates"
                if module.startswith("torch.distributed.checkpoint"):
                    yield module, "unpickles its metadata"
        if isinstance(node, ast.Attribute | ast.Name) and (name := dotted(node)) is not None:
            first, _, rest = name.partition(".")
            full = known.get(first, first) + (f".{rest}" if rest else "")
            if full in CALLS:
                yield full, CALLS[full]
            if full.rpartition(".")[2] in NAMES:
                yield full.rpartition(".")[2], NAMES[full.rpartition(".")[2]]
        if isinstance(node, ast.keyword) and node.arg in NAMES:
            yield node.arg, NAMES[node.arg]
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in NAMES:
            yield node.value, f"a text that getattr could use: {NAMES[node.value]}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_module_unpickles_or_evaluates(path):
    file = path.relative_to(ROOT).as_posix()
    if file == DOOR:
        return
    found = {(name, why) for name, why in dangers(path.read_text(encoding="utf-8")) if (file, name) not in JUDGED}
    assert not found, f"{file}: {sorted(found)}; go through {DOOR}"


def test_the_walk_sees_the_project_and_the_door():
    names = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    assert {DOOR, "train.py", "utils/checkpoint.py", "scripts/export.py"} <= names and len(names) > 80
    assert {"pickle"} <= {name for name, _ in dangers((ROOT / DOOR).read_text())}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads as f",
        "import torch as t\nt.load('x')",
        "from torch import load as read\nread('x')",
        "import torch\ntorch.load('x', weights_only=True)",
        "import numpy as np\nnp.load('x')",
        "numpy_load = 1\nf(allow_pickle=True)",
        "import yaml\nyaml.load(x, Loader=yaml.Loader)",
        "from yaml import unsafe_load\nunsafe_load(x)",
        "import torch.distributed as dist\ndist.broadcast_object_list([1])",
        "import torch.distributed.checkpoint as dcp",
        "from torch.distributed.checkpoint import FileSystemReader",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "getattr(dist, 'all_gather_object')(x)",
        "eval('1')",
        "import dill.source",
        "import joblib",
        "import shelve",
    ],
)
def test_the_walk_finds_every_way(source):
    assert list(dangers(source))


def test_harmless_code_is_no_danger():
    assert not list(dangers("import torch, yaml\nyaml.safe_load(x)\nmodel.compile()\nmodel.eval()\nre.compile('x')"))
