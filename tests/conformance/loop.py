"""Write the conformance cases of looped models: numpy in float64, token by token with caches, nothing of the project.

    python tests/conformance/loop.py

The rules are docs/routing-contract.md's, and the layers are Ouro's or Llama's. Running it again writes the same files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import early_exit as llama
import numpy as np
from early_exit import HERE, HIDDEN, Array, Tensors
from safetensors.numpy import save_file

LAYERS = 3


@dataclass(frozen=True)
class Kind:
    """One case.

    Attributes:
        config: what its config.json has beside the sizes.
        loops: how often the layers run.
        body: first and last of the layers that are repeated.
        norm_between: whether the final norm is applied between two loops.
        threshold: the exit rule's threshold; None: tokens run all loops.
        exited_kv: "compute" or "last".
        bias: of the gate, which decides how early tokens leave.
    """

    config: dict[str, Any]
    loops: int
    body: tuple[int, int] = (0, LAYERS - 1)
    norm_between: bool = True
    threshold: float | None = None
    exited_kv: str = "compute"
    bias: float = 0.0


OURO: dict[str, Any] = {"model_type": "ouro", "architectures": ["OuroForCausalLM"]}
HAZARD: dict[str, Any] = {"rule": "hazard", "threshold": 0.45}
KINDS = {
    "loop-ouro": Kind({**OURO, "total_ut_steps": 2, "early_exit_threshold": 1.0}, 2),
    "loop-body": Kind(
        {"dynexport": {"strategy": "loop", "loops": 2, "body": [1, 1], "norm_between": False}}, 2, (1, 1), False
    ),
    "loop-exit-compute": Kind({**OURO, "total_ut_steps": 4, "early_exit_threshold": 0.6}, 4, threshold=0.6),
    "loop-exit-last": Kind(
        {**OURO, "dynexport": {"strategy": "loop", "loops": 3, "body": [0, 1], "exit": HAZARD, "exited_kv": "last"}},
        3,
        (0, 1),
        threshold=HAZARD["threshold"],
        exited_kv="last",
        bias=-0.5,
    ),
}


def config_of(kind: Kind) -> dict[str, Any]:
    """The config.json of a case."""
    fields = {name: value for name, value in llama.CONFIG.items() if "bias" not in name}
    return fields | {"num_hidden_layers": LAYERS} | kind.config


def is_ouro(kind: Kind) -> bool:
    """Whether its layers are Ouro's."""
    return kind.config.get("model_type") == "ouro"


def tensors_of(kind: Kind) -> Tensors:
    """The weights of a case, float32."""
    random = np.random.default_rng(16)
    found = {
        name: values
        for name, values in llama.tensors().items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < LAYERS
    }
    if is_ouro(kind):
        for layer in range(LAYERS):
            for norm in ("input", "post_attention"):
                name = f"model.layers.{layer}.{norm}_layernorm_2.weight"
                found[name] = random.uniform(0.5, 1.5, HIDDEN).astype(np.float32)
        found["model.early_exit_gate.weight"] = random.normal(0, 0.5, (1, HIDDEN)).astype(np.float32)
        found["model.early_exit_gate.bias"] = np.array([kind.bias], np.float32)
    return found


class Looped(llama.Model):
    """One sequence through a looped model; ``read`` keeps in ``ran`` and ``margins`` what each token did."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(tensors_of(kind))
        self._kind = kind
        self.ran: list[list[bool]] = []
        self.margins: list[float] = []

    def read_looped(self, token: int, position: int) -> Array:
        """Return the logits of a token, float64 [vocabulary]."""
        kind, (first, last) = self._kind, self._kind.body
        hidden = self._weights["model.embed_tokens.weight"][token]
        for layer in range(first):
            hidden = self._layer(layer, hidden, position, layer)
        body, left, passed, total = range(first, last + 1), None, 1.0, 0.0
        slots = [[first + loop * len(body) + place for place in range(len(body))] for loop in range(kind.loops)]
        result, ran = hidden, [True] * first
        for loop in range(kind.loops):
            ran += [left is None] * len(body)
            if left is not None and kind.exited_kv == "last":
                for slot, before in zip(slots[loop], slots[left], strict=True):
                    self._keys[slot].append(self._keys[before][-1])
                    self._values[slot].append(self._values[before][-1])
                continue
            if loop and kind.norm_between:
                hidden = self._norm("norm", hidden)
            for layer, slot in zip(body, slots[loop], strict=True):
                hidden = self._layer(layer, hidden, position, slot)
            if left is None:
                result = hidden
            if kind.threshold is not None and loop < kind.loops - 1:
                gate = self._norm("norm", hidden) @ self._weights["model.early_exit_gate.weight"][0]
                share = 1 / (1 + np.exp(-(gate + self._weights["model.early_exit_gate.bias"][0])))
                total, passed = total + share * passed, passed * (1 - share)
                if left is None:
                    self.margins.append(abs(total - kind.threshold))
                    left = loop if total >= kind.threshold else None
        for layer in range(last + 1, LAYERS):
            result = self._layer(layer, result, position, slots[-1][-1] + layer - last)
        self.ran.append(ran + [True] * (LAYERS - 1 - last))
        return self._weights["lm_head.weight"] @ self._norm("norm", result)

    def _layer(self, layer: int, hidden: Array, position: int, slot: int) -> Array:
        """Ouro's layer, or Llama's, which has no norm after its branches."""
        name = f"layers.{layer}."
        attended = self._attention(layer, self._norm(f"{name}input_layernorm", hidden), position, slot)
        hidden = hidden + self._after(f"{name}input_layernorm_2", attended)
        inner = self._mlp(layer, self._norm(f"{name}post_attention_layernorm", hidden))
        return hidden + self._after(f"{name}post_attention_layernorm_2", inner)

    def _after(self, name: str, branch: Array) -> Array:
        return self._norm(name, branch) if f"model.{name}.weight" in self._weights else branch


def expected(name: str) -> dict[str, Any]:
    """All answers of a case."""
    kind, runs = KINDS[name], []
    for prompt in llama.PROMPTS:
        model = Looped(kind)
        run = llama.generated(list(prompt), model.read_looped)
        if kind.threshold is not None:
            run |= {"routes": model.ran[:-1], "smallest_route_margin": min(model.margins)}
        runs.append(run)
    body = kind.body[1] - kind.body[0] + 1
    after = range(kind.body[1] + 1 + (kind.loops - 1) * body, LAYERS + (kind.loops - 1) * body)
    shallow = [*range(kind.body[1] + 1), *after] if kind.threshold is None else []
    return {"max_length": llama.CONFIG["max_position_embeddings"], "keep": shallow, "runs": runs}


def main() -> None:
    """Write all cases."""
    for name, kind in KINDS.items():
        directory = HERE / name
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(config_of(kind), indent=1) + "\n")
        (directory / "expected.json").write_text(json.dumps(expected(name)) + "\n")
        save_file(tensors_of(kind), directory / "model.safetensors")


if __name__ == "__main__":
    main()
