"""The methods whose checkpoints are imported, in readable PyTorch: what their authors' code computes, and its layout.

Written from notes on that code, and sharing nothing with dynexport. Every model is float64 and runs one row at once:
the methods are causal and a token's decision is its own, so that prompts and single steps give the same (MindSkip
decides once, over the prompt). ``stored`` gives the config and the tensors exactly as the method saves them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor
from torch.nn.functional import relu, silu, softmax

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY = 4, 32, 48, 4, 2, 97
CONFIG: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": INNER,
    "max_position_embeddings": 64,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": VOCABULARY,
}
Stored = tuple[dict[str, Any], dict[str, np.ndarray]]


class Llama:
    """A llama without routing; methods override ``layer``.

    Attributes:
        ran: what was decided, by layer and part ("block", "attention" or "mlp"): bool [tokens].
        margins: the distances of all probabilities from their threshold.
    """

    head_dim = HIDDEN // HEADS
    epsilon = 1e-5

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.tensors = {name: torch.from_numpy(value.astype(np.float64)) for name, value in tensors.items()}
        self.ran: dict[tuple[int, str], Tensor] = {}
        self.margins: list[float] = []

    def logits(self, tokens: Sequence[int], prompt: int) -> np.ndarray:
        """Logits [tokens, vocabulary] of a row whose first ``prompt`` tokens were given at once."""
        self.prompt, self.ran, self.margins = prompt, {}, []
        h = self.tensors["model.embed_tokens.weight"][list(tokens)]
        for i in range(LAYERS):
            h = self.layer(i, h)
        return np.asarray((self.norm("model.norm", h) @ self.tensors["lm_head.weight"].T).numpy())

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens, len(prompt))[-1].argmax()))
        return tokens[len(prompt) :]

    def layer(self, i: int, h: Tensor) -> Tensor:
        h = h + self.attention(i, self.norm1(i, h))
        return h + self.mlp(i, self.norm2(i, h))

    def norm1(self, i: int, h: Tensor) -> Tensor:
        return self.norm(f"model.layers.{i}.input_layernorm", h)

    def norm2(self, i: int, h: Tensor) -> Tensor:
        return self.norm(f"model.layers.{i}.post_attention_layernorm", h)

    def attention(self, i: int, x: Tensor, entries: Tensor | None = None) -> Tensor:
        """Attention's output for every token, over the earlier ones that have entries (bool [tokens]; all for None)."""
        name = f"model.layers.{i}.self_attn."
        q, k, v = (self.linear(f"{name}{part}_proj", x).reshape(len(x), -1, self.head_dim) for part in "qkv")
        if name + "q_norm.weight" in self.tensors:
            q, k = self.norm(name + "q_norm", q), self.norm(name + "k_norm", k)
        q, k = self.rotate(q), self.rotate(k)
        k, v = (part.repeat_interleave(HEADS // KV_HEADS, 1) for part in (k, v))
        seen = torch.arange(len(x)) <= torch.arange(len(x))[:, None]
        if entries is not None:
            seen = (seen & entries) | torch.eye(
                len(x), dtype=torch.bool
            )  # one that does not run may see itself: unused
        scores = torch.einsum("qhd,khd->hqk", q, k) / self.head_dim**0.5
        weights = softmax(scores.masked_fill(~seen, -torch.inf), -1)
        return self.linear(name + "o_proj", torch.einsum("hqk,khd->qhd", weights, v).reshape(len(x), -1))

    def mlp(self, i: int, z: Tensor) -> Tensor:
        name = f"model.layers.{i}.mlp."
        return self.linear(
            name + "down_proj", silu(self.linear(name + "gate_proj", z)) * self.linear(name + "up_proj", z)
        )

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary positions of x [tokens, heads, channels]: channels i and i + half together."""
        half = self.head_dim // 2
        a, b = x[..., :half], x[..., half:]
        sin, cos = self.angles(len(x))
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def angles(self, length: int) -> tuple[Tensor, Tensor]:
        half = self.head_dim // 2
        angle = torch.arange(length)[:, None] / CONFIG["rope_theta"] ** (torch.arange(half).double() / half)
        return angle.sin()[:, None], angle.cos()[:, None]

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.tensors[name + ".weight"].T
        return y + self.tensors[name + ".bias"] if name + ".bias" in self.tensors else y

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon) * self.tensors[name + ".weight"]

    def decided(self, i: int, part: str, run: Tensor, probability: Tensor, threshold: float = 0.5) -> Tensor:
        """Record a decision; returns it as a column of numbers [tokens, 1]."""
        self.ran[i, part] = run
        self.margins.append(float((probability - threshold).abs().min()))
        return run[:, None].double()


class FlexiDepth(Llama):
    """FlexiDepth (arXiv 2503.23798): keys and values of all tokens; a skipped token goes through an adapter."""

    routed = (1, 3)
    hard = False

    def layer(self, i: int, h: Tensor) -> Tensor:
        if i not in self.routed:
            return super().layer(i, h)
        x, name = self.norm1(i, h), f"model.layers.{i}."
        inner = torch.tanh(self.norm(name + "router.router_norm", self.linear(name + "router.router_enc", x)))
        w = torch.sigmoid(self.linear(name + "router.router_head", self.linear(name + "router.router_dec", inner)))[
            :, 0
        ]
        run = self.decided(i, "block", w > 0.5, w)
        h = h + run * self.attention(i, x)
        z = self.norm2(i, h)
        adapted = self.linear(
            name + "router_proj.up_proj",
            silu(self.linear(name + "router_proj.gate_proj", z)) * self.linear(name + "router_proj.down_proj", z),
        )
        of_mlp, of_adapter = (run, 1 - run) if self.hard else (run * w[:, None], (1 - run) * (1 - w[:, None]))
        return h + of_mlp * self.mlp(i, z) + of_adapter * adapted

    @classmethod
    def stored(cls, seed: int = 0) -> Stored:
        config = CONFIG | {
            "architectures": ["DDLlamaForCausalLM"],
            "model_type": "ddllama",
            "routing_layers": list(cls.routed),
            "router_reduction_factor": 4,
            "proj_reduction_factor": 6,
        }
        shapes = usual_shapes()
        for i in cls.routed:
            name = f"model.layers.{i}."
            shapes |= {
                name + "router.router_enc.weight": (HIDDEN // 4, HIDDEN),
                name + "router.router_norm.weight": (HIDDEN // 4,),
                name + "router.router_dec.weight": (HIDDEN, HIDDEN // 4),
                name + "router.router_head.weight": (1, HIDDEN),
                name + "router_proj.gate_proj.weight": (INNER // 6, HIDDEN),
                name + "router_proj.down_proj.weight": (INNER // 6, HIDDEN),
                name + "router_proj.up_proj.weight": (HIDDEN, INNER // 6),
            }
        return config, random_tensors(shapes, seed)


class FlexiDepthQwen3(FlexiDepth):
    """The port to Qwen3: norms on queries and keys, and with ``ste_hard`` no factors w and 1 - w."""

    hard = True

    @classmethod
    def stored(cls, seed: int = 0) -> Stored:
        config, tensors = super().stored(seed)
        config |= {"architectures": ["DDQwen3ForCausalLM"], "model_type": "ddqwen3", "head_dim": cls.head_dim}
        config |= {"router_gate_mode": "ste_hard", "use_sliding_window": False, "max_window_layers": LAYERS}
        del config["mlp_bias"], config["pretraining_tp"]
        norms = {
            f"model.layers.{i}.self_attn.{part}_norm.weight": (cls.head_dim,) for i in range(LAYERS) for part in "qk"
        }
        return config, tensors | random_tensors(norms, seed + 1)


class SkipGPT(Llama):
    """SkipGPT (arXiv 2506.04179): attention and MLP decide apart, both on the layer's input; keys and values of all."""

    def layer(self, i: int, h: Tensor) -> Tensor:
        attention, mlp = (self.runs(i, part, h) for part in ("attention", "mlp"))
        h = h + attention * self.attention(i, self.norm1(i, h))
        return h + mlp * self.mlp(i, self.norm2(i, h))

    def runs(self, i: int, part: str, h: Tensor) -> Tensor:
        name = f"model.layers.{i}.router_{part}."
        if name + "hidden_layer.weight" in self.tensors:
            h = relu(self.linear(name + "hidden_layer", h))
        execute, skip = self.linear(name + "weight_predictor", h).T
        return self.decided(i, part, execute >= skip, torch.sigmoid(execute - skip))

    @classmethod
    def stored(cls, seed: int = 0, *, two_layers: bool = False, blocks: bool = False, prefix: str = "") -> Stored:
        """The base model beside the routers; with ``blocks`` as the wrapped model saves itself."""
        tensors = random_tensors(usual_shapes(), seed)
        if blocks:
            tensors = {
                name.replace(f".{name.split('.')[2]}.", f".{name.split('.')[2]}.block.")
                if ".layers." in name
                else name: value
                for name, value in tensors.items()
            }
        shapes: dict[str, tuple[int, ...]] = {}
        for i in range(LAYERS):
            for part in ("attention", "mlp"):
                name = f"{prefix}model.layers.{i}.router_{part}."
                width = HIDDEN // 4 if two_layers else HIDDEN
                shapes |= {name + "weight_predictor.weight": (2, width), name + "weight_predictor.bias": (2,)}
                if two_layers:
                    shapes |= {name + "hidden_layer.weight": (width, HIDDEN), name + "hidden_layer.bias": (width,)}
        return dict(CONFIG, architectures=["LlamaForCausalLM"]), tensors | random_tensors(shapes, seed + 1)

    @classmethod
    def reading(cls, tensors: dict[str, np.ndarray]) -> SkipGPT:
        return cls(
            {name.removeprefix("base_model.model.").replace(".block.", "."): value for name, value in tensors.items()}
        )


class DLLM(Llama):
    """D-LLM: whole blocks of llama 2's own layout, whose first tokens always run; a skipped token leaves no entry."""

    start, keep, width, rank = 2, 2, 16, 2

    def layer(self, i: int, h: Tensor) -> Tensor:
        if i < self.start:
            return super().layer(i, h)
        name = f"layers.{i}.router."
        inner = silu(self.norm(name + "norm", self.linear(name + "linear_1", h)))
        p = softmax(self.linear(name + "linear_2", inner), -1)[:, 1]
        run = (p >= 0.5) | (torch.arange(len(h)) < self.keep)
        mask = self.decided(i, "block", run, p)
        y = h + self.attention(i, self.norm1(i, h), run)
        return mask * (y + self.mlp(i, self.norm2(i, y))) + (1 - mask) * h

    def rotate(self, x: Tensor) -> Tensor:
        """Llama's own code rotates channels 2 i and 2 i + 1 together."""
        a, b = x[..., 0::2], x[..., 1::2]
        sin, cos = self.angles(len(x))
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        super().__init__(tensors)
        own = self.tensors
        for ours, theirs in {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}.items():
            own[ours + ".weight"] = own[theirs + ".weight"]
        for i in range(LAYERS):
            for ours, theirs in {"q": "wq", "k": "wk", "v": "wv", "o": "wo"}.items():
                weight, lora = own[f"layers.{i}.attention.{theirs}.weight"], f"layers.{i}.attention.lora_{ours}.linear_"
                if ours != "o":
                    weight = weight + own[lora + "B.weight"] @ own[lora + "A.weight"]
                own[f"model.layers.{i}.self_attn.{ours}_proj.weight"] = weight
            for ours, theirs in {"gate": "w1", "up": "w3", "down": "w2"}.items():
                own[f"model.layers.{i}.mlp.{ours}_proj.weight"] = own[f"layers.{i}.feed_forward.{theirs}.weight"]
            own[f"model.layers.{i}.input_layernorm.weight"] = own[f"layers.{i}.attention_norm.weight"]
            own[f"model.layers.{i}.post_attention_layernorm.weight"] = own[f"layers.{i}.ffn_norm.weight"]

    @classmethod
    def stored(cls, seed: int = 0) -> Stored:
        config = {
            "dim": HIDDEN,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "n_kv_heads": KV_HEADS,
            "multiple_of": 16,
            "norm_eps": 1e-05,
            "vocab_size": -1,
            "max_seq_len": 64,
            "lora_rank": cls.rank,
            "dynamic_active_target": 0.5,
            "dynamic_start_layer": cls.start,
            "dynamic_router_hdim": cls.width,
            "dynamic_reserve_initials": cls.keep,
        }
        inner = 96  # two thirds of 4 x HIDDEN, to a multiple of 16
        shapes: dict[str, tuple[int, ...]] = {
            "tok_embeddings.weight": (VOCABULARY, HIDDEN),
            "norm.weight": (HIDDEN,),
            "output.weight": (VOCABULARY, HIDDEN),
            "rope.freqs": (cls.head_dim // 2,),
        }
        for i in range(LAYERS):
            name, kv = f"layers.{i}.", KV_HEADS * cls.head_dim
            for part, rows in {"q": HIDDEN, "k": kv, "v": kv}.items():
                shapes |= {
                    f"{name}attention.w{part}.weight": (rows, HIDDEN),
                    f"{name}attention.lora_{part}.linear_A.weight": (cls.rank, HIDDEN),
                    f"{name}attention.lora_{part}.linear_B.weight": (rows, cls.rank),
                }
            shapes |= {
                name + "attention.wo.weight": (HIDDEN, HIDDEN),
                name + "feed_forward.w1.weight": (inner, HIDDEN),
                name + "feed_forward.w2.weight": (HIDDEN, inner),
                name + "feed_forward.w3.weight": (inner, HIDDEN),
                name + "attention_norm.weight": (HIDDEN,),
                name + "ffn_norm.weight": (HIDDEN,),
            }
            if i >= cls.start:
                shapes |= {
                    name + "router.linear_1.weight": (cls.width, HIDDEN),
                    name + "router.linear_1.bias": (cls.width,),
                    name + "router.norm.weight": (cls.width,),
                    name + "router.linear_2.weight": (2, cls.width),
                    name + "router.linear_2.bias": (2,),
                }
        return config, random_tensors(shapes, seed)


class MindSkip(Llama):
    """MindSkip (arXiv 2410.13184): a row's attention runs or not, decided once from the prompt; the MLP always runs."""

    routed, threshold = (1, 2, 3), 0.5

    def layer(self, i: int, h: Tensor) -> Tensor:
        if i not in self.routed:
            return super().layer(i, h)
        x = self.norm1(i, h)
        p = torch.sigmoid(self.linear(f"model.layers.{i}.router", x[: self.prompt].mean(0, keepdim=True)))[:, 0]
        runs = self.decided(i, "attention", p >= self.threshold, p, self.threshold)
        h = h + runs * self.attention(i, x)
        return h + self.mlp(i, self.norm2(i, h))

    @classmethod
    def stored(cls, seed: int = 0, family: str = "llama", field: str = "is_mindskip", *, plain: bool = False) -> Stored:
        config = CONFIG | {
            "model_type": family if plain else f"{family}_mindskip",
            "granularity": "attn_sequence",
            "gradient_scale": 0.0,
            "threshold": cls.threshold,
            field: [i in cls.routed for i in range(LAYERS)],
            "use_cache": False,
        }
        shapes = usual_shapes() | {f"model.layers.{i}.router.weight": (1, HIDDEN) for i in cls.routed}
        if family != "llama":
            del config["attention_bias"], config["mlp_bias"], config["pretraining_tp"]
            config["sliding_window"] = None
        if family == "qwen2":
            config |= {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": LAYERS}
            shapes |= {
                f"model.layers.{i}.self_attn.{part}_proj.bias": (HIDDEN if part == "q" else 16,)
                for i in range(LAYERS)
                for part in "qkv"
            }
        return config, random_tensors(shapes, seed)


class DLO(Llama):
    """DLO (LLaMA-DLO): whole blocks, whose MLP branch is scaled by a number near 1."""

    routed, factor, gap, exattn, rescale = (1, 2), 2.0, 0.5, False, True

    def layer(self, i: int, h: Tensor) -> Tensor:
        if i not in self.routed:
            return super().layer(i, h)
        s = torch.sigmoid(self.linear(f"model.routers.{i}", h))[:, 0]
        mask = self.decided(i, "mlp" if self.exattn else "block", s > 0.5, s)
        scale = (0.5 * self.factor + (s - 0.5) * self.gap)[:, None] if self.rescale else 1.0
        y = h + self.attention(i, self.norm1(i, h), None if self.exattn else s > 0.5)
        skipped = y if self.exattn else h
        return mask * (y + scale * self.mlp(i, self.norm2(i, y))) + (1 - mask) * skipped

    @classmethod
    def stored(cls, seed: int = 0) -> Stored:
        config = CONFIG | {
            "model_type": "llama_dlo_exattn" if cls.exattn else "llama_dlo",
            "is_dlo": [i in cls.routed for i in range(LAYERS)],
            "dlo_capacity": 0.5,
            "dlo_loss_coefficient": 1.0,
            "dlo_loss_type": "cos-global",
            "rescale_hidden_states": cls.rescale,
            "scale_factor": cls.factor,
            "scale_gap": cls.gap,
            "gate_init_method": "zero",
        }
        shapes = usual_shapes() | {f"model.routers.{i}.weight": (1, HIDDEN) for i in cls.routed}
        return config, random_tensors(shapes, seed)


class DLOExAttn(DLO):
    """DLO as its paper trains it: attention runs for every token, and the MLP alone is skipped."""

    exattn = True


def usual_shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of a llama."""
    kv = KV_HEADS * HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for i in range(LAYERS):
        name = f"model.layers.{i}."
        shapes |= {
            name + "input_layernorm.weight": (HIDDEN,),
            name + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            name + "self_attn.k_proj.weight": (kv, HIDDEN),
            name + "self_attn.v_proj.weight": (kv, HIDDEN),
            name + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            name + "post_attention_layernorm.weight": (HIDDEN,),
            name + "mlp.gate_proj.weight": (INNER, HIDDEN),
            name + "mlp.up_proj.weight": (INNER, HIDDEN),
            name + "mlp.down_proj.weight": (HIDDEN, INNER),
        }
    return shapes


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        name: (0.3 * random.standard_normal(shape) + ("norm" in name)).astype(np.float32)
        for name, shape in shapes.items()
    }


def write(directory: Path, stored: Stored) -> Path:
    """Write a checkpoint's directory."""
    config, tensors = stored
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory
