"""Small models of every type that Transformers has, and inputs for any of them.

Configs are the default ones with every size cut down by its name, sub-configs included; inputs follow from the names
in a forward's signature. What does not fit is refused by the model itself, and reported by whoever asks.
"""

import copy
import inspect
import re
import warnings
from collections.abc import Iterator

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto import modeling_auto

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 64, 4, 2, 16, 128
LARGEST = 4_850_000  # parameters of a model

# the first pattern that a key matches says what becomes of an int: a number, at most that
SIZES: list[tuple[str, int]] = [
    (r"num_feat_extract_layers", 100),  # as many as there are convolutions
    (r"upsample_groups", HIDDEN),
    (r"^(n_group|topk_group|n_groups)$", 1),
    (r"experts?_per_tok|top_?k|moe_k$|num_experts_per", 2),
    (r"n_shared_experts|num_shared_experts", 1),
    (r"experts$|num_experts", 4),
    (r"key_value_heads|kv_heads|_kv_n_heads", KV_HEADS),
    (r"heads?$|linear_num_.*heads", HEADS),
    (r"head_dim$|d_kv$|dim_head$|d_head$", HEAD_DIM),
    (r"layers?$|^depth$|^num_blocks$|n_layer$", 2),
    (r"vocab_size|vocab$|num_embeddings|codebook_size", VOCABULARY),
    (r"intermediate|ffn|^d_ff$|mlp_dim|d_inner|feedforward_dim|linear_units", 96),
    (r"lora_rank", 16),
    (r"hidden_size$|hidden_dim$|d_model$|n_embd$|embed_dim$|emb_dim$|embedding_size$|projection_dim$", HIDDEN),
    (r"width$|output_dim$|^dim$", HIDDEN),
    (r"max_position_embeddings|n_positions|max_.*positions", 512),
]

# what the rules above do not find
_SWIN = {"embed_dim": 24, "num_heads": [3, 3, 3, 3]}
OVERRIDES: dict[str, dict] = {
    "swin": _SWIN,
    "donut-swin": _SWIN,
    "maskformer-swin": _SWIN,
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "longformer": {"attention_window": [8, 8]},
    "layoutlmv3": {"coordinate_size": 11, "shape_size": 10},
    "lilt": {"hidden_size": 96},
    "reformer": {"axial_pos_embds_dim": [16, 48]},
    "vivit": {"num_frames": 4},
    "videomae": {"num_frames": 4},
    "codegen": {"rotary_dim": HEAD_DIM},
    "gptj": {"rotary_dim": HEAD_DIM},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM},
    "hunyuan_vl_text": {"head_dim": HEAD_DIM},
    "ministral": {"head_dim": HEAD_DIM},
    "lfm2_moe": {"layer_types": ["full_attention"] * 2},
    "step3p7": {"text_config": {"sliding_window": 8, "mlp_layer_types": ["sparse"] * 2, "swiglu_limits": [0.0, 0.5]}},
    "nemotron": {"num_key_value_heads": KV_HEADS},
    "audio-spectrogram-transformer": {"max_length": 64},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
}

_TOKEN = re.compile(r"(_token_id|_token_index|_start_id|_end_id)$")


def small_config(model_type: str) -> PretrainedConfig:
    config_class = CONFIG_MAPPING[model_type]
    changes = cut_down(config_class().to_dict())
    for key, value in OVERRIDES.get(model_type, {}).items():
        changes[key] = changes[key] | value if isinstance(value, dict) else value
    config = config_class(**changes)
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:
            part.use_cache = False
            if getattr(part, "pad_token_id", None) is None:
                part.pad_token_id = 0
    return config


def cut_down(config: dict) -> dict:
    """The keys of a config that change, with what they become."""
    changes: dict = {}
    for key, value in config.items():
        if isinstance(value, dict):
            if key.endswith("config") and "model_type" in value:
                changes[key] = {"model_type": value["model_type"]} | cut_down(value)
            elif key == "rope_parameters" and "rope_type" in value:
                pairs = int(HEAD_DIM * value.get("partial_rotary_factor", 1)) // 2
                changes[key] = value | {"mrope_section": [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]}
        elif type(value) is int and _TOKEN.search(key):
            if value >= VOCABULARY:
                changes[key] = VOCABULARY - 1 - sum(_TOKEN.search(other) is not None for other in changes)
        elif type(value) is int:
            if (cut := _cut(key, value, config)) != value:
                changes[key] = cut
        elif isinstance(value, list | tuple) and key in ("depths", "layers") and all(type(n) is int for n in value):
            changes[key] = [1] * len(value)
    return changes


def _cut(key: str, value: int, config: dict) -> int:
    if key == "image_size":
        patch = config.get("patch_size")
        return min(value, 2 * patch if type(patch) is int else 64)
    if key == "embed_dim" and "depths" in config:
        return value  # heads go with it
    if "key_value_heads" in key and value == config.get("num_attention_heads"):
        return min(value, HEADS)
    return next((min(value, size) for pattern, size in SIZES if re.search(pattern, key)), value)


def model_classes(config: PretrainedConfig) -> list[type[nn.Module]]:
    """Every class that an Auto class builds of such a config."""
    found: dict[type[nn.Module], None] = {}
    for auto_class in vars(modeling_auto).values():
        mapping = getattr(auto_class, "_model_mapping", None) if isinstance(auto_class, type) else None
        if mapping is not None and type(config) in mapping:
            classes = mapping[type(config)]
            found |= dict.fromkeys(classes if isinstance(classes, tuple) else (classes,))
    return list(found)


def small_model(model_class: type[nn.Module], config: PretrainedConfig) -> nn.Module:
    """In evaluation mode; the same weights at every call.

    Raises:
        ValueError: the rules leave it so large that it would take long.
    """
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_class(copy.deepcopy(config)).parameters())
        if size > LARGEST:
            raise ValueError(f"{size} parameters are too many")
        model = model_class(config).eval()
    # wide enough that no output vanishes, and nothing is zero because it was initialised so
    for parameter in model.parameters():
        if parameter.is_floating_point():
            nn.init.normal_(parameter, std=0.5 * max(1, parameter.shape[-1]) ** -0.5 if parameter.dim() > 1 else 0.2)
    return model


def inputs_for(model: nn.Module) -> Iterator[dict]:
    """Candidates, the most usual first."""
    config = model.config
    names = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)

    def find(name, default):
        for owner in (config, *(getattr(config, key, None) for key in config.sub_configs)):
            if type(value := getattr(owner, name, None)) is int:
                return value
        return default

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    tokens = torch.randint(3, 60, (2, 8), generator=generator)
    text, decoder = {"input_ids": tokens}, {"decoder_input_ids": tokens[:, :5]}
    size, patch = getattr(config, "image_size", None), find("patch_size", 16)
    image = tuple(size) if isinstance(size, (list, tuple)) else (find("image_size", 64),) * 2
    channels = find("num_channels", find("in_channels", find("in_chans", 3)))
    if "input_ids" in names:
        if "decoder_input_ids" in names:
            yield text | decoder
        yield text
        yield {"input_ids": tokens[:, None].expand(-1, 3, -1)}  # multiple choice
        yield text | {"bbox": torch.zeros(2, 8, find("dim_bbox", 4), dtype=torch.long)}
    if "pixel_values" in names:
        pixels = {"pixel_values": random(2, channels, *image)}
        yield pixels
        yield text | pixels
        yield {"pixel_values": random(2, find("num_frames", 2), channels, *image)}
    for name in ("pixel_values_videos", "past_values"):
        if name in names:
            yield {"pixel_values_videos": random(2, find("num_frames", find("frames_per_clip", 2)), channels, *image)}
            yield {"past_values": random(2, find("context_length", 32), find("num_input_channels", 1))}
    if "grid_thw" in names:
        width = channels * find("temporal_patch_size", 1) * patch * patch
        first = next(iter(names))
        yield {first: random(32, width), "grid_thw": torch.tensor([[1, 4, 4]] * 2)}
        yield {first: random(32, channels, patch, patch), "grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    if "input_features" in names:
        bins = find("num_mel_bins", find("feature_size", find("input_dim", 80)))
        for shape in ((2, bins, 64), (2, 64, bins), (2, 1, 64, bins), (2, bins, 3000)):
            features = {"input_features": random(*shape)}
            yield features
            yield features | decoder
            yield features | text
    if "input_values" in names:
        for shape in ((2, 1600), (2, 1, 1600), (2, find("max_length", 64), find("num_mel_bins", 80))):
            yield {"input_values": random(*shape)}
    for name in ("inputs_embeds", "hidden_states"):
        if name in names:
            yield {name: random(2, 8, find("hidden_size", HIDDEN))}
