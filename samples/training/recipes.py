"""What is trained: a dense model, and for the same operations models that do not run every layer for every token.

A recipe is a class with a contract, what it adds to the model, and its loss; `RECIPES` names it for `train.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from cost import forward_flops
from torch.nn.functional import cross_entropy

from dynexport.exporter.reference.mod import top_k_count
from dynexport.exporter.reference.mod_training import add_routers, auxiliary_loss, top_k_routing
from dynexport.exporter.strategies.unified_skip import kept_layers
from dynexport.runtime.contract import Mod

WINDOW = 256
# Weight of the loss that teaches a router the causal rule. A predictor's loss touches nothing else and has weight 1.
ROUTER_WEIGHT = 0.1
PREDICTOR_WIDTH = 32
# A prompt of a fine-tune's batch has 1 to this many tokens.
LONGEST_PROMPT = 128


@dataclass(frozen=True)
class Loss:
    """One batch's outcome.

    Attributes:
        language: mean cross-entropy of the tokens that count, nats, with gradient.
        auxiliary: what routing adds to it, weighted, with gradient; 0 without routers.
        flops: of one row's forward pass.
    """

    language: torch.Tensor
    auxiliary: torch.Tensor
    flops: int


class Dense:
    """Every token in every layer.

    Attributes:
        contract: what ``config.json`` says under "dynexport"; None: nothing.
        trunk: the recipe to start from, where it leaves its constant rate; None: from nothing.
        leaves_trunk: whether others start from this one.
    """

    contract: dict[str, Any] | None = None
    trunk: str | None = None
    leaves_trunk = True

    def prepare(self, model: Any) -> None:
        """Give a new model the modules that routing needs; here, none."""

    def loss(self, model: Any, ids: torch.Tensor, draw: torch.Generator) -> Loss:
        """Forward pass over ``ids``, int64 [rows, tokens]; ``draw`` decides whatever is random."""
        logits = model(ids, use_cache=False).logits
        ran = [ids.shape[1]] * model.config.num_hidden_layers
        return Loss(_next_token_loss(logits, ids), torch.zeros(()), forward_flops(model.config, ids.shape[1], ran))


class MixtureOfDepths(Dense):
    """Every other layer runs an eighth of the tokens; the causal rule is learned beside (arXiv 2404.02258)."""

    def __init__(self, rule: str, trunk: str | None = None) -> None:
        self.trunk, self.leaves_trunk = trunk, trunk is None
        self.contract = {
            "strategy": "mod",
            "routed_layers": [1, 3, 5, 7, 9, 11],
            "capacity": 0.125,
            # A raw score of the layer's own input may grow without bound: it multiplies what it will be computed from.
            "router_input": "normed",
            "gate": "sigmoid",
            "decision": {"rule": rule},
            # The causal rule lets about an eighth through, more in some rows than in others.
            "cache": {"capacity": 0.25, "overflow": "residual"},
        }
        self._mod = Mod.model_validate(self.contract)
        self._weight = 1.0 if rule == "predictor" else ROUTER_WEIGHT

    def prepare(self, model: Any) -> None:
        add_routers(model, self._mod, predictor_width=PREDICTOR_WIDTH)

    def loss(self, model: Any, ids: torch.Tensor, draw: torch.Generator) -> Loss:
        with top_k_routing(model, self._mod) as routes:
            logits = model(ids, use_cache=False).logits
        tokens = ids.shape[1]
        ran = [tokens] * model.config.num_hidden_layers
        for layer in self._mod.routed_layers:
            ran[layer] = top_k_count(self._mod, tokens)
        routers = sum(p.numel() for name, p in model.named_parameters() if ".mod_" in name)
        flops = forward_flops(model.config, tokens, ran, routers)
        return Loss(_next_token_loss(logits, ids), self._weight * auxiliary_loss(routes), flops)


class UnifiedSkip(Dense):
    """The prompt in every layer, the response in the kept ones; only the response is learned (arXiv 2404.06954)."""

    trunk = "dense"
    leaves_trunk = False

    def __init__(self, ratio: float, layers: int) -> None:
        self.contract = {"strategy": "unified-skip", "speedups": [ratio]}
        self._keep = kept_layers("official", ratio, layers)

    def loss(self, model: Any, ids: torch.Tensor, draw: torch.Generator) -> Loss:
        prompt, tokens = int(torch.randint(1, LONGEST_PROMPT + 1, (), generator=draw)), ids.shape[1]
        skipped = [index for index in range(model.config.num_hidden_layers) if index not in self._keep]
        with _prompt_only(model, skipped, prompt):
            logits = model(ids, use_cache=False).logits
        ran = [tokens if index in self._keep else prompt for index in range(model.config.num_hidden_layers)]
        flops = forward_flops(model.config, tokens, ran)
        return Loss(_next_token_loss(logits, ids, prompt), torch.zeros(()), flops)


@contextmanager
def _prompt_only(model: Any, layers: list[int], prompt: int) -> Iterator[None]:
    """Within, ``layers`` run the first ``prompt`` tokens of every row and leave the others as they are."""

    def of_prompt(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden: Any, *, position_embeddings: Any, **others: Any) -> Any:
            angles = tuple(part[:, :prompt] for part in position_embeddings)
            others |= {"position_ids": None, "position_embeddings": angles}
            return torch.cat([forward(hidden[:, :prompt], **others), hidden[:, prompt:]], dim=1)

        return run

    for index in layers:
        layer = model.model.layers[index]
        layer.forward = of_prompt(layer.forward)
    try:
        yield
    finally:
        for index in layers:
            del model.model.layers[index].forward


def _next_token_loss(logits: torch.Tensor, ids: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Mean cross-entropy of what follows the tokens at ``start`` and later, nats."""
    return cross_entropy(logits[:, start:-1].flatten(0, 1), ids[:, start + 1 :].flatten())


LAYERS = 12
RECIPES: dict[str, Dense] = {
    "dense": Dense(),
    "mod": MixtureOfDepths("router"),
    "mod-predictor": MixtureOfDepths("predictor", trunk="mod"),
    "skip-2": UnifiedSkip(2, LAYERS),
    "skip-3": UnifiedSkip(3, LAYERS),
}
