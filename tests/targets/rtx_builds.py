"""Builds the engine of a graph by TensorRT-RTX, with our plugins or without: `rtx_builds.py BUNDLE GRAPH [--plugins]`.

JSON on standard output: how many of the network's layers are plugins, and the engine's bytes, or why there is none.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from dynexport.plugins import creators, rtx
from dynexport.runtime import Bundle
from dynexport.runtime.engines.tensorrt.network import Log, add_profile, parse
from dynexport.runtime.engines.tensorrt.shapes import profile_shapes


def built(trt: Any, bundle: Bundle, name: str) -> dict[str, Any]:
    """For compute capability 8.9."""
    graph = next(graph for graph in bundle.manifest.graphs if graph.name == name)
    log = Log(trt)
    builder = trt.Builder(log.logger)
    network, parser = parse(trt, builder, log, bundle.path / graph.file, plugins=False)
    plugins = sum(network.get_layer(i).type == trt.LayerType.PLUGIN_V3 for i in range(network.num_layers))
    config = builder.create_builder_config()
    creators.allow_in_place(trt, config)
    for shapes in profile_shapes(graph):
        add_profile(builder, config, network, shapes)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    engine = builder.build_serialized_network(network, config)
    del parser
    return {"plugins": plugins} | ({"error": log.errors[0]} if engine is None else {"bytes": engine.nbytes})


def main() -> None:
    path, name, *options = sys.argv[1:]
    trt = rtx.load()
    if options == ["--plugins"]:
        creators.register(trt)
    sys.stdout.write(json.dumps(built(trt, Bundle.open(path), name)))


if __name__ == "__main__":
    main()
