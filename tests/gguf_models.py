"""Small random GGUF models of every family and quantised type, and the same models as transformers saves them.

The blocks are random integers with plausible scales; their values are what the gguf package makes of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from safetensors.numpy import save_file

from dynexport.exporter.checkpoint import open_checkpoint

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 4, 2, 64, 256, 512, 4, 97
_ROWS = {
    "attn_q": HEADS * HEAD_DIM,
    "attn_k": KV_HEADS * HEAD_DIM,
    "attn_v": KV_HEADS * HEAD_DIM,
    "attn_qkv": (HEADS + 2 * KV_HEADS) * HEAD_DIM,
    "attn_output": HIDDEN,
    "ffn_gate": INTERMEDIATE,
    "ffn_up": INTERMEDIATE,
    "ffn_down": HIDDEN,
}
_PLAIN = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_GEMMA2 = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LLAMA_NORMS = ("attn_norm", "ffn_norm")
# Matrices and norms of a layer.
MODULES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "llama": (_PLAIN, _LLAMA_NORMS),
    "smollm3": (_PLAIN, _LLAMA_NORMS),
    "qwen2": (_PLAIN, _LLAMA_NORMS),
    "qwen3": (_PLAIN, (*_LLAMA_NORMS, "attn_q_norm", "attn_k_norm")),
    "gemma2": (_PLAIN, ("attn_norm", *_GEMMA2)),
    "phi3": (("attn_qkv", "attn_output", "ffn_up", "ffn_down"), _LLAMA_NORMS),
}
Choice = Callable[[str], Kind]


def random_blocks(kind: Kind, rows: int, columns: int, generator: np.random.Generator) -> np.ndarray:
    """Stored bytes uint8 [rows, bytes] of values near zero, spread over about 0.05."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = rows * columns // block
    if kind in (Kind.F32, Kind.F16, Kind.BF16):
        return gguf.quants.quantize(generator.normal(0, 0.05, (rows, columns)).astype(np.float32), kind)
    raw = generator.integers(0, 256, (count, size), dtype=np.uint8)

    def halves(at: int, middle: float) -> np.ndarray:
        values = (middle * generator.uniform(0.7, 1.4, count)).astype(np.float16)
        raw[:, at : at + 2] = values.view(np.uint8).reshape(-1, 2)
        return values.astype(np.float64)

    scale = {Kind.Q4_0: 0.01, Kind.Q5_0: 0.005, Kind.Q8_0: 0.0007, Kind.IQ4_NL: 0.0008}
    if kind in scale:
        halves(0, scale[kind])
    elif kind in (Kind.Q4_1, Kind.Q5_1):
        step = halves(0, 0.01 if kind == Kind.Q4_1 else 0.005)
        least = -step * (7.5 if kind == Kind.Q4_1 else 15.5) * generator.uniform(0.6, 1.4, count)
        raw[:, 2:4] = least.astype(np.float16).view(np.uint8).reshape(-1, 2)
    elif kind in (Kind.Q4_K, Kind.Q5_K):
        halves(0, 0.0003 if kind == Kind.Q4_K else 0.00015)
        halves(2, 0.00225)  # 7.5 or 15 times the scale
        # Scales and minima of 6 bits, above 16, near each other.
        scales, minima = generator.integers(20, 48, (2, count, 8), dtype=np.uint8)
        minima = (scales.astype(np.int16) + generator.integers(-12, 12, (count, 8))).astype(np.uint8)
        raw[:, 4:8] = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
        raw[:, 8:12] = minima[:, :4] | (minima[:, 4:] >> 4 << 6)
        raw[:, 12:16] = (scales[:, 4:] & 15) | (minima[:, 4:] << 4)
    elif kind == Kind.Q2_K:
        halves(80, 0.004)
        halves(82, 0.006)  # 1.5 times the scale
        # Scales and minima of 4 bits, near each other.
        scales = generator.integers(4, 12, (count, 16))
        raw[:, :16] = scales | (scales + generator.integers(-3, 4, (count, 16)) << 4)
    elif kind == Kind.Q3_K:
        halves(108, 0.0007)
    elif kind == Kind.Q6_K:
        halves(208, 0.00004)
    elif kind == Kind.IQ4_XS:
        halves(0, 0.00003)
    elif kind == Kind.MXFP4:
        raw[:, 0] = generator.integers(119, 122, count)
    else:
        raise ValueError(kind)
    return raw.reshape(rows, -1)


def _hugging_face(architecture: str, stored: str, values: np.ndarray) -> np.ndarray:
    """Undo what the conversion to GGUF does to a tensor."""
    if architecture == "gemma2" and stored.endswith("norm"):
        return values - 1
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(stored)
    if architecture in ("llama", "smollm3") and heads:
        shape = values.shape
        return values.reshape(heads, HEAD_DIM // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
    return values


def write_gguf(path: Path, architecture: str, choose: Choice, *, tied: bool = False) -> dict[str, np.ndarray]:
    """Write a model, and return its values under Hugging Face names.

    Args:
        path: the file to write.
        architecture: its ``general.architecture``.
        choose: the type of a matrix by its name in the file.
        tied: whether the file has no head.
    """
    generator = np.random.default_rng(5)
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    names = {**_NAMES, **(_GEMMA2 if architecture == "gemma2" else {})}
    if architecture == "phi3":
        writer.add_rope_dimension_count(HEAD_DIM)
        names["ffn_up"] = "mlp.gate_up_proj"
    tensors: dict[str, np.ndarray] = {}

    def add(prefix: str, module: str, rows: int | None, suffix: str = "weight") -> None:
        name = f"{prefix}{module}.{suffix}"
        ours = f"{prefix.replace('blk.', 'model.layers.')}{names[module]}.{suffix}"
        if rows is None or suffix == "bias":
            length = rows or (HEAD_DIM if module.endswith(("q_norm", "k_norm")) else HIDDEN)
            values = generator.uniform(0.5, 1.5, length).astype(np.float32)
            writer.add_tensor(name, values)
        else:
            kind, columns = choose(name), INTERMEDIATE if module == "ffn_down" else HIDDEN
            raw = random_blocks(kind, rows, columns, generator)
            writer.add_tensor(name, raw, raw_dtype=kind)
            values = gguf.quants.dequantize(raw, kind)
        tensors[ours] = np.ascontiguousarray(_hugging_face(architecture, module, values))

    matrices, norms = MODULES[architecture]
    add("", "token_embd", VOCABULARY)
    add("", "output_norm", None)
    if not tied:
        add("", "output", VOCABULARY)
    for layer in range(LAYERS):
        for module in matrices:
            wide = architecture == "phi3" and module == "ffn_up"
            add(f"blk.{layer}.", module, _ROWS[module] * (1 + wide))
            if architecture == "qwen2" and module in ("attn_q", "attn_k", "attn_v"):
                add(f"blk.{layer}.", module, _ROWS[module], "bias")
        for module in norms:
            add(f"blk.{layer}.", module, None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def save_dequantised(directory: Path, file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Save the values of a GGUF model as a Hugging Face directory, with the config that dynexport reads from it."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(open_checkpoint(file).config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


__all__ = ["HEADS", "KV_HEADS", "MODULES", "random_blocks", "save_dequantised", "write_gguf"]
