"""The house's rules: who may import whom, how long a file may be, and that strategies keep to their room.

The imports are read by ``samples/house.py`` and not by import-linter, which takes a package for one folder; ours is
four (pyproject.toml, package-dir).
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

import pytest
from house import LAYERS, LEVEL, Module, arrows, circles, modules, short, within

# Further: the one may not import the other. The reference shares no code with what it judges, and serving needs none of
# what converting needs.
APART = (
    ("dynexport.exporter.graph", "dynexport.exporter.reference"),
    ("dynexport.runtime", "torch"),
    ("dynexport.runtime", "transformers"),
    ("dynexport.runtime", "onnxscript"),
    ("dynexport.plugins", "torch"),
)
MOST_ROOMS, MOST_LINES = 8, 350
REASON = "Over 350 lines: "
CONTRACT = "dynexport.runtime.bundle.contract"
# "loop" is a variable of templates there.
JINJA = "dynexport.exporter.bundle.template_subset"


def within_layers() -> Iterator[str]:
    for (importing, imported), places in arrows().items():
        if LEVEL[importing] <= LEVEL[imported]:
            yield from places


def above_nobody() -> Iterator[str]:
    """What `import dynexport` offers is made of the rooms; no room is made of it."""
    for module in modules().values():
        yield from (f"{short(module.name)} -> {name}" for name in module.imports if module.room and not room(name))


def without_circles() -> Iterator[str]:
    """Arrows that lie on a circle of modules, however they are imported."""
    for group in circles({module.name: module.imports for module in modules().values()}):
        yield from (f"{short(a)} -> {short(b)}" for a in group for b in modules()[a].imports & group)


def kept_apart() -> Iterator[str]:
    for importing, imported in APART:
        for module in modules().values():
            if within(module.name, importing):
                names = module.imports | module.outside
                yield from (f"{short(module.name)} -> {short(name)}" for name in names if within(name, imported))


def short_files() -> Iterator[str]:
    for module in modules().values():
        if lines(module) > MOST_LINES and REASON not in (ast.get_docstring(module.tree) or ""):
            yield short(module.name)


def strategies_in_their_room() -> Iterator[str]:
    """Contract classes, names of strategies as values, and roles of graphs, where they are nobody's business."""
    classes = strategies()
    for module in modules().values():
        if module.room == "exporter.strategies" or module.name in (CONTRACT, JINJA):
            continue
        told = set(docstrings(module.tree))
        for node in ast.walk(module.tree):
            found: list[str] = []
            if isinstance(node, ast.ImportFrom) and within(str(node.module), "dynexport"):
                found = [f"class {alias.name}" for alias in node.names if alias.name in classes]
                found += ["a role" for alias in node.names if alias.name == "Role"]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "contract":
                found = [f"class {node.attr}"] * (node.attr in classes)
            elif isinstance(node, ast.Constant) and node.value in classes.values() and node not in told:
                found = [f"name {node.value}"]
            if (isinstance(node, ast.Attribute) and node.attr == "role") or (
                isinstance(node, ast.keyword) and node.arg == "role"
            ):
                found = ["a role"]
            yield from (f"{short(module.name)}: {what}" for what in found)


RULES: dict[str, Callable[[], Iterator[str]]] = {
    rule.__name__: rule
    for rule in (within_layers, above_nobody, without_circles, kept_apart, short_files, strategies_in_their_room)
}


def room(name: str) -> str:
    return modules()[name].room


def lines(module: Module) -> int:
    return len(module.path.read_text(encoding="utf-8").splitlines())


def strategies() -> dict[str, str]:
    """Class -> name of the strategy, of every class of the contract with a field ``strategy``."""
    found = {}
    for kind in modules()[CONTRACT].tree.body:
        for field in kind.body if isinstance(kind, ast.ClassDef) else ():
            match field:
                case ast.AnnAssign(target=ast.Name(id="strategy"), value=ast.Constant(value=str(name))):
                    found[kind.name] = name
    return found


def docstrings(tree: ast.Module) -> Iterator[ast.AST]:
    """Strings that stand by themselves, and pieces of longer ones."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield from node.values


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_is_kept(rule: str) -> None:
    found = sorted(set(RULES[rule]()))
    assert not found, f"{rule}: expected nothing to break it, found\n" + "\n".join(found)


def test_every_room_has_its_layer() -> None:
    rooms = {module.room for module in modules().values()} - {""}
    assert rooms == set().union(*LAYERS)
    assert sum(map(len, LAYERS)) == len(rooms)


def test_runtime_has_few_rooms() -> None:
    rooms = {module.room for module in modules().values() if module.room.startswith("runtime.")}
    assert len(rooms) <= MOST_ROOMS, sorted(rooms)


def test_every_module_stands_in_a_room() -> None:
    """But for those of the package itself, and the names that the two large packages offer."""
    outside = {name for name, module in modules().items() if not module.room and module.path.parent.name != "package"}
    assert outside == {"dynexport.exporter", "dynexport.runtime"}


def test_every_file_says_its_reason() -> None:
    assert not [name for name, module in modules().items() if not ast.get_docstring(module.tree)]


def test_strategies_are_found() -> None:
    """The rule about them would hold of any code if it knew none of their names."""
    assert {
        "Dense": "dense",
        "UnifiedSkip": "unified-skip",
        "Mod": "mod",
        "Radial": "radial",
    }.items() <= strategies().items()


def test_a_circle_is_found() -> None:
    assert circles({"a": ["b"], "b": ["c"], "c": ["b"], "d": ["a", "d"]}) == [{"b", "c"}]


def test_a_strategys_reference_shares_no_code_with_its_graphs() -> None:
    """Of a strategy's folder; its ``strategy.py`` knows both."""
    parts = [m for m in modules().values() if m.room == "exporter.strategies" and m.name.count(".") == 4]
    golden = [m for m in parts if m.path.stem.startswith(("reference", "oracle", "training"))]
    builds = [m for m in parts if m not in golden and m.path.stem not in ("__init__", "strategy")]
    assert golden and builds
    of_golden = ["dynexport.exporter.reference", *(m.name for m in golden)]
    of_builds = ["dynexport.exporter.graph", "dynexport.exporter.lowering", *(m.name for m in builds)]
    for some, others in ((golden, of_builds), (builds, of_golden)):
        for module in some:
            wrong = [name for name in module.imports if any(within(name, other) for other in others)]
            assert not wrong, f"{module.name} imports {wrong[0]}"
