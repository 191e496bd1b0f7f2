"""Write the conformance cases of Huginn: numpy in float64, token by token with caches, nothing of the project.

    python tests/conformance/huginn.py

The checkpoints have the published layout, which its authors' code reads. Running it again writes the same files.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import early_exit as llama
import numpy as np
from early_exit import HERE, VOCABULARY, Array, Tensors
from safetensors.numpy import save_file

HIDDEN, HEADS, HEAD_DIM, INNER, EPSILON, THETA = 24, 3, 8, 40, 1e-6, 50000.0
PRELUDE, CORE, CODA, LENGTH = 1, 2, 1, 64
CONFIG: dict[str, Any] = {
    "architectures": ["RavenForCausalLM"],
    "model_type": "huginn_raven",
    "n_embd": HIDDEN,
    "n_heads": HEADS,
    "n_layers": PRELUDE + CORE + CODA,
    "n_layers_in_prelude": PRELUDE,
    "n_layers_in_recurrent_block": CORE,
    "n_layers_in_coda": CODA,
    "intermediate_size": INNER,
    "vocab_size": VOCABULARY,
    "padded_vocab_size": VOCABULARY,
    "block_size": LENGTH,
    "norm_eps": EPSILON,
    "rope_base": THETA,
    "mean_recurrence": 2,
    "effective_expected_depth": PRELUDE + 2 * CORE + CODA,
    "tie_embeddings": True,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "init_values": {"std": 0.1},
    "bos_token_id": 1,
    "eos_token_id": None,
}
CHANGE: dict[str, Any] = {
    "strategy": "loop",
    "loops": 4,
    "body": [PRELUDE, PRELUDE + CORE - 1],
    "norm_between": False,
    "norm_after": True,
    "inject": "adapter",
    "exit": {"rule": "change", "threshold": 0.55},
    "exited_kv": "last",
}
CASES: dict[str, dict[str, Any]] = {"loop-huginn": {}, "loop-huginn-change": {"dynexport": CHANGE}}
LAYERS = [
    *(f"prelude.{i}" for i in range(PRELUDE)),
    *(f"core_block.{i}" for i in range(CORE)),
    *(f"coda.{i}" for i in range(CODA)),
]


def tensors() -> Tensors:
    """The weights, float32, with the table of angles that published checkpoints have."""
    random = np.random.default_rng(33)
    shapes = {"wte": (VOCABULARY, HIDDEN), "adapter": (HIDDEN, 2 * HIDDEN)}
    for layer in LAYERS:
        shapes |= {
            f"{layer}.attn.Wqkv": (3 * HIDDEN, HIDDEN),
            f"{layer}.attn.proj": (HIDDEN, HIDDEN),
            f"{layer}.mlp.fc": (2 * INNER, HIDDEN),
            f"{layer}.mlp.proj": (HIDDEN, INNER),
        }
    found = {f"transformer.{name}.weight": random.normal(0, shape[1] ** -0.5, shape) for name, shape in shapes.items()}
    found["transformer.adapter.weight"][:, :HIDDEN] *= 0.5  # states settle, as trained ones do
    for layer in LAYERS:
        found[f"transformer.{layer}.attn.qk_bias"] = random.normal(0, 0.5, (2, 1, HEADS, HEAD_DIM))
    for norm in ("ln_f", *(f"{layer}.norm_{number}" for layer in LAYERS for number in range(1, 5))):
        found[f"transformer.{norm}.weight"] = random.uniform(0.5, 1.5, HIDDEN)
    angles = np.arange(LENGTH)[:, None] * frequencies()
    found["freqs_cis"] = np.stack([np.cos(angles), np.sin(angles)], axis=-1)[None, :, None]
    return {name: values.astype(np.float32) for name, values in found.items()}


def frequencies() -> Array:
    """The rotary frequencies, [HEAD_DIM / 2]."""
    return THETA ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)


class Huginn:
    """One sequence; ``read`` keeps in ``ran`` and ``margins`` what each token did."""

    def __init__(self, weights: Tensors, loops: int, threshold: float | None) -> None:
        self._weights = {name.removeprefix("transformer."): w.astype(np.float64) for name, w in weights.items()}
        self._loops, self._threshold = loops, threshold
        self._entries: defaultdict[tuple[str, int], list[tuple[Array, Array]]] = defaultdict(list)
        self.ran: list[list[bool]] = []
        self.margins: list[float] = []  # the smallest of each token

    def read(self, token: int, position: int) -> Array:
        """Return the logits of a token, float64 [vocabulary]; its state begins as zeros."""
        hidden = self._weights["wte.weight"][token] * HIDDEN**0.5
        for i in range(PRELUDE):
            hidden = self._layer(f"prelude.{i}", 0, hidden, position)
        state, ran, margins = np.zeros(HIDDEN), [], []
        for loop in range(self._loops):
            before, state = state, self._weights["adapter.weight"] @ np.concatenate([state, hidden])
            for i in range(CORE):
                state = self._layer(f"core_block.{i}", loop, state, position)
            ran += [True] * CORE
            if self._threshold is not None and loop < self._loops - 1:
                change = np.linalg.norm(state - before) / np.linalg.norm(state)
                margins.append(abs(change - self._threshold))
                if change < self._threshold:
                    break
        for later in range(loop + 1, self._loops):  # the entries of the last loop serve the later ones
            for i in range(CORE):
                self._entries[f"core_block.{i}", later].append(self._entries[f"core_block.{i}", loop][-1])
            ran += [False] * CORE
        self.margins.append(min(margins, default=1.0))
        hidden = self._norm("ln_f", state)
        for i in range(CODA):
            hidden = self._layer(f"coda.{i}", 0, hidden, position)
        self.ran.append([True] * PRELUDE + ran + [True] * CODA)
        return self._weights["wte.weight"] @ self._norm("ln_f", hidden)

    def _layer(self, name: str, loop: int, hidden: Array, position: int) -> Array:
        attended = self._attention(name, loop, self._norm(f"{name}.norm_1", hidden), position)
        hidden = self._norm(f"{name}.norm_2", hidden + attended)
        gate, up = np.split(self._times(f"{name}.mlp.fc", self._norm(f"{name}.norm_3", hidden)), 2)
        inner = self._times(f"{name}.mlp.proj", gate / (1 + np.exp(-gate)) * up)
        return self._norm(f"{name}.norm_4", hidden + inner)

    def _attention(self, name: str, loop: int, hidden: Array, position: int) -> Array:
        query, key, value = self._times(f"{name}.attn.Wqkv", hidden).reshape(3, HEADS, HEAD_DIM)
        biases = self._weights[f"{name}.attn.qk_bias"][:, 0]
        query, key = (rotated(part + bias, position) for part, bias in zip((query, key), biases, strict=True))
        entries = self._entries[name, loop]
        entries.append((key, value))
        keys, values = (np.stack(part) for part in zip(*entries, strict=True))
        scores = np.einsum("hd,thd->ht", query, keys) / HEAD_DIM**0.5
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        return self._times(f"{name}.attn.proj", np.einsum("ht,thd->hd", shares, values).reshape(-1))

    def _times(self, name: str, hidden: Array) -> Array:
        return self._weights[f"{name}.weight"] @ hidden

    def _norm(self, name: str, hidden: Array) -> Array:
        return self._weights[f"{name}.weight"] * hidden / np.sqrt((hidden**2).mean() + EPSILON)


def rotated(heads: Array, position: int) -> Array:
    """Rotary embedding of [HEADS, HEAD_DIM], of neighbouring channels as complex numbers."""
    turned = (heads[:, ::2] + 1j * heads[:, 1::2]) * np.exp(1j * position * frequencies())
    return np.stack([turned.real, turned.imag], axis=-1).reshape(heads.shape)


def expected(fields: dict[str, Any]) -> dict[str, Any]:
    """All answers of a case."""
    contract, runs = fields.get("dynexport"), []
    loops, threshold = CONFIG["mean_recurrence"], None
    if contract is not None:
        loops, threshold = contract["loops"], contract["exit"]["threshold"]
    for prompt in llama.PROMPTS:
        model = Huginn(tensors(), loops, threshold)
        run = llama.generated(list(prompt), model.read)
        if threshold is not None:
            run |= {"routes": model.ran[:-1], "smallest_route_margin": min(model.margins[:-1])}
        runs.append(run)
    shallow = [*range(PRELUDE + CORE), PRELUDE + loops * CORE] if threshold is None else []
    return {"max_length": LENGTH, "keep": shallow, "runs": runs}


def main() -> None:
    """Write all cases."""
    for name, fields in CASES.items():
        directory = HERE / name
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(CONFIG | fields, indent=1) + "\n")
        (directory / "expected.json").write_text(json.dumps(expected(fields)) + "\n")
        save_file(tensors(), directory / "model.safetensors")


if __name__ == "__main__":
    main()
