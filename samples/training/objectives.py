"""What an adapter is trained for: Unified Skip at several ratios, early exits that draft, or Mixture-of-Depths.

Every objective lowers the divergence KL(full || shallower) of the next token, averaged over the tokens of answers: the
full model's choices are those that it made without the adapter.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from recipes import prompt_only
from selftext import Answer
from torch.nn.functional import kl_div, log_softmax

from dynexport.exporter.strategies.mod.training import add_routers, top_k_routing
from dynexport.exporter.strategies.unified_skip import kept_by_order
from dynexport.runtime.bundle.contract import Mod

# Standard deviation of new routers' weights, and the weight of the latest batch in the averages of their scores.
ROUTER_SPREAD, LATEST = 0.01, 0.05


class Objective(Protocol):
    """An adapter's aim.

    Attributes:
        contract: the field "dynexport" of its config.json.
        saved: names of modules that are trained and saved whole, beside the low-rank factors.
    """

    saved: list[str]

    @property
    def contract(self) -> dict[str, Any]: ...

    def prepare(self, model: Any) -> None:
        """Add modules that the model lacks, before the adapter is made."""

    def loss(self, model: Any, batch: Batch, draw: random.Random) -> tuple[torch.Tensor, str]:
        """Return a batch's loss with its gradient, and the name of the depth that was drawn."""


class Batch:
    """Answers to prompts of one length, padded at their ends.

    Args:
        answers: the answers.
        head: the head's weights, [vocab, hidden].
    """

    def __init__(self, answers: Sequence[Answer], head: torch.Tensor) -> None:
        self.prompt = len(answers[0].prompt)
        self._lengths = [len(answer.tokens) for answer in answers]
        self.tokens = sum(self._lengths)
        self.ids = torch.zeros((len(answers), self.prompt + max(self._lengths) - 1), dtype=torch.int64)
        for row, answer in enumerate(answers):
            given = torch.cat([answer.prompt, answer.tokens[:-1]])
            self.ids[row, : len(given)] = given
        self.ids = self.ids.to(head.device)
        self._head = head
        with torch.no_grad():
            wanted = torch.cat([answer.hidden for answer in answers]).to(head)
            self._wanted = log_softmax(wanted @ head.T, -1)

    def divergence(self, states: torch.Tensor) -> torch.Tensor:
        """Return the mean divergence of normed hidden states [rows, tokens, hidden], nats."""
        answers = states[:, self.prompt - 1 :]
        found = torch.cat([answers[row, :length] for row, length in enumerate(self._lengths)])
        return kl_div(log_softmax(found @ self._head.T, -1), self._wanted, reduction="batchmean", log_target=True)


class Skip:
    """Prompts run in all layers, answers in the kept ones, whose number is drawn for every batch.

    Args:
        layers: the model's number of layers.
        order: layers in the order in which they are left out.
        kept: numbers of kept layers; one that stands here twice is drawn twice as often.
    """

    def __init__(self, layers: int, order: Sequence[int], kept: Sequence[int]) -> None:
        self._kept = [kept_by_order(order, layers / count, layers) for count in kept]
        # Rounded down to three digits, so that they are short names of depths and still keep as many layers.
        ratios = [layers * 1000 // count / 1000 for count in sorted(set(kept), reverse=True) if count < layers]
        self.contract = {"strategy": "unified-skip", "speedups": ratios, "order": list(order)}
        self.saved = list[str]()

    def prepare(self, model: Any) -> None:
        """Add nothing."""

    def loss(self, model: Any, batch: Batch, draw: random.Random) -> tuple[torch.Tensor, str]:
        """Return the divergence at a number of kept layers."""
        keep, decoder = draw.choice(self._kept), model.model
        skipped = [index for index in range(len(decoder.layers)) if index not in keep]
        with prompt_only(decoder.layers, skipped, batch.prompt - 1):
            states = decoder(batch.ids, use_cache=False).last_hidden_state
        return batch.divergence(states), str(len(keep))


class Exit:
    """Answers leave after the first layers; full depth stays as it was, as it verifies what an exit drafts.

    Args:
        exits: numbers of layers after which tokens may leave.
    """

    def __init__(self, exits: Sequence[int]) -> None:
        self._exits = sorted(set(exits))
        self.contract, self.saved = {"strategy": "early-exit", "exits": self._exits}, list[str]()

    def prepare(self, model: Any) -> None:
        """Add nothing."""

    def loss(self, model: Any, batch: Batch, draw: random.Random) -> tuple[torch.Tensor, str]:
        """Return the divergence at an exit and at full depth, from one forward pass."""
        after = draw.choice(self._exits)
        found = model.model(batch.ids, use_cache=False, output_hidden_states=True)
        early = model.model.norm(found.hidden_states[after])
        return batch.divergence(early) + batch.divergence(found.last_hidden_state), str(after)


class Depths:
    """Routers of a Mixture-of-Depths choose the tokens of some layers.

    A chosen token gets h + r (layer(h) - h), where the score r begins at 1, so that training starts from the model as
    it is. Training chooses the tokens with the largest r; afterwards a token runs where r is above the mean of the
    smallest r that was chosen in the latest batches (``calibrate`` can choose another threshold).

    Args:
        layers: the routed layers.
        capacity: share of a row's tokens that a routed layer runs.
    """

    def __init__(self, layers: Sequence[int], capacity: float) -> None:
        self._fields: dict[str, Any] = {
            "strategy": "mod",
            "routed_layers": sorted(layers),
            "capacity": capacity,
            "router_input": "normed",
            "gate": "raw",
            "cache": {"capacity": min(1.0, 2 * capacity), "overflow": "residual"},
        }
        self._mod, self.saved = Mod.model_validate(self._fields), ["mod_router"]
        self._bounds: dict[int, float] = {}

    @property
    def contract(self) -> dict[str, Any]:
        """The contract with the thresholds of the scores that were seen."""
        found = {str(layer): round(1 / (1 + math.exp(-bound)), 6) for layer, bound in sorted(self._bounds.items())}
        return {**self._fields, **({"thresholds": found} if found else {})}

    def prepare(self, model: Any) -> None:
        """Add routers whose scores are near 1."""
        add_routers(model, self._mod, bias=True)
        for layer in self._mod.routed_layers:
            router = model.model.layers[layer].mod_router
            torch.nn.init.normal_(router.weight, std=ROUTER_SPREAD)
            torch.nn.init.ones_(router.bias)

    def loss(self, model: Any, batch: Batch, draw: random.Random) -> tuple[torch.Tensor, str]:
        """Return the divergence with top-k routing."""
        with top_k_routing(model, self._mod) as routes:
            states = model.model(batch.ids, use_cache=False).last_hidden_state
        for layer, route in routes.items():
            least = route.score.detach().masked_fill(~route.chosen, math.inf).amin(1).mean().item()
            self._bounds[layer] = self._bounds.get(layer, least) + LATEST * (least - self._bounds.get(layer, least))
        return batch.divergence(states), f"{self._mod.capacity:g}"
