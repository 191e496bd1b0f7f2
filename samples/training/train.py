"""Train one recipe, from random weights or from another recipe's weights, and save its checkpoint.

    python samples/training/train.py dense

Every recipe uses the same number of floating-point operations in total. On one machine, equal seeds give equal weights.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

import text
import torch
from cost import TRAINING, forward_flops
from recipes import LAYERS, RECIPES, WINDOW, Dense
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
CHECKPOINTS = HERE / "checkpoints"
TRUNKS = HERE.parents[1] / "build" / "training"

SEED = 0
ROWS = 8
DENSE_STEPS = 1200
# The share of the budget after which the learning rate falls from its constant value to 0. Fine-tuning starts here. A
# distillation from a finished model has the budget of a fine-tuning on top.
DECAY = 0.75
RATE, WARM_UP_STEPS, WEIGHT_DECAY, CLIP = 5e-3, 30, 0.1, 1.0
REPORT_STEPS = 20


def config() -> LlamaConfig:
    """Return the configuration of the models: 1.3 million parameters in many thin layers."""
    return LlamaConfig(
        vocab_size=text.VOCABULARY,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )


def budget() -> int:
    """Return the operations of a whole training, trunk included: those of ``DENSE_STEPS`` dense steps."""
    model = config()
    row = forward_flops(model, WINDOW, [WINDOW] * model.num_hidden_layers)
    return DENSE_STEPS * ROWS * TRAINING * row


def before(recipe: Dense) -> float:
    """Return the operations spent on the weights that a recipe starts from, as a share of the budget."""
    return 1.0 if recipe.teacher else DECAY if recipe.trunk else 0.0


def learning_rate(left: float, step: int) -> float:
    """Return the learning rate when ``left`` of the budget, as a share, remains."""
    return RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * min(1.0, left / (1 - DECAY))


def train(recipe: Dense, model: Any, stream: torch.Tensor, trunk: Path) -> list[dict[str, float]]:
    """Train a model on random windows of ``stream`` until the recipe's budget is used.

    Args:
        recipe: the recipe.
        model: the model to train, in place.
        stream: the training text, int64 [tokens].
        trunk: the file for the weights at the end of the constant rate, if the recipe leaves a trunk.

    Returns:
        The loss curve, one row per ``REPORT_STEPS`` steps.
    """
    # A recipe that starts from another one's weights draws other windows.
    draw = torch.Generator().manual_seed(SEED + bool(recipe.trunk or recipe.teacher))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    spent = before(recipe) * budget()
    end = max(1.0, before(recipe) + 1 - DECAY) * budget()
    curve: list[dict[str, float]] = []
    losses: list[list[float]] = []
    step, started = 0, time.perf_counter()
    while spent < end:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate((end - spent) / budget(), step)
        starts = torch.randint(len(stream) - WINDOW, (ROWS, 1), generator=draw)
        loss = recipe.loss(model, stream[starts + torch.arange(WINDOW)], draw)
        (loss.language + loss.auxiliary).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        earlier, spent, step = spent, spent + ROWS * TRAINING * loss.flops, step + 1
        losses.append([loss.language.item(), loss.auxiliary.item()])
        if step % REPORT_STEPS == 0 or spent >= end:
            language, auxiliary = torch.tensor(losses).mean(0).tolist()
            curve.append({"step": step, "flops": spent, "loss": round(language, 4), "auxiliary": round(auxiliary, 4)})
            print(*curve[-1].values(), f"{time.perf_counter() - started:.0f} s", flush=True)
            losses.clear()
        if recipe.leaves_trunk and earlier < DECAY * budget() <= spent:
            trunk.parent.mkdir(parents=True, exist_ok=True)
            save_file(recipe.tensors(model), trunk)
    return curve


def save(directory: Path, recipe: Dense, model: Any, tokenizer: Tokenizer, curve: list[dict[str, float]]) -> None:
    """Write a Hugging Face checkpoint in float16, with the routing contract and the loss curve."""
    directory.mkdir(parents=True, exist_ok=True)
    half = {name: tensor.to(torch.float16) for name, tensor in recipe.tensors(model).items()}
    save_file(half, directory / "model.safetensors", metadata={"format": "pt"})
    fields = model.config.to_diff_dict() | {"architectures": [type(model).__name__], "dtype": "float16"}
    if recipe.contract is not None:
        fields["dynexport"] = recipe.contract
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    tokenizer.save(str(directory / "tokenizer.json"))
    with (directory / "loss.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(curve[0]))
        writer.writeheader()
        writer.writerows(curve)


def start_of(name: str) -> Path | None:
    """Return the file of the weights that a recipe starts from; None for random weights."""
    recipe = RECIPES[name]
    if recipe.teacher:
        return CHECKPOINTS / recipe.teacher / "model.safetensors"
    if not recipe.trunk:
        return None
    trunk = TRUNKS / f"{recipe.trunk}.safetensors"
    if not trunk.exists():
        sys.exit(f"{name} starts from {recipe.trunk}'s trunk: run `python samples/training/train.py {recipe.trunk}`")
    return trunk


def main() -> None:
    """Train the recipe that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=sorted(RECIPES))
    name: str = parser.parse_args().recipe
    recipe = RECIPES[name]
    torch.set_num_threads(1)  # more threads are slower at these sizes
    torch.manual_seed(SEED)
    tokenizer = text.tokenizer()
    model = LlamaForCausalLM._from_config(config(), attn_implementation="sdpa")
    recipe.prepare(model)
    start = start_of(name)
    if start is not None:
        model.load_state_dict(load_file(start), strict=False)
    recipe.begin(model)
    curve = train(recipe, model, text.tokens(tokenizer, held_out=False), TRUNKS / f"{name}.safetensors")
    save(CHECKPOINTS / name, recipe, model, tokenizer, curve)


if __name__ == "__main__":
    main()
