"""GGUF files come out as the Hugging Face model that went in, of every family; damage is told in one line."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from tokenizers import Tokenizer

from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.checkpoint.gguf_file import GgufFile
from dynexport.exporter.checkpoint.gguf_header import read_header
from dynexport.runtime.bundle.errors import DynexportError

Tensors = dict[str, np.ndarray]
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 4, 2, 8, 32, 64, 2, 12

OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LLAMA = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
INNER = {
    "llama": LLAMA,
    "smollm3": LLAMA,
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"},
    "gemma2": {
        **LLAMA,
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    "phi3": {
        "input_layernorm": "attn_norm",
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
}
SHAPES = {
    "model.embed_tokens": (VOCABULARY, HIDDEN),
    "lm_head": (VOCABULARY, HIDDEN),
    "q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "qkv_proj": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
    "o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "gate_proj": (INTERMEDIATE, HIDDEN),
    "up_proj": (INTERMEDIATE, HIDDEN),
    "gate_up_proj": (2 * INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
    "q_norm": (HEAD_DIM,),
    "k_norm": (HEAD_DIM,),
}


def error_of(action: Callable[[], object]) -> str:
    """The message of the DynexportError, which must be one line."""
    with pytest.raises(DynexportError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def make_model(architecture: str) -> tuple[Tensors, dict[str, str]]:
    """Random tensors under Hugging Face names, and their GGUF names."""
    modules = {ours: stored for ours, stored in OUTER.items() if ours != "lm_head" or architecture != "gemma2"}
    for i in range(LAYERS):
        modules |= {f"model.layers.{i}.{ours}": f"blk.{i}.{stored}" for ours, stored in INNER[architecture].items()}
    generator = np.random.default_rng(0)
    tensors, names = {}, {}
    for ours, stored in modules.items():
        shape = SHAPES.get(ours, SHAPES.get(ours.split(".")[-1], (HIDDEN,)))
        kinds = (
            ("weight", "bias")
            if architecture == "qwen2" and ours.endswith(("q_proj", "k_proj", "v_proj"))
            else ("weight",)
        )
        for kind in kinds:
            values = generator.standard_normal(shape if kind == "weight" else shape[:1])
            tensors[f"{ours}.{kind}"] = values.astype(np.float32)
            names[f"{ours}.{kind}"] = f"{stored}.{kind}"
    return tensors, names


def as_stored(architecture: str, name: str, values: np.ndarray) -> np.ndarray:
    """What convert_hf_to_gguf.py does to a tensor."""
    if architecture == "gemma2" and name.endswith("norm.weight"):
        return values + 1
    for part, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
        if architecture in ("llama", "smollm3") and part in name:
            return values.reshape(heads, 2, HEAD_DIM // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    return values


def make_writer(path: Path, architecture: str) -> GGUFWriter:
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    return writer


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model(
    path: Path,
    architecture: str = "llama",
    customise: Callable[[GGUFWriter], None] = lambda writer: None,
    without: tuple[str, ...] = (),
) -> Tensors:
    """Write a tiny model and return its tensors in Hugging Face's layout."""
    tensors, names = make_model(architecture)
    writer = make_writer(path, architecture)
    customise(writer)
    for name in without:
        del tensors[name]
    for name, values in tensors.items():
        writer.add_tensor(names[name], np.ascontiguousarray(as_stored(architecture, name, values)))
    finish(writer)
    return tensors


@pytest.mark.parametrize("architecture", INNER)
def test_tensors_of_every_family(tmp_path: Path, architecture: str) -> None:
    path = tmp_path / "model.gguf"
    tensors = write_model(path, architecture)
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, GgufFile)
    assert set(checkpoint.names) == set(tensors)
    for name, expected in tensors.items():
        values = checkpoint.read(name)
        assert values.dtype == np.float32 and checkpoint.shape(name) == expected.shape
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6, err_msg=name)
        values[...] = 0
    assert checkpoint.config["model_type"] == architecture
    assert checkpoint.config["tie_word_embeddings"] == (architecture == "gemma2")


def test_config_of_llama(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, customise=lambda writer: writer.add_rope_freq_base(5e5), without=("lm_head.weight",))
    assert open_checkpoint(path).config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": INTERMEDIATE,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def check_config(
    path: Path, architecture: str, customise: Callable[[GGUFWriter], None], expected: dict[str, Any]
) -> None:
    write_model(path, architecture, customise)
    config = open_checkpoint(path).config
    assert {name: config.get(name, "absent") for name in expected} == expected


def test_config_of_mistral(tmp_path: Path) -> None:
    expected = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64}
    check_config(tmp_path / "model.gguf", "llama", lambda writer: writer.add_sliding_window(64), expected)


def test_gemma2_without_soft_caps_has_the_usual_ones(tmp_path: Path) -> None:
    usual = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    check_config(tmp_path / "model.gguf", "gemma2", lambda writer: writer.add_key_length(HEAD_DIM), usual)


def test_config_of_gemma2(tmp_path: Path) -> None:
    def customise(writer: GGUFWriter) -> None:
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)
        writer.add_sliding_window(16)
        writer.add_key_length(HEAD_DIM)

    expected = {
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": HEAD_DIM,
        "sliding_window": 16,
        "rope_theta": 10000.0,
    }
    check_config(tmp_path / "model.gguf", "gemma2", customise, expected)


def test_config_of_phi3(tmp_path: Path) -> None:
    def customise(writer: GGUFWriter) -> None:
        writer.add_sliding_window(0)
        writer.add_rope_dimension_count(HEAD_DIM // 2)
        writer.add_rope_scaling_orig_ctx_len(64)
        writer.add_rope_scaling_attn_factors(1.25)
        writer.add_tensor("rope_factors_long.weight", np.asarray([1, 2], np.float32))
        writer.add_tensor("rope_factors_short.weight", np.asarray([1, 1], np.float32))

    expected = {
        "sliding_window": None,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {
            "rope_type": "longrope",
            "long_factor": [1.0, 2.0],
            "short_factor": [1.0, 1.0],
            "attention_factor": 1.25,
        },
        "original_max_position_embeddings": 64,
    }
    check_config(tmp_path / "model.gguf", "phi3", customise, expected)


def test_config_of_smollm3_and_qwen(tmp_path: Path) -> None:
    check_config(tmp_path / "a.gguf", "smollm3", lambda writer: None, {"no_rope_layers": [1, 1]})
    check_config(tmp_path / "b.gguf", "qwen2", lambda writer: None, {"use_sliding_window": False})
    check_config(tmp_path / "c.gguf", "qwen3", lambda writer: None, {"attention_bias": False})


def test_linear_and_yarn_scaling(tmp_path: Path) -> None:
    def linear(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.0)

    def yarn(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)

    check_config(tmp_path / "a.gguf", "llama", linear, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}})
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    check_config(tmp_path / "b.gguf", "qwen2", yarn, {"rope_scaling": scaling})

    def more(writer: GGUFWriter) -> None:
        yarn(writer)
        writer.add_rope_scaling_attn_factors(0.5)
        writer.add_rope_scaling_yarn_beta_fast(16.0)

    write_model(tmp_path / "c.gguf", "qwen2", more)
    found = open_checkpoint(tmp_path / "c.gguf").config["rope_scaling"]
    factor = 0.5 * (0.1 * np.log(4.0) + 1)
    assert found == {**scaling, "beta_fast": 16.0, "attention_factor": pytest.approx(factor)}
    # llama.cpp takes an absent type for linear.
    check_config(
        tmp_path / "d.gguf",
        "llama",
        lambda writer: writer.add_rope_scaling_factor(2.0),
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    )


@pytest.mark.parametrize(
    ("customise", "name"),
    [
        (lambda writer: writer.add_rope_scaling_attn_factors(1.5), "rope.scaling.attn_factor"),
        (lambda writer: writer.add_float32("llama.rope.scaling.yarn_attn_factor", 1.5), "yarn_attn_factor"),
        (lambda writer: writer.add_string("llama.rope.scaling.type", "dynamic"), "rope.scaling.type"),
        (
            lambda writer: (
                writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
                writer.add_float32("llama.rope.scaling.yarn_log_multiplier", 0.1),
            ),
            "yarn_log_multiplier",
        ),
        (
            lambda writer: (
                writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
                writer.add_rope_scaling_factor(4.0),
            ),
            "rope.scaling.factor",
        ),
        (
            lambda writer: (
                writer.add_rope_scaling_factor(4.0),
                writer.add_tensor("rope_freqs.weight", llama3_factors(1e4, 8.0)),
            ),
            "beside the tensor rope_freqs.weight",
        ),
        (
            lambda writer: writer.add_tensor("rope_factors_long.weight", np.ones(HEAD_DIM // 2, np.float32)),
            "rope_factors_long.weight",
        ),
    ],
)
def test_scalings_that_only_llama_cpp_has_are_refused_by_name(
    customise: Callable[[GGUFWriter], Any], name: str, tmp_path: Path
) -> None:
    write_model(tmp_path / "model.gguf", customise=customise)
    assert name in error_of(lambda: open_checkpoint(tmp_path / "model.gguf"))


def llama3_factors(base: float, factor: float) -> np.ndarray:
    """The loop of LlamaModel.generate_extra_tensors in convert_hf_to_gguf.py."""
    factors = []
    for i in range(0, HEAD_DIM, 2):
        wavelength = 2 * np.pi * base ** (i / HEAD_DIM)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.asarray(factors, np.float32)


def test_llama3_scaling_is_recognised_by_its_table(tmp_path: Path) -> None:
    factors = llama3_factors(5e5, 32.0)
    assert len(set(factors.tolist())) == 3

    def customise(writer: GGUFWriter) -> None:
        writer.add_rope_freq_base(5e5)
        writer.add_tensor("rope_freqs.weight", factors)

    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    check_config(tmp_path / "model.gguf", "llama", customise, {"rope_scaling": scaling})
    factors[1] = 7.0
    write_model(tmp_path / "model.gguf", customise=customise)
    assert "rope_freqs.weight" in error_of(lambda: open_checkpoint(tmp_path / "model.gguf"))


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.F16, GGMLQuantizationType.BF16])
def test_quantised_blocks(tmp_path: Path, kind: GGMLQuantizationType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynexport.exporter.checkpoint.gguf_file._VALUES_AT_A_TIME", 100)
    tensors, _ = make_model("llama")
    values = tensors["model.embed_tokens.weight"]
    blocks = gguf.quants.quantize(values, kind)
    writer = make_writer(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=kind)
    for i in range(LAYERS):
        writer.add_tensor(f"blk.{i}.attn_norm.weight", np.ones(HIDDEN, np.float32))
    finish(writer)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    read = checkpoint.read("model.embed_tokens.weight")
    np.testing.assert_array_equal(read, gguf.quants.dequantize(blocks, kind))
    np.testing.assert_allclose(read, values, atol=0.05)
    assert checkpoint.shape("model.embed_tokens.weight") == values.shape


def byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def vocabulary(writer: GGUFWriter, pre: str, bos: int = 0) -> None:
    """A byte-level vocabulary with a few merges, a control token and a user-defined one."""
    tokens = ["<|begin|>", "<|end|>", "<tool>", *byte_alphabet(), "Ġa", "12", "34", "123"]
    kinds = [3, 3, 4] + [1] * (len(tokens) - 3)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["Ġ a", "1 2", "3 4", "12 3"])
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(1)


def encode(path: Path, pre: str, text: str, customise: Callable[[GGUFWriter], None] = lambda writer: None) -> list[str]:
    """The tokens that the tokenizer of a file makes of a text; decoding them gives the text back."""

    def both(writer: GGUFWriter) -> None:
        vocabulary(writer, pre)
        customise(writer)

    write_model(path, customise=both)
    tokenizer = Tokenizer.from_buffer(open_checkpoint(path).files["tokenizer.json"])
    encoded = tokenizer.encode(text)
    begin = "<|begin|>" if encoded.tokens[:1] == ["<|begin|>"] and not text.startswith("<|begin|>") else ""
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == begin + text
    tokens: list[str] = encoded.tokens
    return tokens


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [
        ("gpt-2", ["Ġa", "Ġ", "12", "34"]),
        ("default", ["Ġa", "Ġ", "123", "4"]),
        ("smollm", ["Ġa", "Ġ", "1", "2", "3", "4"]),
        ("qwen2", ["Ġa", "Ġ", "1", "2", "3", "4"]),
        ("smaug-bpe", ["Ġa", "Ġ", "123", "4"]),
        ("llama-bpe", ["<|begin|>", "Ġa", "Ġ", "123", "4"]),
    ],
)
def test_words_are_split_as_the_model_expects(tmp_path: Path, pre: str, tokens: list[str]) -> None:
    assert encode(tmp_path / "model.gguf", pre, " a 1234") == tokens


def test_special_and_added_tokens(tmp_path: Path) -> None:
    tokens = encode(tmp_path / "model.gguf", "smollm", "<|begin|> a<tool> a<|end|>")
    assert tokens == ["<|begin|>", "Ġa", "<tool>", "Ġa", "<|end|>"]


def test_text_of_any_kind_survives(tmp_path: Path) -> None:
    for pre in ("smollm", "llama-bpe", "qwen2"):
        encode(tmp_path / "model.gguf", pre, "naïve 日本語 ½²٣ 🎉\r\n\n\t  tab it's I'LL \x00")


def test_bos_and_eos_are_added_where_the_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    assert encode(path, "llama-bpe", "a", lambda writer: writer.add_add_bos_token(False)) == ["a"]
    assert encode(path, "gpt-2", "a", lambda writer: writer.add_add_bos_token(True)) == ["<|begin|>", "a"]

    def both(writer: GGUFWriter) -> None:
        vocabulary(writer, "gpt-2")
        writer.add_add_eos_token(True)

    write_model(path, customise=both)
    tokenizer = Tokenizer.from_buffer(open_checkpoint(path).files["tokenizer.json"])
    assert tokenizer.encode("a", "b").tokens == ["a", "<|end|>", "b", "<|end|>"]


def test_files_of_a_tokenizer(tmp_path: Path) -> None:
    def customise(writer: GGUFWriter) -> None:
        vocabulary(writer, "smollm")
        writer.add_eot_token_id(2)
        writer.add_pad_token_id(1)
        writer.add_chat_template("{{ messages }}")

    write_model(tmp_path / "model.gguf", customise=customise)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    assert checkpoint.files["chat_template.jinja"] == b"{{ messages }}"
    generation = {"bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": 1}
    assert json.loads(checkpoint.files["generation_config.json"]) == generation
    settings = json.loads(checkpoint.files["tokenizer_config.json"])
    assert (settings["bos_token"], settings["eos_token"], settings["pad_token"]) == (
        "<|begin|>",
        "<|end|>",
        "<|end|>",
    )
    assert "add_bos_token" not in settings  # tokenizer.json has it
    assert (checkpoint.config["bos_token_id"], checkpoint.config["eos_token_id"]) == (0, 1)


@pytest.mark.parametrize("merges", [["a b c"], ["a"], ["xyz a"]])
def test_bad_merges(tmp_path: Path, merges: list[str]) -> None:
    def customise(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(["a", "b", "c"])
        writer.add_token_merges(merges)

    path = tmp_path / "model.gguf"
    write_model(path, customise=customise)
    assert "tokenizer.ggml.merges" in error_of(lambda: open_checkpoint(path))
    other = tmp_path / "tokenizer.json"
    Tokenizer.from_str('{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}').save(str(other))
    assert open_checkpoint(path, tokenizer=other).files["tokenizer.json"] == other.read_bytes()


@pytest.mark.parametrize(("bos", "tokens"), [(9999, None), (0, ["a", "a"])])
def test_bad_vocabulary(tmp_path: Path, bos: int, tokens: list[str] | None) -> None:
    def customise(writer: GGUFWriter) -> None:
        if tokens is None:
            vocabulary(writer, "gpt-2", bos=bos)
        else:
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre("gpt-2")
            writer.add_token_list(tokens)

    write_model(tmp_path / "model.gguf", customise=customise)
    assert "tokenizer.ggml." in error_of(lambda: open_checkpoint(tmp_path / "model.gguf"))


def test_a_file_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    write_model(tmp_path / "model.gguf")
    named = open_checkpoint(tmp_path / "model.gguf")
    for name in ("model", "model.bin", "sha256-0123"):
        (tmp_path / "model.gguf").rename(tmp_path / name)
        assert open_checkpoint(str(tmp_path / name)).config == named.config
        (tmp_path / name).rename(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGU")
    assert "expected a GGUF file" in error_of(lambda: open_checkpoint(tmp_path / "model.gguf"))


def test_unknown_architecture(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    finish(make_writer(path, "mamba"))
    message = error_of(lambda: open_checkpoint(path))
    assert "'mamba'" in message and "exaone4, falcon, gemma, gemma2, gemma3, gpt-oss, gptneox, granite" in message
    assert "convert the Hugging Face directory" in message


def test_variants_that_are_not_supported(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    cases: list[tuple[Callable[[GGUFWriter], None], str]] = [
        (lambda writer: writer.add_expert_count(8), "llama.expert_count: expected none in a llama without experts"),
        (
            lambda writer: writer.add_uint16("split.count", 3),
            "is one of 3 parts; name the first, which ends in -00001-of",
        ),
        (lambda writer: writer.add_type("adapter"), "general.type: expected model, found 'adapter'"),
        (lambda writer: writer.add_logit_scale(0.5), "llama.logit_scale: expected no such value"),
        (lambda writer: writer.add_attention_scale(0.5), "llama.attention.scale: expected no such value"),
        (lambda writer: writer.add_rope_dimension_sections([2, 2]), "llama.rope.dimension_sections"),
        (lambda writer: writer.add_bool("llama.use_parallel_residual", True), "llama.use_parallel_residual"),
        (lambda writer: writer.add_causal_attention(False), "llama.attention.causal: expected true"),
        (
            lambda writer: writer.add_value_length(16),
            "attention.value_length: expected 8, the length of keys, found 16",
        ),
        (
            lambda writer: writer.add_tensor("blk.0.attn_rot.weight", np.ones(1, np.float32)),
            "blk.0.attn_rot.weight",
        ),
        (lambda writer: writer.add_key_length(0), "llama.attention.key_length"),
        (
            lambda writer: writer.add_array("llama.attention.key_length", [8, 16]),
            "llama.attention.key_length",
        ),
        (lambda writer: writer.add_string("llama.rope.freq_base", "big"), "llama.rope.freq_base"),
        (lambda writer: writer.add_rope_freq_base(float("nan")), "llama.rope.freq_base"),
    ]
    for customise, expected in cases:
        write_model(path, customise=customise)
        assert expected in error_of(lambda: open_checkpoint(path))


def test_values_without_effect(tmp_path: Path) -> None:
    def customise(writer: GGUFWriter) -> None:
        writer.add_vocab_size(VOCABULARY)
        writer.add_tensor_data_layout("Meta AI original pth")
        writer.add_causal_attention(True)
        writer.add_expert_count(0)
        writer.add_expert_used_count(0)
        writer.add_bool("llama.use_parallel_residual", False)
        writer.add_key_length(HEAD_DIM)
        writer.add_value_length(HEAD_DIM)
        writer.add_type("model")

    write_model(tmp_path / "model.gguf", customise=customise)
    assert open_checkpoint(tmp_path / "model.gguf").config["head_dim"] == HEAD_DIM


def test_a_sliding_window_that_llama_cpp_does_not_read_is_told(tmp_path: Path) -> None:
    for window, told in ((64, True), (128, False)):
        write_model(tmp_path / "model.gguf", "qwen2", lambda writer, window=window: writer.add_sliding_window(window))
        checkpoint = open_checkpoint(tmp_path / "model.gguf")
        assert checkpoint.config["use_sliding_window"] is False
        assert any("qwen2.attention.sliding_window" in note for note in checkpoint.notes) == told


def write_parts(directory: Path, count: int) -> list[Path]:
    """A model in several parts as llama-gguf-split writes them, and whole beside them."""
    tensors, names = make_model("llama")
    write_model(directory / "whole.gguf")
    ours = sorted(tensors)
    paths = []
    for i in range(count):
        path = directory / f"m-{i + 1:05}-of-{count:05}.gguf"
        writer = make_writer(path, "llama") if i == 0 else GGUFWriter(path, "llama")
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(tensors))
        for name in ours[i::count]:
            writer.add_tensor(names[name], np.ascontiguousarray(as_stored("llama", name, tensors[name])))
        finish(writer)
        paths.append(path)
    return paths


def test_a_model_in_parts_is_the_whole_one(tmp_path: Path) -> None:
    first, *_ = write_parts(tmp_path, 3)
    whole, parts = open_checkpoint(tmp_path / "whole.gguf"), open_checkpoint(first)
    assert set(parts.names) == set(whole.names) and parts.config == whole.config
    for name in whole.names:
        np.testing.assert_array_equal(parts.read(name), whole.read(name))


def test_parts_that_do_not_go_together(tmp_path: Path) -> None:
    first, second, third = write_parts(tmp_path, 3)
    message = error_of(lambda: open_checkpoint(second))
    assert "is one of 3 parts; name the first, which ends in -00001-of-00003.gguf" in message
    other = first.rename(tmp_path / "other.gguf")
    assert "is one of 3 parts; name the first" in error_of(lambda: open_checkpoint(other))
    other.rename(first)
    content = third.read_bytes()
    third.unlink()
    message = error_of(lambda: open_checkpoint(first))
    assert "part 3, m-00003-of-00003.gguf, is not beside it; complete the download" in message
    third.write_bytes(second.read_bytes())
    assert "expected part 3 of 3, found split.no 1" in error_of(lambda: open_checkpoint(first))
    third.write_bytes(content[:-200])
    assert "m-00003-of-00003.gguf: tensor" in error_of(lambda: open_checkpoint(first))
    writer = GGUFWriter(third, "llama")
    writer.add_uint16("split.no", 2)
    writer.add_uint16("split.count", 3)
    finish(writer)
    assert "tensors in 3 parts, found" in error_of(lambda: open_checkpoint(first))


def test_missing_metadata_and_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 1 << 31)
    finish(writer)
    assert "llama.block_count" in error_of(lambda: open_checkpoint(path))
    write_model(path, without=("model.embed_tokens.weight",))
    assert "token_embd.weight" in error_of(lambda: open_checkpoint(path))
    write_model(path, without=("model.layers.1.mlp.up_proj.weight",))
    checkpoint = open_checkpoint(path)
    assert "model.layers.1.mlp.up_proj.weight" in error_of(lambda: checkpoint.read("model.layers.1.mlp.up_proj.weight"))


def test_rows_that_do_not_go_with_the_heads(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = make_writer(path, "llama")
    writer.add_tensor("token_embd.weight", np.ones((VOCABULARY, HIDDEN), np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.ones((HEADS * HEAD_DIM - 1, HIDDEN), np.float32))
    finish(writer)
    checkpoint = open_checkpoint(path)
    assert "blk.0.attn_q.weight" in error_of(lambda: checkpoint.read("model.layers.0.self_attn.q_proj.weight"))


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, customise=lambda writer: vocabulary(writer, "smollm"))
    content = path.read_bytes()
    for length in {*range(64), *range(64, len(content), 997), len(content) - HIDDEN * 4}:
        path.write_bytes(content[:length])
        assert "model.gguf" in error_of(lambda: open_checkpoint(path))


def test_any_flipped_byte_of_the_header_is_read_or_told(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(path)
    content = bytearray(path.read_bytes())
    end = content.rindex(b"ffn_down.weight")
    for position in range(0, end, 7):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(path)
            checkpoint.read(next(iter(checkpoint.names)))
        except DynexportError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "expected a GGUF file"),
        (b"PK\x03\x04" + bytes(64), "expected a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(64), "expected GGUF version 2 or 3, found 1"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(64), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 62), "expected 8 more bytes, found 0"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 62, 0), "expected 8 more bytes, found 0"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 1 << 62), "array of at most 16777216 items"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 1 << 24), "expected 67108864 more bytes, found 0"),
        (b"GGUF" + struct.pack("<IQQQ1sIQ", 3, 0, 1, 1, b"k", 8, 1 << 62), "more bytes, found 0"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQI", 3, 0, 1, 1, b"k", 9, 9, 1, 9), "metadata type"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1), "metadata type"),
        (b"GGUF" + struct.pack("<IQQQ1sIQ1s", 3, 0, 1, 1, b"k", 8, 1, b"\xff"), "expected UTF-8"),
        (
            b"GGUF" + struct.pack("<IQQ" + "Q1sIB" * 2, 3, 0, 2, *((1, b"k", 0, 7) * 2)),
            "'k': expected it once, found it twice",
        ),
        (b"GGUF" + struct.pack("<IQQQ1s", 3, 1, 0, 1, b"\n"), "expected a printable name"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 99), "expected 1 to 4 dimensions, found 99"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 1, 999, 0), "known ggml type, found 999"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 1, 2, 0), "multiple of 32 Q4_0, found 1"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 1 << 40, 0, 0), "tensor t: expected"),
    ],
)
def test_damaged_headers(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    assert expected in error_of(lambda: open_checkpoint(tmp_path / "model.gguf"))


def two_tensors(offsets: tuple[int, int], count: int = 8, size: int = 64, alignment: int = 32) -> bytes:
    """A file of two float32 vectors of ``count`` numbers, and ``size`` bytes for them."""
    key = b"general.alignment"
    content = b"GGUF" + struct.pack(f"<IQQQ{len(key)}sII", 3, 2, 1, len(key), key, 4, alignment)
    for name, offset in zip((b"a", b"b"), offsets, strict=True):
        content += struct.pack("<Q1sIQIQ", 1, name, 1, count, 0, offset)
    return content + bytes(-len(content) % 32) + bytes(size)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (two_tensors((0, 0)), "tensor b: expected its start at byte 160, found byte 128, with bytes of another"),
        (two_tensors((0, 4)), "tensor b: expected its start at byte 160, found byte 132, with bytes of another"),
        (
            two_tensors((0, 64), size=96),
            "tensor b: expected its start at byte 160, found byte 192, with",
        ),
        (two_tensors((32, 64), size=96), "tensor a: expected its start at byte 128, found byte 160"),
        (two_tensors((0, 32), size=128), "expected 192 bytes, found 256, with bytes of no tensor at its end"),
        (two_tensors((0, 32), size=63), "tensor b: expected 32 bytes from byte 160, found a file of 191 bytes"),
        (two_tensors((0, 1 << 63)), "found a file of 192 bytes"),
        (two_tensors((0, 32), count=0), "tensor a: expected dimensions from 1, found [0]"),
        (two_tensors((0, 32), alignment=1 << 31), "found a file of 192 bytes"),
    ],
)
def test_tensors_that_share_bytes_or_leave_holes(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert expected in error_of(lambda: read_header(path))
    for size in (64, 60):  # the last one may lack its padding
        path.write_bytes(two_tensors((32, 0), count=size // 8, size=size))
        assert [tensor.offset for tensor in read_header(path).tensors.values()] == [160, 128]


def test_types_that_cannot_be_dequantised(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = make_writer(path, "llama")
    writer.add_tensor("token_embd.weight", np.ones((VOCABULARY, HIDDEN), np.float64))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    finish(writer)
    checkpoint = open_checkpoint(path)
    assert "F64 cannot be dequantised" in error_of(lambda: checkpoint.read("model.embed_tokens.weight"))


def test_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(path)
    checkpoint = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:1000])
    assert "has changed" in error_of(lambda: checkpoint.read("lm_head.weight"))
    path.unlink()
    assert "cannot be read" in error_of(lambda: checkpoint.read("lm_head.weight"))
