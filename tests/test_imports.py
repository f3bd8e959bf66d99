"""Who imports whom, read from the source: no circle, no private name across files, no module looked up by a string."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"step_kernels": "step_kernels", "step_kernels.model": "model", "bench": "bench"}
LOOKED_UP = {  # files that import a module by name, and why
    "bench.kernels.attention": "rivals that may be installed, all with a function of one name",
    "step_kernels.backend": "an op finds its own name on the floor that runs it, so that import needs no Triton",
    "step_kernels.extras": "an optional package, for an error that tells what to install",
}


def modules() -> dict[str, Path]:
    """Full name -> file."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder).with_suffix("").parts
            if inside[0] == "model" and folder == "step_kernels":
                continue  # the link to model/
            found[".".join((package, *inside)).removesuffix(".__init__")] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes under ``node`` that an import executes; what stands under TYPE_CHECKING or in a function is left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from run_at_import(child)


def imported(module: str, node: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name in it, or "" for the module itself) of each of the project's names that an import statement binds."""
    if isinstance(node, ast.Import):
        found = [(alias.name, "") for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
        parts = package.split(".")
        base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
        source = ".".join(filter(None, (base, node.module)))
        found = [
            (f"{source}.{alias.name}", "") if f"{source}.{alias.name}" in MODULES else (source, alias.name)
            for alias in node.names
        ]
    else:
        return
    yield from ((source, name) for source, name in found if source in MODULES)


def test_imports_run_in_no_circle() -> None:
    graph = {
        module: {source for node in run_at_import(tree) for source, _ in imported(module, node)}
        for module, tree in TREES.items()
    }
    assert "step_kernels.model.trace" in graph["step_kernels.model.encoder"], "imports are found"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imported by ".join(error.args[1]))


def test_no_private_name_leaves_its_file() -> None:
    seen = []
    for module, tree in TREES.items():
        bound = set()  # names of the project's modules in this file
        for node in ast.walk(tree):
            for source, name in imported(module, node):
                private = (name or source.rpartition(".")[2]).startswith("_") and not name.startswith("__")
                if private and not source.endswith("__main__"):
                    seen.append(f"{module} imports {source} {name}")
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                sources = {source.rpartition(".")[2] for source, name in imported(module, node) if not name}
                bound |= {alias.asname or alias.name for alias in node.names if alias.name in sources}
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound):
                continue
            if node.attr.startswith("_") and not node.attr.startswith("__"):
                seen.append(f"{module} reads {node.value.id}.{node.attr}")
    assert not seen


def test_modules_are_looked_up_by_name_only_where_a_reason_is_given() -> None:
    found = {
        module
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr == "import_module")
        or (isinstance(node, ast.Name) and node.id in ("__import__", "import_module"))
    }
    assert found == LOOKED_UP.keys()
