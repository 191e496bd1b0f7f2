"""The training recipes: a dense model, and models with dynamic depth for the same number of operations.

A recipe is a class with a contract, additional modules and a loss; `RECIPES` names it for `train.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from cost import TRAINING, forward_flops
from torch.nn.functional import cross_entropy

from dynexport.exporter.strategies.mod import training as mod_training
from dynexport.exporter.strategies.mod.reference import top_k_count
from dynexport.exporter.strategies.mod.training import add_routers, auxiliary_loss, top_k_routing
from dynexport.exporter.strategies.radial import training as radial_training
from dynexport.exporter.strategies.radial.training import (
    Step,
    add_router,
    distillation_loss,
    expected_depth,
    radial_routing,
)
from dynexport.exporter.strategies.unified_skip import kept_layers
from dynexport.runtime.bundle.contract import Mod, Radial

WINDOW = 256
LAYERS = 12
# Weight of the loss that trains a router's causal rule. A predictor's loss trains only the predictor and has weight 1.
ROUTER_WEIGHT = 0.1
PREDICTOR_WIDTH = 32
# The largest number of prompt tokens in a fine-tuning batch; the smallest is 1.
LONGEST_PROMPT = 128
# Radial Networks: a router's inner size, its initial bias towards the starting layers, the target for the mean number
# of layers per token, and the price of a layer in nats per layer above the target.
ROUTER_WIDTH = 32
LEAN = 4.0
TARGET_DEPTH = 6.5
PRICE = 0.02


@dataclass(frozen=True)
class Loss:
    """The loss of one batch.

    Attributes:
        language: mean cross-entropy of the tokens that count, nats; has a gradient unless it is only reported.
        auxiliary: the weighted routing loss, with gradient; 0 without routers.
        flops: operations of one row's forward pass.
    """

    language: torch.Tensor
    auxiliary: torch.Tensor
    flops: int


class Dense:
    """Every token runs in every layer.

    Attributes:
        contract: the object "dynexport" in ``config.json``, or None.
        trunk: the recipe whose weights at the end of its constant rate are the start; None starts from random weights.
        teacher: the recipe whose checkpoint is the start and the teacher, or None.
        leaves_trunk: true if other recipes start from this one.
    """

    contract: dict[str, Any] | None = None
    trunk: str | None = None
    teacher: str | None = None
    leaves_trunk = True

    def prepare(self, model: Any) -> None:
        """Add the modules that routing needs to a new model; by default none."""

    def begin(self, model: Any) -> None:
        """Prepare the training of a loaded model; by default nothing."""

    def loss(self, model: Any, ids: torch.Tensor, draw: torch.Generator) -> Loss:
        """Return the loss of ``ids``, int64 [rows, tokens]; ``draw`` is the source of randomness."""
        logits = model(ids, use_cache=False).logits
        ran = [ids.shape[1]] * model.config.num_hidden_layers
        return Loss(_next_token_loss(logits, ids), torch.zeros(()), forward_flops(model.config, ids.shape[1], ran))

    def tensors(self, model: Any) -> dict[str, torch.Tensor]:
        """Return the tensors to save, under the contract's names."""
        return mod_training.contract_tensors(model)


class MixtureOfDepths(Dense):
    """Every other layer runs an eighth of the tokens; an auxiliary loss trains the causal rule (arXiv 2404.02258)."""

    def __init__(self, rule: str, trunk: str | None = None) -> None:
        self.trunk, self.leaves_trunk = trunk, trunk is None
        self.contract = {
            "strategy": "mod",
            "routed_layers": [1, 3, 5, 7, 9, 11],
            "capacity": 0.125,
            # A raw score of the layer's input can grow without bound, as its gate multiplies the same hidden states.
            "router_input": "normed",
            "gate": "sigmoid",
            "decision": {"rule": rule},
            # The causal rule runs about an eighth of the tokens, more in some rows than in others.
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


class RadialNetwork(Dense):
    """In every hop a router chooses each token's next layer of the pool, or the exit (arXiv 2404.04900)."""

    leaves_trunk = False

    def __init__(self, gate: str, start: Sequence[Sequence[int]]) -> None:
        """Make the recipe; ``start`` has the layers that each hop's router prefers at first, then comes the exit."""
        self.contract = {
            "strategy": "radial",
            "max_steps": LAYERS,
            "min_steps": 1,
            "exit": True,
            # With reuse, a router could always choose one layer, and the others would get no training.
            "allow_reuse": False,
            # With one router per hop, each hop can start at another layer.
            "router": {"hidden": ROUTER_WIDTH, "shared": False},
            "gate": gate,
            "cache_policy": "step",
        }
        self._radial = Radial.model_validate(self.contract)
        self._start = [*start, *[[LAYERS]] * (LAYERS - len(start))]

    def prepare(self, model: Any) -> None:
        add_router(model, self._radial)
        for choices, router in zip(self._start, model.base_model.radial_router, strict=True):
            router.fc2.bias.data.zero_()
            router.fc2.bias.data[list(choices)] = LEAN

    def tensors(self, model: Any) -> dict[str, torch.Tensor]:
        return radial_training.contract_tensors(model)

    def loss(self, model: Any, ids: torch.Tensor, draw: torch.Generator) -> Loss:
        with radial_routing(model, self._radial) as steps:
            logits = model(ids, use_cache=False).logits
        return Loss(_next_token_loss(logits, ids), _price(steps), _radial_flops(model, steps))


class RadialDistilled(RadialNetwork):
    """The pool is a trained model's layers; layers and routers are trained to match that model's outputs.

    The loss is the distillation loss plus the price of depth; the language loss is only reported.
    """

    teacher = "dense"

    def begin(self, model: Any) -> None:
        self._teacher = copy.deepcopy(model).requires_grad_(False)

    def loss(self, model: Any, ids: torch.Tensor, draw: torch.Generator) -> Loss:
        wanted = self._teacher(ids, use_cache=False, output_hidden_states=True)
        with radial_routing(model, self._radial) as steps:
            found = model(ids, use_cache=False, output_hidden_states=True)
        distance = distillation_loss(found.logits, wanted.logits, found.hidden_states[-1], wanted.hidden_states[-1])
        tokens = ids.shape[1]
        # The teacher runs forward only.
        flops = _radial_flops(model, steps) + forward_flops(model.config, tokens, [tokens] * LAYERS) // TRAINING
        return Loss(_next_token_loss(found.logits, ids).detach(), distance + _price(steps), flops)


def _price(steps: list[Step]) -> torch.Tensor:
    """Return the price of depth, which grows with the batch's depth above the target and is negative below it."""
    depth = torch.stack([_ran(step) for step in steps]).sum(0).float().mean()
    return PRICE * (depth - TARGET_DEPTH) * expected_depth(steps)


def _ran(step: Step) -> torch.Tensor:
    """Return which tokens ran a layer in a hop, bool [rows, tokens]."""
    return (step.choice >= 0) & (step.choice < LAYERS)


def _radial_flops(model: Any, steps: list[Step]) -> int:
    """Return the operations of a row's forward pass, mean over rows: layers and routers for their tokens."""
    tokens = steps[0].choice.shape[1]
    router = sum(p.numel() for p in model.base_model.radial_router.parameters()) / len(steps)
    asked = sum((step.choice >= 0).float().mean().item() for step in steps)
    rows = torch.stack([_ran(step).sum(1) for step in steps], 1).tolist()
    return sum(forward_flops(model.config, tokens, row, round(router * asked)) for row in rows) // len(rows)


class UnifiedSkip(Dense):
    """The prompt runs in every layer, the response in the kept ones; only the response counts (arXiv 2404.06954)."""

    trunk = "dense"
    leaves_trunk = False

    def __init__(self, ratio: float, layers: int) -> None:
        self.contract = {"strategy": "unified-skip", "speedups": [ratio]}
        self._keep = kept_layers("official", ratio, layers)

    def loss(self, model: Any, ids: torch.Tensor, draw: torch.Generator) -> Loss:
        prompt, tokens = int(torch.randint(1, LONGEST_PROMPT + 1, (), generator=draw)), ids.shape[1]
        skipped = [index for index in range(model.config.num_hidden_layers) if index not in self._keep]
        with prompt_only(model.model.layers, skipped, prompt):
            logits = model(ids, use_cache=False).logits
        ran = [tokens if index in self._keep else prompt for index in range(model.config.num_hidden_layers)]
        flops = forward_flops(model.config, tokens, ran)
        return Loss(_next_token_loss(logits, ids, prompt), torch.zeros(()), flops)


@contextmanager
def prompt_only(decoder_layers: Any, skipped: list[int], prompt: int) -> Iterator[None]:
    """Make skipped layers run only the first ``prompt`` tokens of every row; the other hidden states pass unchanged."""

    def of_prompt(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden: Any, *, position_embeddings: Any, **others: Any) -> Any:
            angles = tuple(part[:, :prompt] for part in position_embeddings)
            others |= {"position_ids": None, "position_embeddings": angles}
            return torch.cat([forward(hidden[:, :prompt], **others), hidden[:, prompt:]], dim=1)

        return run

    for index in skipped:
        layer = decoder_layers[index]
        layer.forward = of_prompt(layer.forward)
    try:
        yield
    finally:
        for index in skipped:
            del decoder_layers[index].forward


def _next_token_loss(logits: torch.Tensor, ids: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Return the mean cross-entropy of the next tokens from position ``start`` on, nats."""
    return cross_entropy(logits[:, start:-1].flatten(0, 1), ids[:, start + 1 :].flatten())


RECIPES: dict[str, Dense] = {
    "dense": Dense(),
    "mod": MixtureOfDepths("router"),
    "mod-predictor": MixtureOfDepths("predictor", trunk="mod"),
    "skip-2": UnifiedSkip(2, LAYERS),
    "skip-3": UnifiedSkip(3, LAYERS),
    # Tokens start spread over the whole pool, two layers per hop, because a layer without tokens gets no gradient.
    "radial": RadialNetwork("probability", [(step, step + 1) for step in range(0, LAYERS, 2)]),
    # The teacher's layers, started in the order that unified-skip has at 2x.
    "radial-distilled": RadialDistilled("none", [(layer,) for layer in kept_layers("official", 2, LAYERS)]),
}
