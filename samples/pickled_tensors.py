"""Make a directory of safetensors from a model and pickles with more tensors, such as routers that were trained on it.

    python samples/pickled_tensors.py Llama-3.1-8B router.pth -o with-routers
    dynexport convert with-routers -o bundle

dynexport loads no pickle, because a pickle can run code. This step does it once: PyTorch's loader for tensors only
(``weights_only``), which refuses everything else. Files of the model are linked, not copied, where that is possible. A
directory in Meta's layout has params.json in place of config.json, which the new directory gets as its config.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

INDEX = "model.safetensors.index.json"


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a directory of safetensors from a model and pickled tensors.")
    parser.add_argument("model", type=Path, help="directory with config.json or params.json")
    parser.add_argument("pickles", type=Path, nargs="+", help="files of torch.save, such as router.pth")
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory to make")
    arguments = parser.parse_args()
    print(f"{arguments.output}: {combine(arguments.model, arguments.pickles, arguments.output)} tensors")


def combine(model: Path, pickles: list[Path], output: Path) -> int:
    """Write ``output`` and return its number of tensors; a tensor that two files have is an error."""
    output.mkdir(parents=True)
    shards = []
    for number, path in enumerate(sorted(model.glob("*.safetensors"))):
        shards.append(output / f"model-{number}.safetensors")
        link(path, shards[-1])
    for number, path in enumerate(pickles):
        shards.append(output / f"pickled-{number}.safetensors")
        save_file(tensors_of(path), shards[-1])
    for path in model.iterdir():
        if path.is_file() and path.suffix not in {".safetensors", ".pth", ".pt", ".bin"} and path.name != INDEX:
            link(path, output / ("config.json" if path.name == "params.json" else path.name))
    homes: dict[str, str] = {}
    for shard in shards:
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name in homes:
                    raise SystemExit(f"{name}: expected in one file, found in {homes[name]} and {shard.name}")
                homes[name] = shard.name
    (output / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    return len(homes)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a pickle: of its "model", where it is a training's checkpoint."""
    found = torch.load(path, map_location="cpu", weights_only=True)
    found = found["model"] if isinstance(found.get("model"), Mapping) else found
    return {name: tensor.clone().contiguous() for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


def link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk
        shutil.copyfile(source, target)


if __name__ == "__main__":
    main()
