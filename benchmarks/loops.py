"""Write a Huginn model with random weights, whose decoding is memory-bound, to measure what a loop costs.

python benchmarks/loops.py build/loops/model
dynexport convert build/loops/model --loops 8 --max-length 1024 --no-golden -o build/loops/bundle
dynexport bench build/loops/bundle --threads 2 --prompt-tokens 8 --new-tokens 4
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from checkpoints import random_tensors, save_checkpoint

PARTS = {"prelude": 2, "core_block": 4, "coda": 2}


def save_huginn(directory: Path, *, hidden: int, intermediate: int, heads: int, vocabulary: int) -> None:
    """Save the model as a Hugging Face checkpoint, float32, with the published model's numbers of layers."""
    shapes = {"wte": (vocabulary, hidden), "adapter": (hidden, 2 * hidden)}
    layers = [f"{part}.{i}" for part, count in PARTS.items() for i in range(count)]
    for layer in layers:
        shapes |= {
            f"{layer}.attn.Wqkv": (3 * hidden, hidden),
            f"{layer}.attn.proj": (hidden, hidden),
            f"{layer}.mlp.fc": (2 * intermediate, hidden),
            f"{layer}.mlp.proj": (hidden, intermediate),
        }
    tensors = random_tensors({f"transformer.{name}.weight": shape for name, shape in shapes.items()})
    for norm in ("ln_f", *(f"{layer}.norm_{number}" for layer in layers for number in range(1, 5))):
        tensors[f"transformer.{norm}.weight"] = np.ones(hidden, np.float32)
    for layer in layers:
        tensors[f"transformer.{layer}.attn.qk_bias"] = np.zeros((2, 1, heads, hidden // heads), np.float32)
    config = {
        "architectures": ["RavenForCausalLM"],
        "model_type": "huginn_raven",
        "n_embd": hidden,
        "n_heads": heads,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
    }
    save_checkpoint(directory, config, tensors)


def main() -> None:
    """Save the model: 320 M parameters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    save_huginn(parser.parse_args().directory, hidden=1408, intermediate=4736, heads=11, vocabulary=65_536)


if __name__ == "__main__":
    main()
