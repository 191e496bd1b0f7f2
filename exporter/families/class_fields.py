"""The fields of a config.json that never change the logits, and those that may only be without effect.

A family reads the fields that it supports (``Fields``). Every other field of a config.json must be one of
``HARMLESS`` or off (null, false, empty); else it is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Origin of the file, and how the model is loaded or trained: these do not enter the forward pass.
_ABOUT_THE_FILE = (
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "auto_map",
    "custom_pipelines",
    "dtype",
    "dynexport",
    "finetuning_task",
    "is_llama_config",
    "model_type",
    "name_or_path",
    "task_specific_params",
    "tokenizer_name",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
)
_EXECUTION = (
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_flash_attn_2_enabled",
    "attention_softmax_in_fp32",
    "attn_impl",
    "attn_implementation",
    "bias_dropout_fusion",
    "chunk_size_feed_forward",
    "gradient_checkpointing",
    "masked_softmax_fusion",
    "output_attentions",
    "output_hidden_states",
    "pretraining_tp",
    "reorder_and_upcast_attn",
    "scale_attention_softmax_in_fp32",
    "tie_last_hidden_states",
    "torchscript",
    "use_bfloat16",
    "use_cache",
    "use_flash_attn",
)
_TRAINING = (
    "activation_checkpoint_impl",
    "activation_dropout",
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "dropout",
    "effective_expected_depth",
    "emb_pdrop",
    "embd_pdrop",
    "embedding_dropout",
    "embedding_fraction",
    "hidden_dropout",
    "hidden_dropout_prob",
    "init_config",
    "init_device",
    "init_orthogonal",
    "init_std",
    "init_strategy",
    "init_values",
    "initializer_factor",
    "initializer_range",
    "layerdrop",
    "loss_type",
    "mean_backprop_depth",
    "neftune_noise_alpha",
    "output_router_logits",
    "padding_multiple",
    "resid_pdrop",
    "residual_dropout",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "sampling_scheme",
    "test_time_noise_type",
    "verbose",
    "weight_decay",
)
# Fields of heads for other tasks; a causal language model does not have their weights.
_OTHER_HEADS = (
    "_num_labels",
    "classifier_dropout",
    "id2label",
    "is_decoder",
    "label2id",
    "num_labels",
    "problem_type",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
)
# Fields that transformers does not read: old names of lengths; Megatron's training settings in bloom; sizes for which
# gpt2, opt, bloom and gpt_neox have other names, or which do not apply to them (they have no grouped key heads);
# settings of windows of other families, which the config.json of SmolLM3 has; in openelm, the length of a table of
# rotary angles that grows as needed; and a switch for positions that mpt does without.
_UNREAD_BY_TRANSFORMERS = (
    "_sliding_window_pattern",
    "intermediate_size",
    "learned_pos_emb",
    "max_sequence_length",
    "max_window_layers",
    "model_max_length",
    "n_ctx",
    "num_key_value_heads",
    "offset_alibi",
    "rope_max_length",
    "seq_length",
    "sliding_window_size",
    "skip_bias_add",
    "skip_bias_add_qkv",
)
_TOKENS = (
    "bos_token",
    "bos_token_id",
    "decoder_start_token_id",
    "eos_token",
    "eos_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "mask_token_id",
    "pad_token",
    "pad_token_id",
    "prefix",
    "sep_token_id",
    "tokenizer_class",
    "unk_token",
    "unk_token_id",
)
# Settings of generate() in old configs: they act on the logits, and are read from generation_config.json only.
_GENERATION = (
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "bad_words_ids",
    "begin_suppress_tokens",
    "cache_implementation",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "suppress_tokens",
    "target_lookbehind",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
)
HARMLESS = frozenset(
    (
        *_ABOUT_THE_FILE,
        *_EXECUTION,
        *_TRAINING,
        *_OTHER_HEADS,
        *_UNREAD_BY_TRANSFORMERS,
        *_TOKENS,
        *_GENERATION,
    )
)

# Fields of the base class, or of any config.json, that change the computation -> the value that has no effect.
NEUTRAL: Mapping[str, Any] = {
    "is_causal": True,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "per_layer_config": {},
    "quantization_config": None,
    "use_mrope": False,
    "rope_interleaved": False,
    "return_dict": True,
    "transformers_weights": None,
}
# The fields that ``read_rotary`` reads in every family with rotary positions.
ROTARY = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)
