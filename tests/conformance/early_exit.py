"""Write the conformance cases of early exit: numpy in float64, token by token with caches, nothing of the project.

    python tests/conformance/early_exit.py

The rule is docs/routing-contract.md's; the layers are Llama's. Running it again writes the same files.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCABULARY, EXIT = 16, 6, 2, 1, 8, 24, 61, 2
EPSILON, THETA, NEW_TOKENS = 1e-5, 10000.0, 16
PROMPTS = ([10], [3, 1, 4, 1, 5, 9, 2, 6], [60, 7, 7, 0, 33, 12, 50, 21, 8, 44, 2, 19, 5])
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "intermediate_size": INNER,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "rms_norm_eps": EPSILON,
    "rope_theta": THETA,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": None,
    "attention_bias": False,
    "mlp_bias": False,
}
Array = np.ndarray
Tensors = dict[str, Array]


def tensors() -> Tensors:
    """The model's weights, float32."""
    random = np.random.default_rng(14)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        parts = {
            "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
        }
        shapes |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in parts.items()}
    found = {name: random.normal(0, 1.5 / shape[1] ** 0.5, shape) for name, shape in shapes.items()}
    norms = [f"model.layers.{i}.{part}" for i in range(LAYERS) for part in ("input", "post_attention")]
    for name in [*(f"{norm}_layernorm.weight" for norm in norms), "model.norm.weight"]:
        found[name] = random.uniform(0.5, 1.5, HIDDEN)
    return {name: values.astype(np.float32) for name, values in found.items()}


class Model:
    """One sequence: what it has read stands in the caches of the layers that ran."""

    def __init__(self, weights: Tensors) -> None:
        self._weights = {name: values.astype(np.float64) for name, values in weights.items()}
        self._keys: defaultdict[int, list[Array]] = defaultdict(list)
        self._values: defaultdict[int, list[Array]] = defaultdict(list)

    def read(self, token: int, position: int, layers: int) -> Array:
        """Run the first layers for a token, then final norm and head: logits [vocabulary]."""
        hidden = self._weights["model.embed_tokens.weight"][token]
        for layer in range(layers):
            hidden = hidden + self._attention(layer, self._norm(f"layers.{layer}.input_layernorm", hidden), position)
            hidden = hidden + self._mlp(layer, self._norm(f"layers.{layer}.post_attention_layernorm", hidden))
        return self._weights["lm_head.weight"] @ self._norm("norm", hidden)

    def _attention(self, layer: int, hidden: Array, position: int, slot: int | None = None) -> Array:
        """Attend by a layer's weights over the entries of a slot, which is the layer's own if none is given."""
        slot = layer if slot is None else slot
        query, key, value = (
            self._times(f"layers.{layer}.self_attn.{part}_proj", hidden).reshape(-1, HEAD_DIM) for part in "qkv"
        )
        self._keys[slot].append(rotated(key, position))
        self._values[slot].append(value)
        keys = np.repeat(np.stack(self._keys[slot], axis=1), HEADS // KV_HEADS, axis=0)
        values = np.repeat(np.stack(self._values[slot], axis=1), HEADS // KV_HEADS, axis=0)
        scores = np.einsum("hd,htd->ht", rotated(query, position), keys) / HEAD_DIM**0.5
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        return self._times(f"layers.{layer}.self_attn.o_proj", np.einsum("ht,htd->hd", shares, values).reshape(-1))

    def _mlp(self, layer: int, hidden: Array) -> Array:
        gate, up = (self._times(f"layers.{layer}.mlp.{part}_proj", hidden) for part in ("gate", "up"))
        return self._times(f"layers.{layer}.mlp.down_proj", gate / (1 + np.exp(-gate)) * up)

    def _times(self, name: str, hidden: Array) -> Array:
        return self._weights[f"model.{name}.weight"] @ hidden

    def _norm(self, name: str, hidden: Array) -> Array:
        return self._weights[f"model.{name}.weight"] * hidden / np.sqrt((hidden**2).mean() + EPSILON)


def rotated(heads: Array, position: int) -> Array:
    """Rotary embedding of [heads, HEAD_DIM]."""
    half = HEAD_DIM // 2
    angle = position * THETA ** (-np.arange(half) / half)
    a, b = heads[:, :half], heads[:, half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=1)


def answer(weights: Tensors, prompt: list[int], layers_of_prompt: int) -> dict[str, Any]:
    """What the model generates, the margins that it does so by, and the logits after the prompt."""
    model = Model(weights)

    def read(token: int, position: int) -> Array:
        return model.read(token, position, layers_of_prompt if position < len(prompt) else EXIT)

    return generated(prompt, read)


def generated(prompt: list[int], read: Callable[[int, int], Array]) -> dict[str, Any]:
    """The answer of a model that ``read`` gives a token and its position and returns logits of."""
    for position, token in enumerate(prompt):
        logits = read(token, position)
    first, greedy, margins = logits, [], []
    for step in range(NEW_TOKENS):
        second, best = np.partition(logits, -2)[-2:]
        greedy.append(int(logits.argmax()))
        margins.append(round(float(best - second), 6))
        logits = read(greedy[-1], len(prompt) + step)
    return {
        "prompt": prompt,
        "greedy": greedy,
        "logit_margins": margins,
        "last_prompt_logits": [round(float(value), 6) for value in first],
        "routes": None,
        "smallest_route_margin": None,
        "overflow": 0,
    }


def expected(prompt: str) -> dict[str, Any]:
    """All answers of a case: where prompts run in every layer ("full"), or to the exit ("exit")."""
    weights, layers = tensors(), LAYERS if prompt == "full" else EXIT
    runs = [answer(weights, list(ids), layers) for ids in PROMPTS]
    return {"max_length": CONFIG["max_position_embeddings"], "keep": list(range(EXIT)), "runs": runs}


def main() -> None:
    """Write both cases."""
    for prompt in ("full", "exit"):
        directory = HERE / f"early-exit-prompt-{prompt}"
        directory.mkdir(exist_ok=True)
        config = CONFIG | {"dynexport": {"strategy": "early-exit", "exits": [EXIT], "prompt": prompt}}
        (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        (directory / "expected.json").write_text(json.dumps(expected(prompt)) + "\n")
        save_file(tensors(), directory / "model.safetensors")


if __name__ == "__main__":
    main()
