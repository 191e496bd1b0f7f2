"""Compare the constants of paths in a graph with the contract."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dynexport.exporter.graph.reading import GraphFile, share, shares, shown_values, unequal
from dynexport.runtime.bundle.contract import Radial
from dynexport.runtime.bundle.manifest import Manifest, PathRouting


def path_differences(graph: GraphFile, manifest: Manifest, contract: Radial) -> Iterator[str]:
    """Yield differences in the choices of every hop, a layer's capacity and the number of a router's scores."""
    name, layers = graph.entry.name, manifest.model.layers
    if graph.entry.takes("forced_paths"):
        for step in range(contract.max_steps):
            row = np.ones(contract.choices(layers), np.bool_)
            if contract.exit:
                row[layers] = step >= contract.min_steps
            found = graph.constant(f"allowed_in_step_{step}")
            if found is None or not np.array_equal(found.reshape(-1), row):
                yield f"{name}: step {step}: choices: expected {shown_values(row)}, found {shown_values(found)}"
    if not graph.entry.share_memory and isinstance(manifest.routing, PathRouting):
        expected_shares = {share(manifest.routing.layer_capacity, "ceil")}
        yield from unequal(f"{name}: share that a layer has room for", expected_shares, {*shares(graph)})
    if graph.entry.takes("forced_choices"):
        sizes = [spec.shape[-1] for spec in graph.entry.outputs if spec.name == "scores"]
        yield from unequal(f"{name}: choices", [contract.choices(layers)], sizes)


__all__ = ["path_differences"]
