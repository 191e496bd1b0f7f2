"""Find out how a transformers model calls its decoder layers, without names of arguments.

Names of arguments, their order, and whether a layer returns a tuple change between families and versions, so this
module measures them. It calls the model's own forward pass twice, with different numbers of rows and tokens, up to the
first decoder layer. An axis that changes with the number of rows is the axis of rows, and one that changes with the
number of tokens is an axis of tokens. The hidden states are the tensor [rows, tokens, hidden]; the KV cache is the
argument of type ``transformers.Cache``. The first layer then runs on PyTorch's meta device, which computes shapes only:
this shows what the layer returns and which norm it begins with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dynexport.exporter.reference.experts import fixed_shapes
from dynexport.exporter.reference.layer_calls import Call, Place
from dynexport.exporter.reference.mpt_bias import bias_by_tokens
from dynexport.exporter.reference.norms import is_norm, noted_calls
from dynexport.runtime.bundle.errors import DynexportError

_TESTED = ">=5.7,<=5.24"


@dataclass(frozen=True)
class _Axes:
    """The axes of a tensor that depend on rows and tokens.

    Attributes:
        per_row: number of entries of axis 0 per row; 0 where axis 0 does not depend on rows.
        queries: axis of the query tokens, counted from the end (-1 is the last); None without one.
        keys: axis of the key tokens, counted from the end; None without one.
    """

    per_row: int
    queries: int | None
    keys: int | None


class DecoderLayers:
    """The decoder layers of a causal language model, and how the model calls them.

    Attributes:
        modules: transformers' modules, in order.
        input_norm: name, within a layer, of the norm that it begins with; None if it begins with another module.
    """

    def __init__(self, model: Any) -> None:
        """Measure how ``model`` calls its layers.

        Args:
            model: a transformers model; its layers may be on the meta device, the modules before them may not.

        Raises:
            DynexportError: when this version of transformers calls layers in an unknown way.
        """
        bias_by_tokens(model)
        self._model = model
        self.modules = find_layers(model)[1]
        longest = min(3, getattr(model.config, "max_position_embeddings", None) or 3)
        sizes = ((3, max(1, longest - 1)), (4, longest))
        first, second = (self._probe(rows, tokens) for rows, tokens in sizes)
        self._axes = self._read_axes(sizes, first.leaves(), second.leaves())
        self._hidden = self._find_hidden(*sizes[0], first.leaves())
        self._cache = self._find_cache(first.leaves())
        self._returns_tuple, self.input_norm = self._run_on_meta(first)

    # Arguments of a layer.

    def hidden(self, call: Call) -> Any:
        """Return the hidden states [rows, tokens, hidden] before a layer."""
        return call.leaves()[self._hidden]

    def mask(self, call: Call) -> Any:
        """Return the attention mask [rows or 1, 1, queries, keys]; None where transformers passes none."""
        return call.leaves()[self._mask_place()]

    def with_mask(self, call: Call, mask: Any) -> Call:
        """Return the call with another attention mask."""
        return call.with_values({self._mask_place(): mask})

    def with_hidden(self, call: Call, hidden: Any) -> Call:
        """Return the call with other hidden states."""
        return call.with_values({self._hidden: hidden})

    def with_cache(self, call: Call, cache: Any) -> Call:
        """Return the call with another KV cache; layers call only its ``update(keys, values, ..)``.

        Raises:
            DynexportError: when the layers of this model take no KV cache.
        """
        if self._cache is None:
            raise self._error("an argument that is a transformers.Cache", "none")
        return call.with_values({self._cache: cache})

    def pick(self, call: Call, row: int, rows: int, queries: Any, keys: Any = None) -> Call:
        """Return the part of a call that belongs to some tokens of one row.

        Each token keeps its original position, so rotary angles, ALiBi biases and window masks do not change.

        Args:
            call: arguments for all rows.
            row: index of the row.
            rows: number of rows in ``call``.
            queries: int64 tensor, indices of the query tokens.
            keys: int64 tensor, indices of the key tokens; None: the same as ``queries``.

        Raises:
            DynexportError: on a tensor whose axes are not known.
        """
        import torch

        keys = queries if keys is None else keys

        def change(place: Place, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if place not in self._axes:
                raise self._error(f"no tensor {_named(place)}", f"one of shape {list(value.shape)}")
            return _pick(value, self._axes[place], row, rows, queries, keys)

        return call.changed(change)

    def join(self, calls: Sequence[Call]) -> Call:
        """Return one call for all rows, joined from calls for one row each.

        A tensor without an axis of rows, such as [tokens], is taken from the first call: layers only pass it to caches.
        """
        import torch

        others = [call.leaves() for call in calls]

        def change(place: Place, value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.ndim < 2:
                return value
            return torch.cat([leaves[place] for leaves in others])

        return calls[0].changed(change)

    # Results of a layer.

    @contextmanager
    def replaced(self, forward: Callable[[int, Call], Any], indices: Iterable[int] | None = None) -> Iterator[None]:
        """Replace layers by ``forward(index, call)``, which returns hidden states, inside the context."""

        def replacement(index: int) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                after = forward(index, Call(args, kwargs))
                return (after, None) if self._returns_tuple else after

            return run

        layers = {index: self.modules[index] for index in (range(len(self.modules)) if indices is None else indices)}
        for index, layer in layers.items():
            layer.forward = replacement(index)
        try:
            yield
        finally:
            for layer in layers.values():
                del layer.forward

    @staticmethod
    def run(layer: Any, call: Call) -> Any:
        """Run a layer with transformers' code and return the hidden states [rows, tokens, hidden] after it."""
        result = type(layer).forward(layer, *call.args, **call.kwargs)
        return result[0] if isinstance(result, tuple) else result

    # Measurement of the calls.

    def _probe(self, rows: int, tokens: int) -> Call:
        """Return the call of the model's first layer."""
        import torch

        class Reached(Exception):
            """Stops the forward pass at the first layer."""

        calls: list[Call] = []

        def stop(index: int, call: Call) -> Any:
            calls.append(call)
            raise Reached

        device = self._model.get_input_embeddings().weight.device
        ids = torch.zeros((rows, tokens), dtype=torch.int64, device=device)
        seen = torch.ones_like(ids)
        # One padding token, as some models pass no mask for rows without padding.
        seen[0, 0] = int(tokens == 1)
        self._returns_tuple = False
        try:
            with torch.no_grad(), self.replaced(stop):
                self._model(ids, attention_mask=seen, use_cache=True)
        except Reached:
            return calls[0]
        raise self._error("a model that calls its decoder layers", "one that does not")

    def _read_axes(
        self, sizes: Sequence[tuple[int, int]], first: dict[Place, Any], second: dict[Place, Any]
    ) -> dict[Place, _Axes]:
        """The axes of every tensor, from calls of two sizes (rows, tokens)."""
        import torch

        axes = {}
        for place, value in first.items():
            if not isinstance(value, torch.Tensor):
                continue
            other = second.get(place)
            if not isinstance(other, torch.Tensor) or value.ndim != other.ndim:
                raise self._error(f"{_named(place)} with {value.ndim} axes in every call", "something else in another")
            found = _axes(sizes, value.shape, other.shape)
            if found is None:
                raise self._error(f"{_named(place)} with at most two axes of tokens", f"shape {list(value.shape)}")
            axes[place] = found
        return axes

    def _find_hidden(self, rows: int, tokens: int, leaves: dict[Place, Any]) -> Place:
        shape = (rows, tokens, self._model.config.hidden_size)
        found = [place for place in self._axes if len(place) == 1 and tuple(leaves[place].shape) == shape]
        if len(found) != 1:
            raise self._error(f"one argument of shape {list(shape)}, hidden states", f"{len(found)}")
        return found[0]

    def _find_cache(self, leaves: dict[Place, Any]) -> Place | None:
        from transformers import Cache

        return next((place for place, value in leaves.items() if isinstance(value, Cache)), None)

    def _mask_place(self) -> Place:
        for place, axes in self._axes.items():
            if axes.queries is not None and axes.keys is not None:
                return place
        raise self._error("an argument of shape [rows, 1, tokens, tokens], the attention mask", "none")

    def _run_on_meta(self, call: Call) -> tuple[bool, str | None]:
        """Return whether the first layer returns a tuple, and the name of its input norm; only shapes are computed."""
        import torch
        from torch.func import functional_call

        def on_meta(_: Place, value: Any) -> Any:
            return value.to("meta") if isinstance(value, torch.Tensor) else value

        layer, call = self.modules[0], call.changed(on_meta)
        if self._cache is not None:
            call = self.with_cache(call, None)
        tensors = {name: value.to("meta") for name, value in (*layer.named_parameters(), *layer.named_buffers())}
        with torch.no_grad(), noted_calls(layer) as calls, fixed_shapes(self._model.config):
            result = functional_call(layer, tensors, call.args, call.kwargs)
        hidden, first = self.hidden(call), calls[0] if calls else None
        if first is None or not any(value is hidden for value in first[1]) or not is_norm(layer, first[0], hidden):
            return isinstance(result, tuple), None
        return isinstance(result, tuple), first[0]

    def _error(self, expected: str, found: str) -> DynexportError:
        name = type(self._model).__name__
        return DynexportError(
            f"the PyTorch reference: decoder layers of {name}: expected {expected}, found {found}; {tested_version()}"
        )


def tested_version() -> str:
    """Return the hint for messages about an unexpected behaviour of the installed transformers."""
    import transformers

    return (
        f"this is transformers {transformers.__version__}: install one that the tests cover, "
        f"pip install 'transformers{_TESTED}'"
    )


def find_layers(model: Any) -> tuple[list[str], list[Any]]:
    """Return names and modules of the decoder layers: the module list of their number, or a model's ``layer_names``.

    Raises:
        DynexportError: when no module list has ``num_hidden_layers`` entries.
    """
    from torch import nn

    named = getattr(model, "layer_names", None)  # our own models with several lists
    if named is not None:
        return named, [model.get_submodule(name) for name in named]
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return [f"{name}.{index}" for index in range(len(module))], list(module)
    raise DynexportError(
        f"{type(model).__name__}: expected a list of {model.config.num_hidden_layers} layers, found none"
    )


def _axes(sizes: Sequence[tuple[int, int]], shape: Sequence[int], other: Sequence[int]) -> _Axes | None:
    """Return the axes of a tensor from its shapes at two sizes (rows, tokens); None if they are ambiguous."""
    (rows, tokens), (_, more_tokens) = sizes
    pairs = list(zip(shape, other, strict=True))
    grown = pairs[0][1] - pairs[0][0] if pairs else 0
    per_row = grown if grown > 0 and grown * rows == pairs[0][0] else 0
    of_tokens = [
        at - len(pairs) for at, pair in enumerate(pairs) if pair == (tokens, more_tokens) and pair[0] != pair[1]
    ]
    if len(of_tokens) > 2:
        return None
    if len(of_tokens) == 2:
        return _Axes(per_row, of_tokens[0], of_tokens[1])
    if of_tokens == [-1] and len(pairs) > 2:  # shared by all queries, such as [rows * heads, 1, keys]
        return _Axes(per_row, None, -1)
    return _Axes(per_row, of_tokens[0] if of_tokens else None, None)


def _pick(value: Any, axes: _Axes, row: int, rows: int, queries: Any, keys: Any) -> Any:
    """Return the part of a tensor for one row and some tokens; an axis 0 of size 1 is shared by all rows."""
    if axes.per_row and value.shape[0] == axes.per_row * rows:
        value = value[row * axes.per_row : (row + 1) * axes.per_row]
    if axes.queries is not None:
        value = value.index_select(axes.queries, queries)
    if axes.keys is not None:
        value = value.index_select(axes.keys, keys)
    return value


def _named(place: Place) -> str:
    """Return a place in a call as text, for messages."""
    return "argument " + ".".join(map(str, place))
