"""Where each weight lives on disk: canonical keys (diffusers' names) to the names of the original layout.

The tables are made for one configuration, since the original layout numbers blocks through all levels.
"""

import re
from collections.abc import Callable, Iterable

from ldmcli.config import (
    ClassesConfig,
    ImageEmbeddingConfig,
    MapConfig,
    TextEncoderConfig,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
)
from ldmcli.steering_config import AdapterConfig, ControlConfig, ImageEncoderConfig, IPAdapterConfig

NetworkConfig = (
    UNetConfig
    | VAEConfig
    | TinyVAEConfig
    | TextEncoderConfig
    | ControlConfig
    | AdapterConfig
    | IPAdapterConfig
    | ImageEncoderConfig
    | ClassesConfig
    | MapConfig
    | ImageEmbeddingConfig
)
# Whose keys are the same in both layouts.
_SAME_NAMES = (IPAdapterConfig, ImageEncoderConfig, ClassesConfig, MapConfig, ImageEmbeddingConfig)
DiskNames = dict[str, list[str]]

# Inside a resnet: (canonical, original).
_UNET_PARTS = (
    ("norm1.", "in_layers.0."),
    ("conv1.", "in_layers.2."),
    ("time_emb_proj.", "emb_layers.1."),
    ("norm2.", "out_layers.0."),
    ("conv2.", "out_layers.3."),
    ("conv_shortcut.", "skip_connection."),
)
_SELF_ATTENTION_PARTS = (
    ("group_norm.", "norm."),
    ("to_q.", "qkv."),
    ("to_k.", "qkv."),
    ("to_v.", "qkv."),
    ("to_out.0.", "proj_out."),
)
_VAE_PARTS = (
    ("group_norm.", "norm."),
    ("to_q.", "q."),
    ("to_k.", "k."),
    ("to_v.", "v."),
    ("to_out.0.", "proj_out."),
    ("conv_shortcut.", "nin_shortcut."),
)
_OLD_VAE_PARTS = (
    ("to_q.", "query."),
    ("to_k.", "key."),
    ("to_v.", "value."),
    ("to_out.0.", "proj_attn."),
)  # until 0.18
_OPENCLIP_PARTS = (
    ("embeddings.token_embedding.", "token_embedding."),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("layer_norm1.", "ln_1."),
    ("self_attn.q_proj.", "attn.in_proj_"),
    ("self_attn.k_proj.", "attn.in_proj_"),
    ("self_attn.v_proj.", "attn.in_proj_"),
    ("self_attn.out_proj.", "attn.out_proj."),
    ("layer_norm2.", "ln_2."),
    ("mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.c_proj."),
    ("final_layer_norm.", "ln_final."),
    ("text_projection.weight", "text_projection"),
)
_BERT_ENDS = (
    ("embeddings.token_embedding.", "token_emb."),
    ("embeddings.position_embedding.", "pos_emb.emb."),
    ("final_layer_norm.", "norm."),
)
_BERT_PARTS = {
    "layer_norm1": "0",
    "self_attn.q_proj": "1.to_q",
    "self_attn.k_proj": "1.to_k",
    "self_attn.v_proj": "1.to_v",
    "self_attn.out_proj": "1.to_out",
    "layer_norm2": "0",
    "mlp.fc1": "1.net.0.0",
    "mlp.fc2": "1.net.2",
}
_BERT_SECOND = ("layer_norm2", "mlp.fc1", "mlp.fc2")
_LDMBERT_ENDS = (
    ("embeddings.token_embedding.", "model.embed_tokens."),
    ("embeddings.position_embedding.", "model.embed_positions."),
    ("final_layer_norm.", "model.layer_norm."),
)  # diffusers' names
_LDMBERT_PARTS = {
    "layer_norm1": "self_attn_layer_norm",
    "layer_norm2": "final_layer_norm",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
}
_OPENCLIP_LAYERS = {"encoder.layers.": "transformer.resblocks."}

UNET_PREFIX = "model.diffusion_model."
EMA_PREFIX = "model_ema.diffusion_model"  # of the U-Net's weights averaged over its training
VAE_PREFIX = "first_stage_model."
TINY_PREFIX = "decoder.layers."  # of TAESD in diffusers' layout

# What original checkpoints carry beside the three parts: averages, schedule tables, losses. None is needed to sample.
# Nor are marks such as `v_pred`, which are read before.
IGNORED_ORIGINAL = re.compile(
    r"model_ema\.|betas$|alphas_cumprod|sqrt_|log_one_minus|posterior_|lvlb_weights$|logvar$|(first_stage_model\.)?loss\."
    r"|cond_stage_model\.(logit_scale$|transformer\.(vision_model\.|visual_projection|text_projection|logit_scale))"
    r"|conditioner\.embedders\.\d\.(logit_scale$|transformer\.(text_projection|logit_scale))"
    r"|.*\.model\.(logit_scale|attn_mask)$|(.*\.)?position_ids$|model_ema$|scale_factor$|global_step$|denoiser\.sigmas$"
    r"|v_pred$|ztsnr$|depth_model\.|low_scale_model\.|noise_augmentor\.|embedder\.|(cond_stage_model\.transformer\.)?to_logits\."
    r"|cond_stage_model\.(encoder\.|decoder\.|quant|post_quant|loss\.)"  # the first stage once more
)


def disk_names(
    keys: Iterable[str], config: NetworkConfig, prefix: str = "", *, original: bool, dotless: bool = False
) -> DiskNames:
    """For each of a network's canonical keys, the names it may have on disk, the likeliest first: in the `original`
    layout or in diffusers'; all behind `prefix`. Keys that share a name are stacked there, in the order of `keys`.
    `dotless`: without their dots, as averages are named."""
    names_of = _namer(config, original)
    named = {key: names_of(key) for key in keys}
    return {key: [prefix + (name.replace(".", "") if dotless else name) for name in named[key]] for key in named}


def stacked_heads(key: str, config: NetworkConfig) -> int:
    """Into how many groups the rows of what this canonical key shares a name with are divided, each with its part of
    every key: the heads of an attention without a context, whose queries, keys and values the original stacks head by
    head."""
    if not isinstance(config, UNetConfig) or config.context_dim or ".attentions." not in key:
        return 1
    way, number, *_ = key.split(".")
    level = {"down_blocks": number, "up_blocks": f"{len(config.heads) - 1}"}.get(way, "-1")
    return config.heads[int(level) - (int(number) if way == "up_blocks" else 0)]


def _namer(config: NetworkConfig, original: bool) -> Callable[[str], list[str]]:
    if isinstance(config, TinyVAEConfig):
        return lambda key: [_tiny_name(key, original)]
    if isinstance(config, TextEncoderConfig):
        if config.layout == "bert":
            return lambda key: [_bert_name(key, original)]
        if config.layout == "openclip":
            return lambda key: [_rename(key, _OPENCLIP_LAYERS, _OPENCLIP_PARTS)]
        return lambda key: [f"text_model.{key}", key]  # transformers had the first for nearly all until 5.6
    if isinstance(config, VAEConfig):
        if not original:
            return lambda key: [key, _replace_part(key, _OLD_VAE_PARTS) if ".attentions." in key else key]
        vae_blocks = _vae_blocks(config)
        return lambda key: [_rename(key, vae_blocks, _VAE_PARTS)]
    plain = isinstance(config, UNetConfig) and not config.context_dim
    if plain and not original:
        return lambda key: [key, _replace_part(key, _OLD_VAE_PARTS) if ".attentions." in key else key]
    if isinstance(config, UNetConfig) and not original:
        return lambda key: [key, key.replace("add_embedding.", "class_embedding.")]  # the latter of unCLIP
    if not original or isinstance(config, _SAME_NAMES):
        return lambda key: [key]
    if isinstance(config, AdapterConfig):
        return lambda key: [_adapter_name(key, config)]
    blocks = _control_blocks(config) if isinstance(config, ControlConfig) else _unet_blocks(config)
    parts: dict[str, tuple[tuple[str, str], ...]] = {
        ".resnets.": _UNET_PARTS,
        ".downsamplers.": _UNET_PARTS,
        ".upsamplers.": _UNET_PARTS,
    }
    # Transformer blocks have a norm1 and norm2 of their own, which both layouts call so.
    parts |= {".attentions.": _SELF_ATTENTION_PARTS} if plain else {}
    return lambda key: [_rename(key, blocks, next((parts[place] for place in parts if place in key), ()))]


def _bert_name(key: str, original: bool) -> str:
    """x-transformers' layers alternate between attention and what is fed forward, each behind a norm of its own."""
    layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
    if layer is None:
        return _replace_part(key, _BERT_ENDS if original else _LDMBERT_ENDS)
    number, name, leaf = int(layer[1]), layer[2], layer[3]
    if not original:
        return f"model.layers.{number}.{_LDMBERT_PARTS.get(name, name)}.{leaf}"
    return f"attn_layers.layers.{2 * number + (name in _BERT_SECOND)}.{_BERT_PARTS[name]}.{leaf}"


def _tiny_name(key: str, original: bool) -> str:
    """TAESD's layers are numbered; the original's layer 0 is the clamp, which diffusers does not count."""
    number, _, rest = key.removeprefix(TINY_PREFIX).partition(".")
    return f"{int(number) + original}.{rest}"


def _adapter_name(key: str, config: AdapterConfig) -> str:
    """Light adapters nest resnets in levels; full ones number all of them through."""
    key = key.removeprefix("adapter.")
    first, _, rest = key.partition(".")
    if first != "body":
        return key
    if config.light:
        return key.replace(".resnets.", ".body.")
    level, _, rest = rest.partition(".")
    if rest.startswith("resnets."):
        number, _, rest = rest.removeprefix("resnets.").partition(".")
    else:
        number = "0"
    return f"body.{int(level) * config.resnets + int(number)}.{rest}"


def is_transposed(disk_key: str) -> bool:
    """Whether a matrix lies on disk the other way round than a linear layer has it: OpenCLIP's projection, which is no
    layer's `weight`."""
    return disk_key.endswith(".text_projection") or disk_key == "text_projection"


def _unet_blocks(config: UNetConfig) -> dict[str, str]:
    count, levels = config.layers_per_block, len(config.block_channels)
    table = {
        "conv_in.": "input_blocks.0.0.",
        "time_embedding.linear_1.": "time_embed.0.",
        "time_embedding.linear_2.": "time_embed.2.",
        "time_embedding.cond_proj.": "time_embed.cond_proj.",
        "class_embedding.": "label_emb.",
        "add_embedding.linear_1.": "label_emb.0.0.",
        "add_embedding.linear_2.": "label_emb.0.2.",
        "conv_norm_out.": "out.0.",
        "conv_out.": "out.2.",
        "mid_block.resnets.0.": "middle_block.0.",
        "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.1.": "middle_block.2.",
    }
    for level in range(levels):
        for layer in range(count):
            block = 1 + level * (count + 1) + layer
            table[f"down_blocks.{level}.resnets.{layer}."] = f"input_blocks.{block}.0."
            table[f"down_blocks.{level}.attentions.{layer}."] = f"input_blocks.{block}.1."
        down, coarser = f"down_blocks.{level}.downsamplers.0.", f"input_blocks.{(level + 1) * (count + 1)}.0."
        table |= {down: coarser} if config.resnet_resampling else {f"{down}conv.": f"{coarser}op."}
        for layer in range(count + 1):
            block = level * (count + 1) + layer
            table[f"up_blocks.{level}.resnets.{layer}."] = f"output_blocks.{block}.0."
            table[f"up_blocks.{level}.attentions.{layer}."] = f"output_blocks.{block}.1."
        # The upsampler is the last thing in its block, after the attention where there is one.
        place = 2 if config.attention[levels - 1 - level] else 1
        up, last = f"up_blocks.{level}.upsamplers.0.", f"output_blocks.{level * (count + 1) + count}.{place}."
        table |= {up: last} if config.resnet_resampling else {f"{up}conv.": f"{last}conv."}
    return table


def _control_blocks(config: ControlConfig) -> dict[str, str]:
    hint, last = "controlnet_cond_embedding.", len(config.hint_channels)
    table = _unet_blocks(config.encoder) | {f"{hint}conv_in.": "input_hint_block.0."}
    for i in range(2 * (last - 1)):
        table[f"{hint}blocks.{i}."] = f"input_hint_block.{2 * (i + 1)}."
    table[f"{hint}conv_out."] = f"input_hint_block.{2 * (2 * last - 1)}."
    for i in range(len(config.encoder.skip_channels)):
        table[f"controlnet_down_blocks.{i}."] = f"zero_convs.{i}.0."
    return table | {"controlnet_mid_block.": "middle_block_out.0."}


def _vae_blocks(config: VAEConfig) -> dict[str, str]:
    table = {}
    levels = len(config.block_channels)
    for half, ways, layers in (("encoder", "down", 0), ("decoder", "up", 1)):
        table[f"{half}.conv_norm_out."] = f"{half}.norm_out."
        table[f"{half}.mid_block.resnets.0."] = f"{half}.mid.block_1."
        table[f"{half}.mid_block.attentions.0."] = f"{half}.mid.attn_1."
        table[f"{half}.mid_block.resnets.1."] = f"{half}.mid.block_2."
        for level in range(levels):
            # The original counts the decoder's levels from the finest, diffusers in the order they run.
            original = f"{half}.{ways}.{level if half == 'encoder' else levels - 1 - level}."
            canonical = f"{half}.{ways}_blocks.{level}."
            for layer in range(config.layers_per_block + layers):
                table[f"{canonical}resnets.{layer}."] = f"{original}block.{layer}."
                table[f"{canonical}attentions.{layer}."] = f"{original}attn.{layer}."
            table[f"{canonical}{ways}samplers.0.conv."] = f"{original}{ways}sample.conv."
    return table


def _rename(key: str, prefixes: dict[str, str], parts: tuple[tuple[str, str], ...]) -> str:
    """Translate the block a key is in by `prefixes`, and what follows by `parts`."""
    found = max((prefix for prefix in prefixes if key.startswith(prefix)), key=len, default="")
    return prefixes.get(found, "") + _replace_part(key.removeprefix(found), parts)


def _replace_part(key: str, parts: tuple[tuple[str, str], ...]) -> str:
    for canonical, original in parts:
        head, found, tail = key.rpartition(canonical)
        if found and (not head or head.endswith(".")):
            return head + original + tail
    return key
