"""Builds the engines of bundles by TensorRT-RTX in a process of its own, and reports them: `rtx_builds.py BUNDLE..`.

In JSON on standard output: by bundle and graph either the size of the engine and how many of its layers are plugins, or
why there is none. `--plugins` registers ours, `--graph` takes one graph alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from dynexport.plugins import creators, rtx
from dynexport.runtime import Bundle
from dynexport.runtime.engines.tensorrt.network import Log, add_profile, parse
from dynexport.runtime.engines.tensorrt.shapes import profile_shapes
from dynexport.runtime.manifest import Graph


def built(trt: Any, path: Path, graph: Graph, capabilities: list[str]) -> dict[str, Any]:
    """The engine of a graph: its bytes, its plugins, and the seconds of processor time it took."""
    start, log = time.process_time(), Log(trt)
    builder = trt.Builder(log.logger)
    network, parser = parse(trt, builder, log, path / graph.file, plugins=False)
    plugins = sum(network.get_layer(i).type == trt.LayerType.PLUGIN_V3 for i in range(network.num_layers))
    config = builder.create_builder_config()
    creators.allow_in_place(trt, config)
    for shapes in profile_shapes(graph):
        add_profile(builder, config, network, shapes)
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        name = "SM" + capability.replace(".", "")
        config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    engine = builder.build_serialized_network(network, config)
    del parser
    if engine is None:
        return {"error": log.errors[0]}
    return {"bytes": engine.nbytes, "plugins": plugins, "seconds": time.process_time() - start}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("bundles", nargs="+")
    arguments.add_argument("--plugins", action="store_true")
    arguments.add_argument("--graph")
    arguments.add_argument("--capabilities", default="8.9")
    given = arguments.parse_args()
    trt = rtx.load()
    if given.plugins:
        creators.register(trt)
    report = {}
    for name in given.bundles:
        bundle = Bundle.open(name)
        graphs = [graph for graph in bundle.manifest.graphs if given.graph in (None, graph.name)]
        report[name] = {g.name: built(trt, bundle.path, g, given.capabilities.split(",")) for g in graphs}
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main()
