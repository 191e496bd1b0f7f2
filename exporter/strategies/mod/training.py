"""Train Mixture-of-Depths: top-k routing with gradients, and the auxiliary loss of the causal rule.

    add_routers(model, contract)
    with top_k_routing(model, contract) as routes:
        logits = model(ids, use_cache=False).logits
    loss = cross_entropy(...) + weight * auxiliary_loss(routes)
    save_file(contract_tensors(model), "model.safetensors")

The model is a transformers model of any supported family; all rows of a batch have the same length and no padding.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dynexport.exporter.reference.layer_calls import Call
from dynexport.exporter.reference.transformers_layers import DecoderLayers, find_layers
from dynexport.exporter.strategies.mod.reference import pick_chosen, router_input, top_k_count
from dynexport.runtime.bundle.contract import Mod


@dataclass(frozen=True)
class LayerRoutes:
    """The routes of one routed layer for a batch.

    Attributes:
        score: float32 [rows, tokens], the router's r, with gradient.
        logit: float32 [rows, tokens], the input of the causal rule: r or the predictor's output.
        chosen: bool [rows, tokens], true for the k largest r of every row.
    """

    score: Any
    logit: Any
    chosen: Any


def add_routers(model: Any, contract: Mod, *, bias: bool = False, predictor_width: int = 64) -> None:
    """Add a newly initialised router to every routed layer, and a predictor if the contract's rule needs one.

    Args:
        model: a transformers causal language model.
        contract: the contract to train for.
        bias: true adds a bias to routers.
        predictor_width: number of hidden units P of a predictor.
    """
    hidden = model.config.hidden_size
    layers = find_layers(model)[1]
    for index in contract.routed_layers:
        layers[index].mod_router = nn.Linear(hidden, 1, bias=bias)
        if contract.decision.rule == "predictor":
            parts = (
                ("fc1", nn.Linear(hidden, predictor_width)),
                ("activation", nn.SiLU()),
                ("fc2", nn.Linear(predictor_width, 1)),
            )
            layers[index].mod_predictor = nn.Sequential(OrderedDict(parts))


@contextmanager
def top_k_routing(model: Any, contract: Mod) -> Iterator[dict[int, LayerRoutes]]:
    """Make every routed layer of the model's forward pass run the k tokens of each row with the largest r.

    The contract's gate multiplies the layer's contribution, so that the router gets a gradient from the model's loss.

    Yields:
        The routes of the latest forward pass, by layer.
    """
    decoder = DecoderLayers(model)
    routes: dict[int, LayerRoutes] = {}

    def forward(index: int, call: Call) -> Any:
        return _run_top_k(decoder, contract, routes, index, call)

    with decoder.replaced(forward, contract.routed_layers):
        yield routes


def auxiliary_loss(routes: dict[int, LayerRoutes]) -> Any:
    """Return the binary cross-entropy of the causal logit against top-k's choice, mean over layers and tokens.

    It trains ``sigmoid(logit) > 0.5`` to approximate, causally, the choice that top-k makes from the whole row
    (arXiv 2404.02258, section 3.5). A predictor's gradient does not reach the rest of the model.
    """
    losses = [
        nn.functional.binary_cross_entropy_with_logits(layer.logit, layer.chosen.float()) for layer in routes.values()
    ]
    return torch.stack(losses).mean()


def contract_tensors(model: Any) -> dict[str, Any]:
    """Return the model's tensors for saving, with routers and predictors under the contract's names.

    Tied tensors appear once, as safetensors requires.
    """
    prefix = find_layers(model)[0][0].removesuffix("0")
    tensors: dict[str, Any] = {}
    stored: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in stored:
            tensors["model.layers." + name.removeprefix(prefix) if ".mod_" in name else name] = tensor
        stored.add(tensor.data_ptr())
    return tensors


def _run_top_k(decoder: DecoderLayers, contract: Mod, routes: dict[int, LayerRoutes], index: int, call: Call) -> Any:
    """Run a layer on the chosen tokens only; return hidden states [rows, tokens, hidden] after it."""
    layer, hidden = decoder.modules[index], decoder.hidden(call)
    x = router_input(contract, decoder, layer, hidden)
    score = layer.mod_router(x)[..., 0].float()
    predicted = contract.decision.rule == "predictor"
    logit = layer.mod_predictor(x.detach())[..., 0].float() if predicted else score
    # Stable: of equal scores the lower position comes first.
    order = score.detach().argsort(dim=1, descending=True, stable=True)
    chosen = order[:, : top_k_count(contract, hidden.shape[1])].sort(dim=1).values
    routes[index] = LayerRoutes(score, logit, torch.zeros_like(score, dtype=torch.bool).scatter(1, chosen, True))
    rows = [pick_chosen(contract, decoder, call, row, len(chosen), places) for row, places in enumerate(chosen)]
    return _combine(contract, hidden, chosen, score, decoder.run(layer, decoder.join(rows)))


def _combine(contract: Mod, hidden: Any, chosen: Any, score: Any, output: Any) -> Any:
    """Return hidden states [rows, tokens, hidden] with the gated layer output for the chosen tokens."""
    index = chosen[..., None].expand(-1, -1, hidden.shape[-1])
    before = hidden.gather(1, index)
    if contract.gate != "none":
        gate = score.gather(1, chosen)[..., None]
        gate = (gate.sigmoid() if contract.gate == "sigmoid" else gate).to(output.dtype)
        output = before + gate * (output - before) if contract.combine == "delta" else gate * output
    return hidden.scatter(1, index, output)
