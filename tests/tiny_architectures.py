"""Every causal language model of transformers, tiny: small enough for milliseconds, with windows and chunks that bind."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 97
SETTINGS: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "embedding_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("sliding_window", "window_size", "attention_chunk_size", "attention_window_size"), 6),
    **dict.fromkeys(("index_topk", "keep_window_size", "index_block_size"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "v_head_dim", "head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 4),
    **dict.fromkeys(("n_group", "num_expert_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "max_window_layers"), 1),
    "vocab_size": VOCABULARY,
    "num_key_value_heads": 2,
    "rotary_dim": 4,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_dt_rank": 4,
    "time_step_rank": 4,
    "use_sliding_window": True,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""What a configuration gets of what it knows by these names."""

OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"]},
    "bamba": {"attn_layer_indices": [1]},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "ministral3": {
        "rope_parameters": {
            "type": "yarn",
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.5,
        }
    },
    "llama4_text": {"floor_scale": 8, "attn_scale": 0.5, "layer_types": ["chunked_attention", "full_attention"]},
    "moshi": {"num_key_value_heads": 4},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4},
    "reformer": {"is_decoder": True, "attention_head_size": 8, "axial_pos_embds": False, "hidden_size": 32},
    "xlstm": {"num_blocks": 2, "num_hidden_layers": 2},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "num_hidden_layers": 2,
        "attention_head_dim": 16,
        "n_mamba_heads": 2,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "num_hidden_layers": 2,
        "hybrid_layer_ids": [1],
        "attention_head_dim": 16,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "num_key_value_heads": 4,
        "adapter_rank": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What an architecture needs beyond them."""

VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def tiny_config(name: str, **changes: Any) -> Any:
    """The configuration of this `model_type`, all kinds of its layers once each."""
    plain = AutoConfig.for_model(name)
    if hasattr(plain, "text_config") and hasattr(plain, "vision_config"):
        text = tiny_config(plain.text_config.model_type, **changes).to_dict()
        return AutoConfig.for_model(name, text_config=text, vision_config=VISION)
    known = plain.to_dict()
    settings = {key: value for key, value in SETTINGS.items() if key in known or key in plain.attribute_map}
    if "kv_lora_rank" in known:
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    kinds = list(dict.fromkeys(known.get("layer_types") or []))
    if len(kinds) > 1:
        settings |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    elif kinds:
        settings["layer_types"] = kinds * 2
    settings |= OWN.get(name, {}) | changes
    if "layer_types" in settings:
        settings["num_hidden_layers"] = len(settings["layer_types"])
    return AutoConfig.for_model(name, **settings)


def tiny_lm(name: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A random model that looks at its context: vectors such as biases and sinks are not zero."""
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(tiny_config(name, **changes)).eval()
    with torch.no_grad():
        for p in lm.parameters():
            if p.dim() < 2:
                p.add_(0.1 * torch.randn_like(p))
            elif p.std() < 0.05:
                p.normal_(0, 0.2)
    return lm


NAMES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
