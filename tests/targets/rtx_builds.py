"""Builds the engine of a graph by TensorRT-RTX, with our plugins or without: `rtx_builds.py BUNDLE GRAPH [--plugins]`.

JSON on standard output: how many of the network's layers are plugins, and the engine's bytes, or why there is none.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynexport.plugins import creators, rtx
from dynexport.runtime import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Graph
from dynexport.runtime.engines.tensorrt.network import Log, add_profile, parse
from dynexport.runtime.engines.tensorrt.shapes import profile_shapes


def built(trt: Any, model: Path, graph: Graph, capabilities: Sequence[str] = ("SM89",)) -> tuple[int, int]:
    """How many of the network's layers are plugins, and the engine's bytes.

    Raises:
        DynexportError: when TensorRT cannot build it; it has its first message.
    """
    log = Log(trt)
    builder = trt.Builder(log.logger)
    network, parser = parse(trt, builder, log, model, plugins=False)
    plugins = sum(network.get_layer(i).type == trt.LayerType.PLUGIN_V3 for i in range(network.num_layers))
    config = builder.create_builder_config()
    creators.allow_in_place(trt, config)
    for shapes in profile_shapes(graph):
        add_profile(builder, config, network, shapes)
    config.num_compute_capabilities = len(capabilities)
    for index, name in enumerate(capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    engine = builder.build_serialized_network(network, config)
    del parser
    if engine is None:
        raise DynexportError(log.errors[0])
    return plugins, int(engine.nbytes)


def report(bundle: Path, graph: str, *options: str) -> dict[str, Any]:
    """What this script says, in a process of its own: the parser needs libraries to be loaded in a certain way before
    it takes plugins."""
    ran = subprocess.run([sys.executable, __file__, str(bundle), graph, *options], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def main() -> None:
    path, name, *options = sys.argv[1:]
    bundle = Bundle.open(path)
    graph = next(graph for graph in bundle.manifest.graphs if graph.name == name)
    trt = rtx.load()
    if options == ["--plugins"]:
        creators.register(trt)
    try:
        plugins, size = built(trt, bundle.path / graph.file, graph)
        sys.stdout.write(json.dumps({"plugins": plugins, "bytes": size}))
    except DynexportError as error:
        sys.stdout.write(json.dumps({"error": str(error)}))


if __name__ == "__main__":
    main()
