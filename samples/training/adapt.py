"""Train a LoRA adapter with which a dense model runs fewer layers: self-distillation on text that it wrote itself.

    python samples/training/adapt.py skip MODEL build/selftext -o build/adapter --order 5 4 17 3 16 25 --kept 27 24
    python samples/training/adapt.py exit MODEL build/selftext -o build/adapter --exits 6
    python samples/training/adapt.py mod MODEL build/selftext -o build/adapter --routed 5 4 17 3 16 25 --capacity 0.5

A stopped run goes on where its last checkpoint stands, with the same batches. Runs on a GPU if there is one.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from objectives import Batch, Depths, Exit, Objective, Skip
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from selftext import Answer, answers

from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.reference.loading import load_pretrained

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATE, WARM_UP, CLIP = 1.5e-3, 6, 1.0
SAVE_SECONDS = 60
STATE = "training.pt"


@dataclass(frozen=True)
class Plan:
    """How an adapter is trained.

    Attributes:
        base: the name of the model.
        rank: rank of the factors.
        first: the first layer that is adapted.
        rows: answers a step, fewer where fewer have prompts of one length.
        steps: steps of the whole training.
        seed: seed of all choices.
        bf16: whether products are in bfloat16; weights and their updates are float32.
    """

    base: str
    rank: int
    first: int
    rows: int
    steps: int
    seed: int
    bf16: bool = False


def adapted(model: Any, plan: Plan, objective: Objective) -> Any:
    """Return a model with a new adapter in the layers from ``plan.first`` on."""
    objective.prepare(model)
    config = LoraConfig(
        base_model_name_or_path=plan.base,
        r=plan.rank,
        lora_alpha=2 * plan.rank,
        target_modules=TARGETS,
        layers_to_transform=list(range(plan.first, model.config.num_hidden_layers)),
        modules_to_save=objective.saved or None,
        task_type="CAUSAL_LM",
    )
    found = get_peft_model(model, config)
    found.peft_config["default"].base_model_name_or_path = plan.base
    return found


class Draw:
    """Draws batches of answers to prompts of one length, the same ones for a seed and a step.

    Args:
        known: the answers.
        plan: the plan.
    """

    def __init__(self, known: Sequence[Answer], plan: Plan) -> None:
        self._by_length: dict[int, list[Answer]] = {}
        for answer in known:
            self._by_length.setdefault(len(answer.prompt), []).append(answer)
        self._known, self._plan = known, plan

    def batch(self, step: int) -> tuple[list[Answer], random.Random]:
        """Return a step's answers, and the source of its other choices."""
        draw = random.Random(f"{self._plan.seed} {step}")
        alike = self._by_length[len(draw.choice(self._known).prompt)]
        return draw.sample(alike, min(self._plan.rows, len(alike))), draw


def rate(step: int, steps: int) -> float:
    """Return the learning rate of a step: a short rise, then half a cosine."""
    return RATE * min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


class Training:
    """A training with its state, which is resumed from a directory.

    Args:
        model: the model with its adapter.
        objective: what it is trained for.
        plan: how.
        output: the directory of the adapter, its curve and the state to go on from.
    """

    def __init__(self, model: Any, objective: Objective, plan: Plan, output: Path) -> None:
        self._model, self._objective, self._plan, self._output = model, objective, plan, output
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
        self.state: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0, "curve": []}
        if (output / STATE).exists():
            found = torch.load(output / STATE, weights_only=True)
            set_peft_model_state_dict(model, found.pop("adapter"))
            self._optimizer.load_state_dict(found.pop("optimizer"))
            self.state = found

    def run(self, draw: Draw, seconds: float) -> None:
        """Train until the plan's steps or the seconds are over; save now and then, and at the end."""
        base = self._model.base_model.model
        head = base.get_output_embeddings().weight.detach()
        begun = saved = time.monotonic()
        while self.state["step"] < self._plan.steps and time.monotonic() - begun < seconds:
            chosen, choices = draw.batch(self.state["step"])
            batch = Batch(chosen, head)
            with torch.autocast(head.device.type, torch.bfloat16, enabled=self._plan.bf16):
                loss, depth = self._objective.loss(base, batch, choices)
            self._update(loss)
            self.state["tokens"] += batch.tokens
            self.state["curve"].append([self.state["step"], self.state["tokens"], depth, round(loss.item(), 4)])
            print(*self.state["curve"][-1], f"{time.monotonic() - begun:.0f} s", flush=True)
            if time.monotonic() - saved > SAVE_SECONDS:
                saved = self._save(saved)
        self._save(saved)

    def _update(self, loss: torch.Tensor) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate(self.state["step"], self._plan.steps)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._parameters, CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.state["step"] += 1

    def _save(self, since: float) -> float:
        """Write the adapter with its contract and curve, and last the state; return the time."""
        now = time.monotonic()
        self.state["seconds"] += now - since
        output, tensors = self._output, get_peft_model_state_dict(self._model, save_embedding_layers=False)
        output.mkdir(parents=True, exist_ok=True)
        self._model.peft_config["default"].save_pretrained(str(output))
        half = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in tensors.items()}
        contract = json.dumps({"dynexport": self._objective.contract}, indent=2) + "\n"
        report = json.dumps({"plan": asdict(self._plan), **self.state}) + "\n"
        whole = {**self.state, "adapter": tensors, "optimizer": self._optimizer.state_dict()}
        _replace(output / "adapter_model.safetensors", lambda path: save_file(half, path))
        _replace(output / "config.json", lambda path: path.write_text(contract))
        _replace(output / "curve.json", lambda path: path.write_text(report))
        _replace(output / STATE, lambda path: torch.save(whole, path))
        return now


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and move it there, so that a stopped run leaves a whole file."""
    part = path.with_name(path.name + ".part")
    write(part)
    part.replace(path)


def arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objective", choices=["skip", "exit", "mod"])
    parser.add_argument("model", help="a directory or a .gguf file")
    parser.add_argument("text", type=Path, help="directory with the text that the model wrote itself (selftext.py)")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--order", type=int, nargs="+", help="skip: layers in the order in which they are left out")
    parser.add_argument("--kept", type=int, nargs="+", default=[27, 24], help="skip: kept layers")
    parser.add_argument("--exits", type=int, nargs="+", default=[6], help="exit: layers before an exit")
    parser.add_argument("--routed", type=int, nargs="+", help="mod: routed layers  [every other one]")
    parser.add_argument("--capacity", type=float, default=0.5, help="mod: share of tokens that a routed layer runs")
    parser.add_argument("--start", type=Path, help="an adapter of the same rank whose factors training begins with")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--first", type=int, default=0, help="the first layer that is adapted")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="multiply in bfloat16 where PyTorch does so by itself")
    how = parser.parse_args()
    if how.objective == "skip" and how.order is None:
        parser.error("skip: expected --order, the layers to leave out (order.py finds them), found none")
    return how


def main() -> None:
    """Train the adapter that the command line describes."""
    how = arguments()
    torch.set_num_threads(how.threads)
    torch.manual_seed(how.seed)
    checkpoint = open_checkpoint(how.model)
    model = load_pretrained(checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")
    model.config._attn_implementation = "sdpa"
    layers = model.config.num_hidden_layers
    objective: Objective
    if how.objective == "skip":
        objective = Skip(layers, how.order, how.kept)
    else:
        routed = how.routed or list(range(1, layers - 1, 2))
        objective = Exit(how.exits) if how.objective == "exit" else Depths(routed, how.capacity)
    plan = Plan(Path(how.model).stem, how.rank, how.first, how.rows, how.steps, how.seed, how.bf16)
    adapter = adapted(model, plan, objective)
    if how.start is not None:
        factors = load_file(how.start / "adapter_model.safetensors")
        set_peft_model_state_dict(adapter, {**get_peft_model_state_dict(adapter), **factors})
    training = Training(adapter, objective, plan, how.output)
    training.run(Draw(list(answers(how.text, held_out=False)), plan), how.seconds)


if __name__ == "__main__":
    main()
