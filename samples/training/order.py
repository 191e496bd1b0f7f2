"""Find the layers that a model misses least when they are left out together, one by one.

    python samples/training/order.py MODEL build/selftext --leave-out 10

Every layer is left out of a few answers by itself; then, again and again, the one whose loss adds the least divergence
KL(full model || fewer layers) joins those that are out already. Prompts run in all layers. What is printed last is the
field "order" of a Unified Skip contract, and --order of adapt.py.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from objectives import Batch
from recipes import prompt_only
from selftext import Answer, answers

from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.reference.loading import load_pretrained

# Layers that are tried in every round after the first: those that did least harm by themselves.
TRIED = 12


class Divergence:
    """Measures the divergence of a model without some of its layers, in nats per token.

    Args:
        model: the model.
        known: the answers that are measured.
    """

    def __init__(self, model: Any, known: Sequence[Answer]) -> None:
        head = model.get_output_embeddings().weight.detach()
        self._decoder, self._batches = model.model, [Batch([answer], head) for answer in known]

    def without(self, skipped: Sequence[int]) -> float:
        """Return the mean over all tokens, those of prompts excluded."""
        found = 0.0
        for batch in self._batches:
            with torch.no_grad(), prompt_only(self._decoder.layers, sorted(skipped), batch.prompt - 1):
                states = self._decoder(batch.ids, use_cache=False).last_hidden_state
                found += batch.divergence(states).item() * batch.tokens
        return found / sum(batch.tokens for batch in self._batches)


def least_missed(divergence: Divergence, layers: int, count: int) -> list[int]:
    """Return ``count`` layers in the order in which they are left out, and print what each adds."""
    alone = sorted(range(layers), key=lambda layer: divergence.without([layer]))
    order: list[int] = []
    while len(order) < count:
        tried = [layer for layer in alone[: max(TRIED, count)] if layer not in order]
        least = min((divergence.without([*order, layer]), layer) for layer in tried)
        order.append(least[1])
        print(f"{layers - len(order)} layers: without {order[-1]} too, {least[0]:.4f} nats", flush=True)
    return order


def main() -> None:
    """Print the order of a model's layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory or a .gguf file")
    parser.add_argument("text", type=Path, help="directory with the text that the model wrote itself (selftext.py)")
    parser.add_argument("--leave-out", type=int, default=10)
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    how = parser.parse_args()
    torch.set_num_threads(how.threads)
    model = load_pretrained(open_checkpoint(how.model))
    layers = model.config.num_hidden_layers
    if not 0 < how.leave_out < layers:
        parser.error(f"--leave-out: expected 1..{layers - 1}, found {how.leave_out}")
    known = list(answers(how.text, held_out=False))
    chosen = random.Random(0).sample(known, min(how.answers, len(known)))
    print(*least_missed(Divergence(model, chosen), layers, how.leave_out))


if __name__ == "__main__":
    main()
