"""Tiny random models of many architectures of transformers: `NAMES`, `build(name)` -> (model, inputs), `output`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

V = 64
Inputs = dict[str, Tensor]


def ids(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(5, 50, (rows, length), generator=torch.Generator().manual_seed(3))


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def text() -> Inputs:
    return {"input_ids": ids(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}


def two_texts() -> Inputs:
    return {**text(), "decoder_input_ids": ids(2, 5)}


def pictures(size: int = 16) -> Inputs:
    return {"pixel_values": noise(2, 3, size, size)}


def large_pictures() -> Inputs:
    return pictures(32)


def sound() -> Inputs:
    return {"input_values": noise(2, 400)}


def text_and_pictures() -> Inputs:
    return {**text(), **pictures()}


def after_image(tokens: int) -> Callable[[], Inputs]:
    """Text behind as many image tokens as a picture becomes."""

    def made() -> Inputs:
        line = torch.cat([torch.full((2, tokens), 60), ids()], 1)
        return {"input_ids": line, "attention_mask": torch.ones_like(line), **pictures()}

    return made


def qwen_vl() -> Inputs:
    line = torch.cat([torch.full((2, 1), 58), torch.full((2, 4), 60), torch.full((2, 1), 59), ids()], 1)
    return {
        "input_ids": line,
        "attention_mask": torch.ones_like(line),
        "pixel_values": noise(32, 96),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
        "mm_token_type_ids": (line == 60).long(),
    }


BASIC: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 3,
}  # fmt: skip
ENCODER = {**BASIC, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "embedding_size": 16}
DECODER = {**BASIC, "num_key_value_heads": 1, "head_dim": 8}
MIXTURE = {
    **DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 12, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "decoder_sparse_step": 1,
}  # fmt: skip
GPT2 = {"vocab_size": V, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "pad_token_id": 0}
SEQ2SEQ = {
    "vocab_size": V, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
T5 = {
    "vocab_size": V,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
VISION = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
TEXT = {k: v for k, v in BASIC.items() if k != "num_labels"}
STAGES = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
SOUND = {
    **ENCODER, "conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (8, 8), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "mask_time_prob": 0.0,
    "layerdrop": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
}  # fmt: skip
QWEN_VL = {
    "depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
WITH_IMAGE = {"image_token_index": 60, "image_token_id": 60}
MULTIMODAL: dict[str, dict[str, Any]] = {
    "Clip": {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16},
    "Siglip": {"text_config": TEXT, "vision_config": VISION},
    "Llava": {"text_config": {"model_type": "llama", **DECODER}, "vision_config": {"model_type": "clip_vision_model", **VISION},
              "vision_feature_layer": -1, **WITH_IMAGE},
    "Gemma3": {"text_config": DECODER, "vision_config": VISION, "mm_tokens_per_image": 4, **WITH_IMAGE,
               "boi_token_index": 58, "eoi_token_index": 59},
    "Qwen2VL": {"text_config": {**DECODER, "num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
                "vision_config": QWEN_VL, "image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 58,
                "vision_end_token_id": 59},
}  # fmt: skip

Entry = tuple[str, str, dict[str, Any], Callable[[], Inputs]]
ALL: dict[str, Entry] = {}
for _n in [
    "Llama",
    "Mistral",
    "Qwen2",
    "Qwen3",
    "Gemma",
    "Gemma2",
    "Phi3",
    "Phi",
    "StableLm",
    "Olmo2",
    "Cohere",
    "Starcoder2",
    "Granite",
    "GPTNeoX",
    "Glm",
    "SmolLM3",
    "Nemotron",
    "Persimmon",
]:
    ALL[_n] = (f"{_n}Config", f"{_n}ForCausalLM", DECODER, text)
for _n in ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "Phimoe", "GraniteMoe"):
    ALL[_n] = (f"{_n}Config", f"{_n}ForCausalLM", MIXTURE, text)
for _n in ("Bert", "Roberta", "Electra", "MPNet", "XLMRoberta", "Albert", "BigBird", "Deberta", "ModernBert"):
    _kw = {**ENCODER, "attention_type": "original_full"} if _n == "BigBird" else ENCODER
    _kw = {**_kw, "cls_token_id": 1, "sep_token_id": 2} if _n == "ModernBert" else _kw
    ALL[_n] = (f"{_n}Config", f"{_n}ForSequenceClassification", _kw, text)
for _n in ("ViT", "DeiT", "Dinov2", "Beit", "IJepa"):
    ALL[_n] = (f"{_n}Config", f"{_n}ForImageClassification", {**VISION, "num_labels": 3}, pictures)
for _n, _c in (("Bart", "ForConditionalGeneration"), ("MBart", "ForConditionalGeneration"), ("Marian", "MTModel")):
    ALL[_n] = (f"{_n}Config", f"{_n}{_c}", SEQ2SEQ, two_texts)
for _n in ("Wav2Vec2", "Hubert", "UniSpeech"):
    ALL[_n] = (f"{_n}Config", f"{_n}ForSequenceClassification", SOUND, sound)
ALL |= {
    "GPT2": ("GPT2Config", "GPT2LMHeadModel", GPT2, text),
    "GPTJ": ("GPTJConfig", "GPTJForCausalLM", {**GPT2, "rotary_dim": 4}, text),
    "GPTBigCode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", GPT2, text),
    "Bloom": ("BloomConfig", "BloomForCausalLM", {"vocab_size": V, "hidden_size": 16, "n_layer": 2, "n_head": 2}, text),
    "OPT": ("OPTConfig", "OPTForCausalLM", {**BASIC, "ffn_dim": 24, "word_embed_proj_dim": 12}, text),
    "Falcon": ("FalconConfig", "FalconForCausalLM", BASIC, text),
    "Mpt": ("MptConfig", "MptForCausalLM", {"vocab_size": V, "d_model": 16, "n_layers": 2, "n_heads": 2}, text),
    "DeepseekV2": ("DeepseekV2Config", "DeepseekV2ForCausalLM",
                   {**MIXTURE, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
                    "qk_nope_head_dim": 4, "num_key_value_heads": 2}, text),
    "GptOss": ("GptOssConfig", "GptOssForCausalLM", {**MIXTURE, "layer_types": ["sliding_attention", "full_attention"]}, text),
    "LlamaSeqCls": ("LlamaConfig", "LlamaForSequenceClassification", DECODER, text),
    "DistilBert": ("DistilBertConfig", "DistilBertForSequenceClassification",
                   {"vocab_size": V, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "num_labels": 3}, text),
    "DebertaV2": ("DebertaV2Config", "DebertaV2ForSequenceClassification",
                  {**ENCODER, "relative_attention": True, "position_buckets": 4, "pos_att_type": ["p2c", "c2p"],
                   "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False}, text),
    "XLNet": ("XLNetConfig", "XLNetForSequenceClassification",
              {"vocab_size": V, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "num_labels": 3}, text),
    "Longformer": ("LongformerConfig", "LongformerForSequenceClassification", {**ENCODER, "attention_window": 4}, text),
    "T5": ("T5Config", "T5ForConditionalGeneration", T5, two_texts),
    "T5 gated": ("T5Config", "T5ForConditionalGeneration",
                 {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, two_texts),
    "Swin": ("SwinConfig", "SwinForImageClassification", {**STAGES, "num_labels": 3}, large_pictures),
    "Segformer": ("SegformerConfig", "SegformerForSemanticSegmentation",
                  {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8], "num_attention_heads": [1, 1, 2, 2],
                   "decoder_hidden_size": 8, "num_labels": 3}, large_pictures),
    "ConvNext": ("ConvNextConfig", "ConvNextForImageClassification",
                 {"hidden_sizes": [8, 8, 12, 12], "depths": [1, 1, 1, 1], "num_labels": 3, "layer_scale_init_value": 1.0},
                 large_pictures),
    "Whisper": ("WhisperConfig", "WhisperForConditionalGeneration",
                {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 20},
                lambda: {"input_features": noise(2, 8, 20), "decoder_input_ids": ids(2, 5)}),
    "Clip": ("CLIPConfig", "CLIPModel", MULTIMODAL["Clip"], text_and_pictures),
    "Llava": ("LlavaConfig", "LlavaForConditionalGeneration", MULTIMODAL["Llava"], after_image(16)),
    "Gemma3": ("Gemma3Config", "Gemma3ForConditionalGeneration", MULTIMODAL["Gemma3"], after_image(4)),
    "Qwen2VL": ("Qwen2VLConfig", "Qwen2VLForConditionalGeneration", MULTIMODAL["Qwen2VL"], qwen_vl),
}  # fmt: skip
NAMES = tuple(ALL)


def build(name: str) -> tuple[nn.Module, Inputs]:
    """A model in eval mode with weights large enough to matter, and inputs for it."""
    config, cls, options, inputs = ALL[name]
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, cls)(getattr(transformers, config)(**options)).eval()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                width = 0.5 if "embed" in path or "wte" in path else 0.6 / parameter.shape[-1] ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * width)
    return model, inputs()


def output(model: nn.Module, inputs: Inputs) -> Tensor:
    """Its main tensor."""
    with torch.no_grad():
        found = model(**inputs)
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        value = getattr(found, name, None)
        if isinstance(value, Tensor):
            return value
    raise TypeError(type(found))


def repeated_layers(model: nn.Module) -> list[str]:
    """Last names of the linear layers in numbered blocks, but of no module that also is something else."""
    named = dict(model.named_modules())
    plain = [p for p, m in named.items() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    last = dict.fromkeys(p.rpartition(".")[2] for p in plain if any(part.isdigit() for part in p.split(".")))
    return [n for n in last if not n.isdigit() and all(p in plain for p in named if p.rpartition(".")[2] == n)]
