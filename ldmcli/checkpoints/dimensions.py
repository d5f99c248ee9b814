"""A single file's configuration, read from the shapes of its tensors: such files carry no config.json."""

import re
from collections.abc import Mapping
from pathlib import Path

from ldmcli.checkpoints.families import LCM_DEFAULTS, Family, TextPart
from ldmcli.checkpoints.key_map import UNET_PREFIX, VAE_PREFIX
from ldmcli.config import ModelConfig, ScheduleConfig, TextEncoderConfig, UNetConfig, VAEConfig
from ldmcli.errors import BadDataError, printable

Shapes = Mapping[str, tuple[int, ...]]
_VAE_WIDTHS = (128, 256, 512, 512)  # of the autoencoder that Stable Diffusion 1, 2 and XL share
# Its tensors that tell dimensions, to stand for those of a checkpoint without its VAE.
USUAL_VAE: Shapes = {
    f"{VAE_PREFIX}decoder.conv_in.weight": (512, 4, 3, 3),
    f"{VAE_PREFIX}decoder.conv_out.weight": (3, 128, 3, 3),
    f"{VAE_PREFIX}post_quant_conv.weight": (4, 4, 1, 1),
    **{
        f"{VAE_PREFIX}decoder.up.{level}.block.{block}.conv1.weight": (width, width, 3, 3)
        for level, width in enumerate(_VAE_WIDTHS)
        for block in range(3)
    },
}
_NUMBER_DIM = 256  # sinusoids for each of SDXL's added numbers
_MAX_BLOCKS = 64  # Stable Diffusion's U-Net has 12; the time to look at a file grows with their number


def config_from_shapes(shapes: Shapes, family: Family, schedule: ScheduleConfig, path: Path) -> ModelConfig:
    """Dimensions of a checkpoint in the original layout; what shapes cannot tell (head counts, groups) is the family's.
    `schedule` is what else is known of the model.

    Raises BadDataError naming the tensor that is missing or of an unexpected rank.
    """
    try:
        unet = _unet(_under(shapes, UNET_PREFIX), family)
        return ModelConfig(
            family=family.name,
            unet=unet,
            vae=vae_from_shapes(
                _under(shapes, VAE_PREFIX), family.norm_groups, family.scaling_factor, force_upcast=family.force_upcast
            ),
            text_encoders=tuple(_text(_under(shapes, text.prefix), text) for text in family.texts),
            schedule=schedule,
            zero_empty_negative=family.zero_empty_negative,
            defaults=family.defaults if unet.guidance_dim is None else LCM_DEFAULTS,
        )
    except KeyError as error:
        raise BadDataError(
            f"{printable(str(path))} is incomplete: the tensor {printable(str(error.args[0]))} is missing."
        ) from None
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise BadDataError(
            f"{printable(str(path))} has tensors of shapes that fit no {family.name} model ({error})."
        ) from None


def _under(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def _count(shapes: Shapes, pattern: str) -> int:
    """How many different numbers `pattern`'s one group takes, counting from 0 without a gap."""
    found = {int(match[1]) for key in shapes if (match := re.match(pattern, key))}
    if len(found) > _MAX_BLOCKS:
        raise ValueError(f"{len(found)} blocks in one place")
    return next(i for i in range(len(found) + 1) if i not in found)


def _unet(shapes: Shapes, family: Family) -> UNetConfig:
    channels: list[int] = []
    depths: list[int] = []
    context_dim, linear = 0, False
    level_done = True
    for block in range(1, _count(shapes, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{block}.0.op.weight" in shapes:
            level_done = True
            continue
        depth = _count(_under(shapes, f"input_blocks.{block}.1."), r"transformer_blocks\.(\d+)\.")
        if level_done:
            channels.append(shapes[f"input_blocks.{block}.0.out_layers.3.weight"][0])
            depths.append(depth)
            level_done = False
        if depth:
            attention = f"input_blocks.{block}.1."
            context_dim = shapes[f"{attention}transformer_blocks.0.attn2.to_k.weight"][1]
            linear = len(shapes[f"{attention}proj_in.weight"]) == 2
    blocks = _count(shapes, r"input_blocks\.(\d+)\.")
    added = shapes["label_emb.0.0.weight"][1] if family.added_numbers else 0
    guidance = shapes.get("time_embed.cond_proj.weight")
    return UNetConfig(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["out.2.weight"][0],
        sample_size=family.sample_size,
        block_channels=tuple(channels),
        layers_per_block=blocks // len(channels) - 1,
        attention=tuple(depths),
        middle_attention=_count(_under(shapes, "middle_block.1."), r"transformer_blocks\.(\d+)\."),
        heads=tuple(family.heads or max(1, width // family.head_dim) for width in channels),
        context_dim=context_dim,
        norm_groups=family.norm_groups,
        linear_projection=linear,
        pooled_dim=added - family.added_numbers * _NUMBER_DIM if added else 0,
        added_numbers=family.added_numbers,
        added_number_dim=_NUMBER_DIM,
        guidance_dim=guidance[1] if guidance else None,
    )


def vae_from_shapes(
    shapes: Shapes, norm_groups: int, scaling_factor: float, *, force_upcast: bool = False
) -> VAEConfig:
    """An autoencoder's dimensions from its decoder's tensors in the original layout, without prefix: an encoder may be
    missing. Raises KeyError, IndexError, ValueError or ZeroDivisionError where they are none of one."""
    levels = _count(shapes, r"decoder\.up\.(\d+)\.")
    return VAEConfig(
        in_channels=shapes["encoder.conv_in.weight"][1] if "encoder.conv_in.weight" in shapes else 3,
        out_channels=shapes["decoder.conv_out.weight"][0],
        latent_channels=shapes["post_quant_conv.weight"][0],
        block_channels=tuple(shapes[f"decoder.up.{i}.block.0.conv1.weight"][0] for i in range(levels)),
        layers_per_block=_count(shapes, r"decoder\.up\.0\.block\.(\d+)\.") - 1,
        norm_groups=norm_groups,
        scaling_factor=scaling_factor,
        force_upcast=force_upcast,
    )


def _text(shapes: Shapes, text: TextPart) -> TextEncoderConfig:
    if text.layout == "openclip":
        return _openclip(shapes, text)
    shapes = {key.removeprefix("text_model."): shape for key, shape in shapes.items()}
    vocab_size, hidden = shapes["embeddings.token_embedding.weight"]
    return TextEncoderConfig(
        part=text.part,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=shapes["encoder.layers.0.mlp.fc1.weight"][0],
        layers=_count(shapes, r"encoder\.layers\.(\d+)\."),
        heads=max(1, hidden // 64),  # every CLIP text model has heads of 64
        max_length=shapes["embeddings.position_embedding.weight"][0],
        skipped_layers=text.skipped_layers,
        final_norm=text.final_norm,
    )


def _openclip(shapes: Shapes, text: TextPart) -> TextEncoderConfig:
    vocab_size, hidden = shapes["token_embedding.weight"]
    layers = _count(shapes, r"transformer\.resblocks\.(\d+)\.")
    return TextEncoderConfig(
        part=text.part,
        layout=text.layout,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        layers=layers,
        heads=max(1, hidden // 64),
        max_length=shapes["positional_embedding"][0],
        activation="gelu",
        skipped_layers=text.skipped_layers - (text.layers is not None and layers == text.layers - 1),
        final_norm=text.final_norm,
        projection_dim=shapes["text_projection"][1] if "text_projection" in shapes else None,
    )
