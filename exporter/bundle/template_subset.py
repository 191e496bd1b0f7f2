"""The subset of Jinja that every runtime of a bundle renders (docs/bundle.md, "text_checks.json")."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import nodes


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FILTERS = _words(
    "capitalize count d default first int items join last length list lower map reject rejectattr replace reverse "
    "select selectattr string tojson trim upper"
)
TESTS = _words(
    "!= < == > boolean defined divisibleby eq equalto even false float gt in integer iterable lt mapping ne none "
    "number odd sequence string true undefined"
)
METHODS = _words(
    "capitalize count endswith find get items join keys lower lstrip removeprefix removesuffix replace rstrip split "
    "splitlines startswith strip upper values"
)
FUNCTIONS = _words("dict namespace raise_exception range strftime_now")
LOOP = _words("depth depth0 first index index0 last length nextitem previtem revindex revindex0")
_DICT_METHODS = frozenset(dir(dict))
_RESERVED = _words("caller cycler joiner kwargs lipsum loop self varargs")
_PLAIN = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.Break, nodes.Continue, nodes.NSRef),
    *(nodes.List, nodes.Tuple, nodes.Pair, nodes.Keyword, nodes.Slice, nodes.CondExpr, nodes.Compare, nodes.Operand),
    *(nodes.Not, nodes.And, nodes.Or, nodes.Neg, nodes.Pos, nodes.Concat, nodes.Add, nodes.Sub, nodes.Mul, nodes.Div),
    *(nodes.FloorDiv, nodes.Mod, nodes.Assign),
)


def beyond_subset(template: nodes.Template) -> str | None:
    """Return the first thing in a parsed template that is not of the subset, for a sentence; None if all is.

    The subset is a property of the text; a runtime still refuses what goes wrong while it renders.
    """
    return next((found for node in _walk(template) if (found := _beyond(node)) is not None), None)


def _walk(node: nodes.Node) -> list[nodes.Node]:
    found, waiting = [], [node]
    while waiting:
        found.append(waiting.pop())
        waiting += found[-1].iter_child_nodes()
    return found


def _beyond(node: nodes.Node) -> str | None:
    if isinstance(node, _PLAIN):
        return None
    check = _CHECKS.get(type(node))
    return f"the node {type(node).__name__}" if check is None else check(node)


def _name(node: Any) -> str | None:
    # A loop's own variable may be read, not set.
    return f"the name {node.name}" if node.name in _RESERVED and (node.name != "loop" or node.ctx != "load") else None


def _constant(node: Any) -> str | None:
    value = node.value
    large = isinstance(value, int) and abs(value) >= 1 << 63
    return f"the constant {value!r:.40}" if large or not isinstance(value, str | int | float | None) else None


def _mapping(node: Any) -> str | None:
    keys = [pair.key for pair in node.items if isinstance(pair.key, nodes.Const)]
    return "a key that is no text" if any(not isinstance(key.value, str) for key in keys) else None


def _attribute(node: Any) -> str | None:
    of_loop = isinstance(node.node, nodes.Name) and node.node.name == "loop"
    known = node.attr in LOOP if of_loop else node.attr in METHODS or node.attr not in _DICT_METHODS
    return None if known else f"the attribute {node.attr}"


def _element(node: Any) -> str | None:
    return "a subscript with commas" if isinstance(node.arg, nodes.Tuple) else None


def _call(node: Any) -> str | None:
    callee = node.node
    if isinstance(callee, nodes.ExtensionAttribute):  # {% generation %}
        return None
    if isinstance(callee, nodes.Getattr):
        return None if callee.attr in METHODS else f"the method {callee.attr}"
    return _stars(node) if isinstance(callee, nodes.Name) else "a call of such an expression"


def _filter(node: Any) -> str | None:
    if node.node is None or node.name not in FILTERS:
        return f"the filter {node.name}"
    return _stars(node)


def _test(node: Any) -> str | None:
    return _stars(node) if node.name in TESTS else f"the test {node.name}"


def _stars(node: Any) -> str | None:
    return None if node.dyn_args is None and node.dyn_kwargs is None else "an argument with *"


def _loop(node: Any) -> str | None:
    return "a recursive loop" if node.recursive else None


def _block(node: Any) -> str | None:
    return None if node.filter is None and isinstance(node.target, nodes.Name) else "such a block of set"


def _macro(node: Any) -> str | None:
    return f"the name {node.name}" if node.name in _RESERVED else None


def _generation(node: Any) -> str | None:
    return None if isinstance(node.call.node, nodes.ExtensionAttribute) else "a call block"


def _anything(node: Any) -> str | None:
    return None


_CHECKS: Mapping[type[nodes.Node], Callable[[Any], str | None]] = {
    nodes.Name: _name,
    nodes.Const: _constant,
    nodes.Dict: _mapping,
    nodes.Getattr: _attribute,
    nodes.Getitem: _element,
    nodes.Call: _call,
    nodes.Filter: _filter,
    nodes.Test: _test,
    nodes.For: _loop,
    nodes.AssignBlock: _block,
    nodes.Macro: _macro,
    nodes.CallBlock: _generation,
    nodes.ExtensionAttribute: _anything,
}

__all__ = ["FILTERS", "FUNCTIONS", "LOOP", "METHODS", "TESTS", "beyond_subset"]
