"""The recipes of training: a dense model, and models with dynamic depth for the same number of operations.

A recipe is a class with a contract, its additional modules, and its loss; `RECIPES` names it for `train.py`.
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
# Weight of the loss that teaches a router the causal rule. A predictor's loss touches nothing else and has weight 1.
ROUTER_WEIGHT = 0.1
PREDICTOR_WIDTH = 32
# A prompt of a fine-tune's batch has 1 to this many tokens.
LONGEST_PROMPT = 128
# Of radial networks: a router's inner size, its bias towards what it shall choose at first, the layers that a token
# shall run on average, and the price of a layer, in nats for each that a batch's average is too high.
ROUTER_WIDTH = 32
LEAN = 4.0
TARGET_DEPTH = 6.5
PRICE = 0.02


@dataclass(frozen=True)
class Loss:
    """The losses of one batch.

    Attributes:
        language: mean cross-entropy of the tokens that count, nats, with gradient unless it only is to be reported.
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
        teacher: the recipe whose checkpoint to start from and to imitate; None: none.
        leaves_trunk: whether others start from this one.
    """

    contract: dict[str, Any] | None = None
    trunk: str | None = None
    teacher: str | None = None
    leaves_trunk = True

    def prepare(self, model: Any) -> None:
        """Add the modules that routing needs to a new model; here, none."""

    def begin(self, model: Any) -> None:
        """Look at the model as it starts; here, do nothing."""

    def loss(self, model: Any, ids: torch.Tensor, draw: torch.Generator) -> Loss:
        """Forward pass over ``ids``, int64 [rows, tokens]; ``draw`` decides whatever is random."""
        logits = model(ids, use_cache=False).logits
        ran = [ids.shape[1]] * model.config.num_hidden_layers
        return Loss(_next_token_loss(logits, ids), torch.zeros(()), forward_flops(model.config, ids.shape[1], ran))

    def tensors(self, model: Any) -> dict[str, torch.Tensor]:
        """Return the tensors to save, with the contract's names."""
        return mod_training.contract_tensors(model)


class MixtureOfDepths(Dense):
    """Every other layer runs an eighth of the tokens; the causal rule is learned too (arXiv 2404.02258)."""

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


class RadialNetwork(Dense):
    """At every hop a router sends each token to a layer of the pool, or lets it exit (arXiv 2404.04900)."""

    leaves_trunk = False

    def __init__(self, gate: str, start: Sequence[Sequence[int]]) -> None:
        """``start``: the layers that routers lean towards, step by step; after them, exit."""
        self.contract = {
            "strategy": "radial",
            "max_steps": LAYERS,
            "min_steps": 1,
            "exit": True,
            # Else nothing keeps a router from choosing one layer always, and training the others never.
            "allow_reuse": False,
            # A router of its own can start each step at another layer.
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
    """The pool is a trained model's layers, which go on learning, with the routers, to come near that model's outcome.

    The loss is this distance and the price of depth alone; the language loss is only for the curve.
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
    """Return the price of depth, proportional to the batch's distance from the target; below it, it is negative."""
    depth = torch.stack([_ran(step) for step in steps]).sum(0).float().mean()
    return PRICE * (depth - TARGET_DEPTH) * expected_depth(steps)


def _ran(step: Step) -> torch.Tensor:
    """Return which tokens ran a layer at a hop, bool [rows, tokens]."""
    return (step.choice >= 0) & (step.choice < LAYERS)


def _radial_flops(model: Any, steps: list[Step]) -> int:
    """Return FLOPs of one row's forward pass, mean over rows: layers and routers for the tokens that ran in them."""
    tokens = steps[0].choice.shape[1]
    router = sum(p.numel() for p in model.base_model.radial_router.parameters()) / len(steps)
    asked = sum((step.choice >= 0).float().mean().item() for step in steps)
    rows = torch.stack([_ran(step).sum(1) for step in steps], 1).tolist()
    return sum(forward_flops(model.config, tokens, row, round(router * asked)) for row in rows) // len(rows)


class UnifiedSkip(Dense):
    """The prompt runs every layer, the response the kept ones; only the response is learned (arXiv 2404.06954)."""

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
    """Make ``layers`` run only the first ``prompt`` tokens of every row, within the context."""

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
    """Return the mean cross-entropy of the tokens that follow those at ``start`` and later, in nats."""
    return cross_entropy(logits[:, start:-1].flatten(0, 1), ids[:, start + 1 :].flatten())


RECIPES: dict[str, Dense] = {
    "dense": Dense(),
    "mod": MixtureOfDepths("router"),
    "mod-predictor": MixtureOfDepths("predictor", trunk="mod"),
    "skip-2": UnifiedSkip(2, LAYERS),
    "skip-3": UnifiedSkip(3, LAYERS),
    # Tokens are at once spread over the whole pool, two layers a step: what runs for nobody learns nothing.
    "radial": RadialNetwork("probability", [(step, step + 1) for step in range(0, LAYERS, 2)]),
    # The layers as they are, and in the order that Unified Skip has at 2x.
    "radial-distilled": RadialDistilled("none", [(layer,) for layer in kept_layers("official", 2, LAYERS)]),
}
