"""The house, as its imports draw it: who may know whom, and that nobody knows himself in a circle.

1. `lgc`, the library, never imports `lgc_lab`, the application.
2. `lgc` needs torch, numpy, safetensors and the standard library. Only `constriction` may be imported besides, by name
   and where it is used, as it is an extra. `lgc.integrations` and `lgc.elastic`, which nothing else of it imports, have
   frameworks too.
3. No files of a package import each other in a circle, and no folders that lie beside each other do.

An import counts wherever it stands: in a function, under TYPE_CHECKING, in `import_module("...")`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
LIBRARY, APPLICATION = "lgc", "lgc_lab"
REQUIRED = {"torch", "numpy", "safetensors"}
OPTIONAL = {"constriction"}
INTEGRATIONS = ("lgc.integrations", "lgc.elastic")
FRAMEWORKS = {"accelerate", "lightning", "torchft", "transformers"}

Graph = dict[str, set[str]]


def modules(source: Path, package: str) -> dict[str, Path]:
    """The files of a package by module name; that of a folder's `__init__.py` is the folder's."""
    files = sorted((source / package).rglob("*.py"))
    return {".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports(module: str, path: Path, known: set[str]) -> Iterator[str]:
    """What a file imports, wherever in it. `from package import name` is of `package.name` if there is such a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: imports are absolute here"
            assert node.module is not None
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in known else node.module
        elif isinstance(node, ast.Call) and _is_import_module(node.func):
            yield from (str(name.value) for name in node.args if isinstance(name, ast.Constant))


def _is_import_module(function: ast.expr) -> bool:
    names = {"import_module", "__import__"}
    return (isinstance(function, ast.Name) and function.id in names) or (
        isinstance(function, ast.Attribute) and function.attr in names
    )


def file_graph(source: Path, package: str) -> Graph:
    """Every file of a package, and the files of it that it imports."""
    files = modules(source, package)
    return {name: set(imports(name, path, set(files))) & set(files) - {name} for name, path in files.items()}


def folder_graphs(files: Graph) -> dict[str, Graph]:
    """For every folder what is in it, files and folders, and which of those import which."""
    folders = {name.rpartition(".")[0] for name in files} - {""}
    return {folder: _inside(folder, files) for folder in sorted(folders)}


def _inside(folder: str, files: Graph) -> Graph:
    def part(module: str) -> str | None:
        """The file or folder beside others that a module is, or is in."""
        rest = module.removeprefix(f"{folder}.")
        return None if rest == module else f"{folder}.{rest.partition('.')[0]}"

    graph: Graph = {}
    for module, targets in files.items():
        here = part(module)
        if here is not None:
            there = {found for target in targets if (found := part(target)) is not None}
            graph.setdefault(here, set()).update(there - {here})
    return graph


def circle(graph: Graph) -> str:
    """One of the graph's circles as `a -> b -> a`; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " -> ".join(reversed(error.args[1]))  # its order is from what is imported to what imports it
    return ""


def top_level(source: Path, package: str) -> dict[str, set[str]]:
    """What a package imports, by the first part of its name, and the files that do."""
    files = modules(source, package)
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        for target in imports(module, path, set(files)):
            found.setdefault(target.partition(".")[0], set()).add(module)
    return found


# --- the house ---


def test_the_library_does_not_know_the_application() -> None:
    assert top_level(SOURCE, LIBRARY).get(APPLICATION, set()) == set()


def test_the_library_needs_little() -> None:
    allowed = {LIBRARY, *REQUIRED, *OPTIONAL, *sys.stdlib_module_names}
    found = top_level(SOURCE, LIBRARY)
    assert {name: files for name, files in found.items() if name not in allowed | FRAMEWORKS} == {}
    users = {file for name in FRAMEWORKS for file in found.get(name, set())}
    assert {file for file in users if not file.startswith(INTEGRATIONS)} == set()


def test_integrations_are_imported_by_those_who_want_one() -> None:
    graph = file_graph(SOURCE, LIBRARY)
    inside = {file for file in graph if file.startswith(INTEGRATIONS)}
    assert {file for file in set(graph) - inside if graph[file] & inside} == set()


def test_the_library_imports_an_extra_only_where_it_is_used() -> None:
    """At the top of a file it would be missed by whoever does not have it."""
    for path in modules(SOURCE, LIBRARY).values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not {name.partition(".")[0] for name in names} & OPTIONAL, f"{path}, line {node.lineno}"


@pytest.mark.parametrize("package", [LIBRARY, APPLICATION])
def test_no_files_import_each_other_in_a_circle(package: str) -> None:
    assert circle(file_graph(SOURCE, package)) == ""


@pytest.mark.parametrize("package", [LIBRARY, APPLICATION])
def test_no_folders_import_each_other_in_a_circle(package: str) -> None:
    circles = {folder: circle(graph) for folder, graph in folder_graphs(file_graph(SOURCE, package)).items()}
    assert {folder: found for folder, found in circles.items() if found} == {}


# --- the reader of imports ---

FILES = {
    "house/__init__.py": "from house.attic import roof",
    "house/attic.py": "from house.rooms import hall\nroof = 1",
    "house/rooms/__init__.py": "",
    "house/rooms/hall.py": "def door():\n    import house.cellar.wine",
    "house/cellar/__init__.py": "",
    "house/cellar/wine.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.cellar.shelf import S",
    "house/cellar/shelf.py": "import importlib\nS = importlib.import_module('house.rooms.bath')",
    "house/rooms/bath.py": "",
}


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A package without a circle of files, whose folders `rooms` and `cellar` import each other."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_imports_are_read_wherever_they_stand(house: Path) -> None:
    assert file_graph(house, "house") == {
        "house": {"house.attic"},
        "house.attic": {"house.rooms.hall"},
        "house.rooms": set(),
        "house.rooms.hall": {"house.cellar.wine"},
        "house.rooms.bath": set(),
        "house.cellar": set(),
        "house.cellar.wine": {"house.cellar.shelf"},
        "house.cellar.shelf": {"house.rooms.bath"},
    }


def test_a_circle_is_shown_in_the_order_of_its_imports(house: Path) -> None:
    files = file_graph(house, "house")
    assert circle(files) == ""
    assert circle(folder_graphs(files)["house"]) in (
        "house.rooms -> house.cellar -> house.rooms",
        "house.cellar -> house.rooms -> house.cellar",
    )
    (house / "house/rooms/bath.py").write_text("from house.rooms import hall")
    found = circle(file_graph(house, "house")).split(" -> ")
    assert found[0] == found[-1]
    assert all(there in file_graph(house, "house")[here] for here, there in pairwise(found))
