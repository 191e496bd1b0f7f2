"""Write the tables of docs/bundle.md from the manifest's models: `python samples/docs_bundle.py`."""

from __future__ import annotations

import re
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docs_families import DOCS, markdown, with_table
from pydantic import BaseModel

from dynexport.runtime.bundle.contract import AnyContract
from dynexport.runtime.bundle.manifest import Manifest

PAGE = DOCS / "bundle.md"
_NAMES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "NoneType": "null"}
# Contracts have their own page, and a runtime does not need them.
_CONTRACTS = typing.get_args(AnyContract)


def tables() -> str:
    """Return a table for every model in the manifest, parents before the models of their fields."""
    return "\n".join(_section(model) for model in _models(Manifest, set()))


def _models(model: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[type[BaseModel]]:
    if model in seen or model in _CONTRACTS:
        return
    seen.add(model)
    yield model
    for field in model.model_fields.values():
        for part in _parts(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _models(part, seen)


def _parts(annotation: Any) -> Iterator[Any]:
    """Yield an annotation and the types inside it."""
    yield annotation
    for argument in typing.get_args(annotation):
        yield from _parts(argument)


def _section(model: type[BaseModel]) -> str:
    """Return a model's description and its fields, one per row."""
    summary, texts = _docstring(model)
    if missing := set(model.model_fields) - set(texts):
        raise ValueError(f"{model.__name__}: expected a text for every field in its docstring, lacks {min(missing)}")
    rows = [[f"`{name}`", _type(field.annotation), texts[name]] for name, field in model.model_fields.items()]
    return f"### {model.__name__}\n\n{summary}\n\n{markdown(['Field', 'Type', 'Meaning'], rows)}"


def _docstring(model: type[BaseModel]) -> tuple[str, dict[str, str]]:
    """Return the text before a docstring's attributes, and the text of each attribute."""
    summary, _, attributes = (model.__doc__ or "").partition("Attributes:\n")
    found = re.split(r"^(\w+): ", textwrap.dedent(attributes), flags=re.MULTILINE)[1:]
    texts = dict(zip(found[::2], found[1::2], strict=True))
    return _plain(textwrap.dedent(f"    {summary}")), {
        name: _plain(" ".join(text.split())) for name, text in texts.items()
    }


def _plain(text: str) -> str:
    """Return a docstring's text as Markdown."""
    return re.sub(r"\bNone\b", "null", text.replace("``", "`")).strip()


def _type(annotation: Any) -> str:
    """Return the name of a type's JSON form."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f'"{value}"' for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_type, arguments)))
    if origin is tuple:
        return (
            f"list of {_type(arguments[0])}"
            if arguments[-1] is ...
            else f"list of {len(arguments)} {_type(arguments[0])}"
        )
    if origin is dict:
        return f"object of {_type(arguments[1])}"
    if annotation in _CONTRACTS or annotation is Any:
        return "[contract](routing-contract.md)" if annotation in _CONTRACTS else "any"
    name = annotation.__name__
    return f"[{name}](#{name.lower()})" if issubclass(annotation, BaseModel) else _NAMES[name]


def page() -> str:
    """Return the text of docs/bundle.md with the tables of the code."""
    return with_table(PAGE.read_text(), Path(__file__).name, tables())


if __name__ == "__main__":
    PAGE.write_text(page())
