"""Read the imports between the package's modules from their source, without importing them.

`python samples/house.py` makes build/types/dynexport: links that present the four folders as one package, for tools
that do not find a package through Python's import system (mypy, mkdocstrings).
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Folder -> package (pyproject.toml, package-dir).
FOLDERS = {
    "package": "dynexport",
    "exporter": "dynexport.exporter",
    "runtime": "dynexport.runtime",
    "plugins": "dynexport.plugins",
}

# Rooms from the lowest to the highest: a room imports only rooms of earlier lines.
LAYERS = (
    ("runtime.bundle",),
    ("plugins",),
    ("runtime.text", "runtime.engines"),
    ("runtime.execution",),
    ("runtime.generation",),
    ("runtime.serving", "runtime.measure"),
    ("exporter.families",),
    ("exporter.checkpoint",),
    ("exporter.quantise",),
    ("exporter.reference", "exporter.lowering"),
    ("exporter.graph",),
    ("exporter.strategies",),
    ("exporter.parity",),
    ("exporter.bundle",),
    ("exporter.trace", "exporter.triton"),
    ("exporter.profile",),
    ("exporter.cli",),
)
LEVEL = {room: number for number, layer in enumerate(LAYERS) for room in layer}


@dataclass(frozen=True)
class Module:
    """A Python file of the package.

    Attributes:
        name: the module's full name, such as ``dynexport.runtime.bundle.manifest``.
        path: the file.
        tree: the parsed source.
        room: the module's folder, such as ``runtime.bundle`` or ``plugins``; "" outside every room.
        imports: the modules of the package that it imports, at the top, in a function, under ``TYPE_CHECKING``, or as a
            string for ``import_module`` or ``python -m``.
        outside: top-level names of all other imports.
    """

    name: str
    path: Path
    tree: ast.Module
    room: str
    imports: frozenset[str]
    outside: frozenset[str]


def name_of(path: Path) -> str:
    """Return the module name of a file."""
    folder, *parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join((FOLDERS[folder], *parts)).removesuffix(".__init__")


def room_of(path: Path) -> str:
    """Return the room of a file."""
    folder, *parts = path.relative_to(ROOT).parts
    if folder == "plugins":
        return folder
    return f"{folder}.{parts[0]}" if len(parts) > 1 else ""


def within(name: str, package: str) -> bool:
    """Return whether a module is a package or a part of it."""
    return name == package or name.startswith(f"{package}.")


@cache
def modules() -> Mapping[str, Module]:
    """Return all modules of the package by name."""
    paths = {name_of(path): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}
    found = {}
    for name, path in paths.items():
        tree = ast.parse(path.read_text(encoding="utf-8"), path)
        named = list(_named(tree))
        # `from package import name` imports a module or a name in a module: take the longest name that is a module.
        ours = {target for candidates in named if (target := next((n for n in candidates if n in paths), None))}
        outside = {candidates[-1].split(".")[0] for candidates in named if not within(candidates[-1], "dynexport")}
        found[name] = Module(name, path, tree, room_of(path), frozenset(ours - {name}), frozenset(outside))
    return found


def _named(tree: ast.Module) -> Iterator[tuple[str, ...]]:
    """Yield, for each import, the names that may be a module, longest first."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name,) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"line {node.lineno}: expected absolute imports, found a relative one")
            yield from ((f"{node.module}.{alias.name}", str(node.module)) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("dynexport."):
            yield (node.value,)


def arrows() -> dict[tuple[str, str], set[str]]:
    """Return the imports between each pair of rooms (importing, imported), each as "module -> module"."""
    known, found = modules(), dict[tuple[str, str], set[str]]()
    for module in known.values():
        for target in module.imports:
            pair = module.room, known[target].room
            if all(pair) and pair[0] != pair[1]:
                found.setdefault(pair, set()).add(f"{short(module.name)} -> {short(target)}")
    return found


def short(name: str) -> str:
    """Return a module's name without the package's name."""
    return name.removeprefix("dynexport.")


def circles(graph: Mapping[str, Iterable[str]]) -> list[set[str]]:
    """Return groups of two or more nodes that reach each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph[node]:
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = set(stack[stack.index(node) :])
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(group)

    for node in graph:
        if node not in index:
            visit(node)
    return found


def link(directory: Path) -> None:
    """Make ``directory``/dynexport, a folder of links to the package's files and folders."""
    package = directory / "dynexport"
    package.mkdir(parents=True, exist_ok=True)
    for old in filter(Path.is_symlink, list(package.iterdir())):
        old.unlink()
    folders = [ROOT / folder for folder, name in FOLDERS.items() if name != "dynexport"]
    files = [path for path in (ROOT / "package").iterdir() if path.name != "__pycache__"]
    for path in (*folders, *files):
        (package / path.name).symlink_to(path)


if __name__ == "__main__":
    link(ROOT / "build" / "types")
