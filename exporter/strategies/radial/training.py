"""Train a Radial Network: all tokens of a batch in parallel, with gradients to the router.

    add_router(model, contract)
    with radial_routing(model, contract, temperature=1.0) as steps:
        student = model(ids, use_cache=False, output_hidden_states=True)
    loss = distillation_loss(student.logits, teacher.logits, student.hidden_states[-1], teacher.hidden_states[-1])
    loss = loss + weight * expected_depth(steps)
    save_file(contract_tensors(model), "model.safetensors")

The teacher is the sequential model that the pool comes from (arXiv 2404.04900 distills from a trained one).
``order_loss`` initialises the router to run the layers in the teacher's order.

A token runs only the layer that it chose, as in the exported model, so a hop costs about one layer for any pool size.
The choice itself has no gradient. With ``gate: probability`` the router gets one through the contract's gate,
h + p (y - h). With ``gate: none`` the gradient is straight-through: the value is y, as in the contract, and the
gradient is that of h + p (y - h). So p grows where the layer's change lowers the loss compared with keeping h, and the
exit's probability, which keeps h, shrinks. A soft mixture of all layers' outputs would train a different computation
from the one that runs later, and would cost the whole pool per hop. Straight-through gives no information about other
choices; ``temperature`` therefore draws choices from the router's probabilities instead of taking the best.

The model is a transformers model of any supported family; all rows of a batch have the same length and no padding. The
cache policy is "step": with "layer" a token may see several entries of another one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dynexport.exporter.reference.layer_calls import Call
from dynexport.exporter.reference.rows import GONE
from dynexport.exporter.reference.transformers_layers import DecoderLayers, find_layers
from dynexport.exporter.strategies.radial.reference_choices import router_epsilon
from dynexport.exporter.strategies.radial.reference_entries import ShownEntries
from dynexport.runtime.bundle.contract import Radial
from dynexport.runtime.bundle.errors import DynexportError


@dataclass(frozen=True)
class Step:
    """The choices of a batch in one hop.

    Attributes:
        choice: int64 [rows, tokens]: a layer; the number of layers for an exit; -1 after the exit or without an allowed
            choice.
        scores: float32 [rows, tokens, choices], with gradient; minus infinity for a choice that is not allowed;
            undefined where ``choice`` is -1.
        stays: float32 [rows, tokens], with gradient: the probability of all choices but the exit.
    """

    choice: Any
    scores: Any
    stays: Any


def add_router(model: Any, contract: Radial) -> None:
    """Add a newly initialised router to a model, or one router per hop.

    Args:
        model: a transformers causal language model.
        contract: the contract to train for.
    """
    decoder = DecoderLayers(model)
    layers, hidden, epsilon = decoder.modules, model.config.hidden_size, router_epsilon(decoder)

    def router() -> Any:
        parts = (
            ("norm", nn.RMSNorm(hidden, eps=epsilon)),
            ("fc1", nn.Linear(hidden, contract.router.hidden)),
            ("activation", nn.SiLU()),
            ("fc2", nn.Linear(contract.router.hidden, contract.choices(len(layers)))),
        )
        return nn.Sequential(OrderedDict(parts))

    model.base_model.radial_router = (
        router() if contract.router.shared else nn.ModuleList(router() for _ in range(contract.max_steps))
    )


@contextmanager
def radial_routing(
    model: Any, contract: Radial, *, forced: Any = None, temperature: float = 0.0
) -> Iterator[list[Step]]:
    """Make the model's forward pass run every token along its path.

    Args:
        model: a transformers causal language model with the router of ``add_router``.
        contract: the contract to train for.
        forced: int64 [max_steps, rows, tokens], allowed choices that replace the router's; None uses the router's.
        temperature: 0 takes the best choice, as in the contract; else it is drawn from softmax(scores / temperature).

    Yields:
        The choices in each hop of the latest forward pass.

    Raises:
        DynexportError: for a cache policy other than "step", gradient checkpointing, or forced choices that are not
            allowed.
    """
    if contract.cache_policy != "step":
        raise DynexportError(f"radial training: expected cache_policy step, found {contract.cache_policy}")
    layers = find_layers(model)[1]
    # The backward pass would run the last layer again, and all hops with it.
    if any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
        raise DynexportError("radial training: expected a model without gradient checkpointing, found one with it")
    decoder = DecoderLayers(model)
    routing = _Routing(model, contract, decoder, forced, temperature)
    with decoder.replaced(routing.run_layer):
        yield routing.steps


def expected_depth(steps: list[Step]) -> Any:
    """Return the expected number of layers that a token runs, mean over tokens, as a penalty for the loss.

    A token runs a layer in hop s if it exits in none of the hops up to s: the sum over s of the product over s' <= s of
    (1 - p_exit(s')), along the path that it took.
    """
    inside, depth = torch.ones_like(steps[0].stays), torch.zeros_like(steps[0].stays)
    for step in steps:
        inside = torch.where(step.choice == GONE, 0.0, inside * step.stays)
        depth = depth + inside
    return depth.mean()


def order_loss(steps: list[Step], order: Any) -> Any:
    """Return the cross-entropy of the scores against an order of choices, mean over tokens that have not exited.

    Args:
        steps: the hops of a forward pass in which ``order`` was forced.
        order: int64 [max_steps], such as 0, 1, 2, .. and the exit.
    """
    scores = torch.cat([step.scores[step.choice != GONE] for step in steps])
    target = torch.cat([torch.full_like(step.choice, order[s])[step.choice != GONE] for s, step in enumerate(steps)])
    return nn.functional.cross_entropy(scores, target)


def distillation_loss(
    logits: Any, teacher_logits: Any, hidden: Any, teacher_hidden: Any, *, temperature: float = 1.0, weight: float = 1.0
) -> Any:
    """Return the distillation loss of a student, mean over tokens.

    It is T^2 KL(teacher || student) of softened logits (arXiv 1503.02531, section 2), plus ``weight`` times the squared
    distance of hidden states divided by the teacher's squared norm.

    Args:
        logits: the student's, [rows, tokens, vocabulary].
        teacher_logits: the teacher's, [rows, tokens, vocabulary].
        hidden: the student's, [rows, tokens, hidden].
        teacher_hidden: the teacher's, [rows, tokens, hidden]; both before or both after the final norm.
        temperature: T > 0.
        weight: the weight of the hidden states' distance.
    """
    student, teacher = (torch.log_softmax(x.float().flatten(0, 1) / temperature, -1) for x in (logits, teacher_logits))
    divergence = nn.functional.kl_div(student, teacher.detach(), log_target=True, reduction="batchmean")
    wanted = teacher_hidden.detach().float()
    distance = (hidden.float() - wanted).square().sum(-1) / wanted.square().sum(-1)
    return temperature**2 * divergence + weight * distance.mean()


def contract_tensors(model: Any) -> dict[str, Any]:
    """Return the model's tensors for saving, with the router under the contract's names.

    Tied tensors appear once, as safetensors requires.
    """
    own = f"{model.base_model_prefix}.radial_router."
    tensors: dict[str, Any] = {}
    stored: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in stored:
            tensors["model.radial_router." + name.removeprefix(own) if name.startswith(own) else name] = tensor
        stored.add(tensor.data_ptr())
    return tensors


class _Made(Exception):
    """Stops a layer after its keys and values are computed."""


class _OnlyMade(ShownEntries):
    def update(self, keys: Any, values: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        super().update(keys, values)
        raise _Made


@dataclass
class _Tokens:
    """Some tokens of a batch, such as those that chose a layer, padded to the same number in every row.

    Attributes:
        chosen: bool [rows, tokens], true for the tokens.
        index: int64 [rows, most], their positions, ascending, then padding.
        real: bool [rows, most], false for padding.
    """

    chosen: Any
    index: Any
    real: Any

    @classmethod
    def of(cls, chosen: Any) -> _Tokens:
        index = chosen.byte().argsort(dim=1, descending=True, stable=True)[:, : int(chosen.sum(1).max())]
        return cls(chosen, index, chosen.gather(1, index))

    def pick(self, values: Any) -> Any:
        """Return [rows, most, ...] of [rows, tokens, ...]."""
        return torch.stack([row[places] for row, places in zip(values, self.index, strict=True)])

    def put(self, picked: Any, into: Any) -> None:
        """Write [rows, most, ...] back to [rows, tokens, ...], without padding."""
        into[self.chosen] = picked[self.real].to(into.dtype)


class _Routing:
    """The forward pass of a batch: layers record their arguments, and the last one's replacement runs all hops."""

    def __init__(self, model: Any, contract: Radial, decoder: DecoderLayers, forced: Any, temperature: float) -> None:
        self.steps: list[Step] = []
        self._router = model.base_model.radial_router
        self._contract = contract
        self._decoder = decoder
        self._layers = decoder.modules
        self._forced = forced
        self._temperature = temperature
        self._inputs: list[Call] = []

    def run_layer(self, index: int, call: Call) -> Any:
        """Record a layer's arguments; in place of the last layer, run all hops."""
        if index == 0:
            self._inputs.clear()
        self._inputs.append(call)
        hidden = self._decoder.hidden(self._inputs[0])
        return self._run_steps(hidden) if index == len(self._layers) - 1 else hidden

    def _run_steps(self, hidden: Any) -> Any:
        """Run all hops on the embedding and return the final norm's input, [rows, tokens, hidden]."""
        self.steps.clear()
        inside = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        visited = torch.zeros((*hidden.shape[:2], len(self._layers)), dtype=torch.bool, device=hidden.device)
        for number in range(self._contract.max_steps):
            step = self._choose(number, hidden, inside, visited)
            self.steps.append(step)
            inside = (step.choice != GONE) & (step.choice < len(self._layers))
            visited = visited | (step.choice[..., None] == torch.arange(len(self._layers), device=hidden.device))
            if inside.any():
                hidden = self._gated(step, inside, hidden, self._run_chosen(step, inside, hidden))
        return hidden

    def _choose(self, number: int, hidden: Any, inside: Any, visited: Any) -> Step:
        router = self._router if self._contract.router.shared else self._router[number]
        scores = router(hidden.float())
        allowed = torch.ones_like(scores, dtype=torch.bool)
        if not self._contract.allow_reuse:
            allowed[..., : len(self._layers)] = ~visited
        if self._contract.exit:
            allowed[..., -1] = number >= self._contract.min_steps
        asked = inside & allowed.any(-1)
        # Tokens without a choice keep all scores, so that no softmax is over an empty set.
        among = scores.masked_fill(~allowed & asked[..., None], -torch.inf)
        choice = self._pick_choice(number, among, allowed, asked)
        leaves = torch.softmax(among, -1)[..., -1] if self._contract.exit else torch.zeros_like(among[..., -1])
        return Step(torch.where(asked, choice, GONE), among, 1 - leaves)

    def _pick_choice(self, number: int, among: Any, allowed: Any, asked: Any) -> Any:
        """Return choices int64 [rows, tokens]; undefined where ``asked`` is false."""
        if self._forced is not None:
            choice = self._forced[number]
            legal = (choice >= 0) & allowed.gather(-1, choice.clamp(min=0)[..., None])[..., 0]
            if not legal[asked].all():
                raise DynexportError(f"radial training: step {number}: expected forced choices that are allowed")
            return choice
        if self._temperature:
            probability = torch.softmax(among.detach() / self._temperature, -1)
            return torch.multinomial(probability.flatten(0, 1), 1).view_as(asked)
        return among.argmax(-1)  # the first one on ties

    def _gated(self, step: Step, ran: Any, hidden: Any, y: Any) -> Any:
        """Return hidden states after a hop from those before it and the chosen layers' outputs."""
        probability = torch.softmax(step.scores, -1).gather(-1, step.choice.clamp(min=0)[..., None]).to(y.dtype)
        if self._contract.gate == "probability":
            after = hidden + probability * (y - hidden)
        else:
            after = y + (probability - probability.detach()) * (y - hidden)
        return torch.where(ran[..., None], after, hidden)

    def _run_chosen(self, step: Step, ran: Any, hidden: Any) -> Any:
        """Return the chosen layers' outputs, [rows, tokens, hidden]; h where no layer was chosen."""
        parts = {int(index): _Tokens.of(step.choice == index) for index in step.choice[ran].unique()}
        keys = values = None
        for index, tokens in parts.items():
            made = [part.transpose(1, 2) for part in self._made(index, tokens, hidden)]
            if keys is None:
                keys, values = (part.new_zeros((*hidden.shape[:2], *part.shape[2:])) for part in made)
            for part, into in zip(made, (keys, values), strict=True):
                tokens.put(part, into)
        assert keys is not None and values is not None
        entries = keys.transpose(1, 2), values.transpose(1, 2)
        y = hidden.clone()
        for index, tokens in parts.items():
            tokens.put(self._attend(index, tokens, hidden, ran, entries), y)
        return y

    def _made(self, index: int, tokens: _Tokens, hidden: Any) -> tuple[Any, Any]:
        """Return keys and values of the tokens that chose a layer, [rows, heads, most, head size]."""
        cache, call = _OnlyMade(), self._call(index, tokens, hidden)
        with suppress(_Made):
            self._decoder.run(self._layers[index], self._decoder.with_cache(call, cache))
        return cache.made

    def _attend(self, index: int, tokens: _Tokens, hidden: Any, ran: Any, entries: tuple[Any, Any]) -> Any:
        """Return a layer's output [rows, most, hidden] for its tokens, which attend to the hop's entries."""
        mask = _float_mask(self._decoder.mask(self._inputs[index]), hidden)
        mask = tokens.pick(mask.transpose(1, 2).expand(len(hidden), -1, -1, -1)).transpose(1, 2)
        mask = mask.masked_fill(~ran[:, None, None], torch.finfo(mask.dtype).min)
        call = self._decoder.with_mask(self._call(index, tokens, hidden), mask)
        return self._decoder.run(self._layers[index], self._decoder.with_cache(call, ShownEntries(entries)))

    def _call(self, index: int, tokens: _Tokens, hidden: Any) -> Call:
        """Return a layer's arguments for the tokens that chose it; they attend to all tokens of their rows."""
        given, everyone = self._inputs[index], torch.arange(hidden.shape[1], device=hidden.device)
        rows = [
            self._decoder.pick(given, row, len(hidden), places, everyone) for row, places in enumerate(tokens.index)
        ]
        return self._decoder.with_hidden(self._decoder.join(rows), tokens.pick(hidden))


def _float_mask(mask: Any, hidden: Any) -> Any:
    """Return transformers' mask as a bias for attention scores, [rows or 1, 1, tokens, tokens].

    transformers passes None for a whole causal batch to some attention functions, and bool to others.
    """
    tokens, lowest = hidden.shape[1], torch.finfo(hidden.dtype).min
    if mask is None:
        mask = torch.ones((1, 1, tokens, tokens), dtype=torch.bool, device=hidden.device).tril()
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(~mask, lowest)
    return mask
