"""Decoding latents, and encoding pictures, in memory that does not grow with the picture, to the same numbers.

The usual tiling decodes square tiles apart and blends their edges. An autoencoder's group norms then see other
numbers in each tile, and each tile gets a tone of its own, up to tens of levels of 255 off. Here a layer is computed
for the whole picture before the next one is, strip by strip: norms see the whole picture and convolutions the rows
around the strip, so there are no seams to hide. What a layer makes goes into a FeatureMap, out of memory where it is
large; work space does not grow with the picture, and of the picture's own size only the result is in memory.

TAESD has no norms: each of its pixels depends on a bounded region, so tiles with that much margin are exact.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmcli.networks.feature_map import FeatureMap
from ldmcli.networks.layers import Downsample, ResnetBlock, Upsample
from ldmcli.networks.taesd import TinyVAE
from ldmcli.networks.vae import Autoencoder, Block, PixelAttention, Posterior

STRIP = 1 << 22  # numbers of a feature map that are worked on at a time, but ROWS rows at least:
ROWS = 16  # two more are computed for each strip
QUERIES = 1 << 12  # pixels that attend at a time, to STRIP / QUERIES others
TILE = 64  # latents along each side of what TAESD decodes at a time, margins apart


@torch.no_grad()
def decode_tiled(vae: Autoencoder | TinyVAE, latents: Tensor) -> Tensor:
    """What `vae.decode` gives for latents (batch, channels, height, width), but for rounding. Raises StorageError where
    the folder for temporary files has too little room."""
    if isinstance(vae, TinyVAE):
        return _decode_in_tiles(vae, latents)
    batch, _, height, width = latents.shape
    image = torch.empty(
        (batch, vae.config.out_channels, height * vae.config.factor, width * vae.config.factor),
        dtype=latents.dtype,
        device=latents.device,
        memory_format=torch.channels_last,
    )
    for one, into in zip(latents.split(1), image.split(1), strict=True):
        _decode(vae, one, into)
    return image


def _decode(vae: Autoencoder, latents: Tensor, image: Tensor) -> None:
    """Decode one picture's latents into `image`."""
    decoder = vae.decoder
    channels, height, width = decoder.conv_in.out_channels, *latents.shape[2:]
    latents = vae.quantized(latents).contiguous(memory_format=torch.channels_last)
    x = FeatureMap(channels, height, width, like=latents)
    for a, _, rows, inside in _strips(height, channels * width):
        x.write(a, decoder.conv_in(vae.post_quant_conv(latents[:, :, rows]))[:, :, inside])
    x = _through(_layers(decoder.mid_block, *decoder.up_blocks), x)
    norm = x.norm(decoder.conv_norm_out)
    for a, b, rows, inside in _strips(x.height, x.width * x.channels):
        strip = F.silu(norm(x.read(rows)), inplace=True)
        image[:, :, a:b] = decoder.conv_out(strip)[:, :, inside]


@torch.no_grad()
def encode_tiled(vae: Autoencoder, images: Tensor) -> Posterior:
    """What `vae.encode` gives for images (batch, 3, height, width), but for rounding. Raises as `decode_tiled` does."""
    return vae.posterior(torch.cat([_encode(vae, one) for one in images.split(1)]))


def _encode(vae: Autoencoder, image: Tensor) -> Tensor:
    """The moments of one picture."""
    encoder = vae.encoder
    channels, height, width = encoder.conv_in.out_channels, *image.shape[2:]
    image = image.contiguous(memory_format=torch.channels_last)
    x = FeatureMap(channels, height, width, like=image)
    for a, _, rows, inside in _strips(height, channels * width):
        x.write(a, encoder.conv_in(image[:, :, rows])[:, :, inside])
    x = _through(_layers(*encoder.down_blocks, encoder.mid_block), x)
    norm = x.norm(encoder.conv_norm_out)
    moments = [
        encoder.conv_out(F.silu(norm(x.read(rows)), inplace=True))[:, :, inside]
        for _, _, rows, inside in _strips(x.height, x.width * x.channels)
    ]
    return vae.quant_conv(torch.cat(moments, dim=2))


def _layers(*blocks: nn.Module) -> list[nn.Module]:
    return [layer for block in blocks for layer in cast(Block, block).layers]


def _through(layers: Iterable[nn.Module], x: FeatureMap) -> FeatureMap:
    """What layers make of x, which is lost, in the order they run."""
    for layer in layers:
        if isinstance(layer, ResnetBlock):
            x = _resnet(layer, x)
        elif isinstance(layer, PixelAttention):
            _attend(layer, x)
        elif isinstance(layer, Upsample):
            x = _upsample(layer, x)
        elif isinstance(layer, Downsample):
            x = _downsample(layer, x)
    return x


def _strips(height: int, per_row: int) -> list[tuple[int, int, slice, slice]]:
    """Strips of a map's rows, of about STRIP numbers where a row has `per_row`: from and to before which row; the rows
    that hold these and one more on either side, for a 3×3 convolution; where in those the strip is.

    Beyond the edges of the map there are no rows: there the convolution's own zeros are right. The rows are as many for
    each strip: a layer laid out for one shape (speed/cpu/onednn.py) is then laid out once.
    """
    most = max(ROWS, STRIP // per_row)
    count = math.ceil(height / most)
    if count == 1:
        return [(0, height, slice(0, height), slice(0, height))]
    each = math.ceil(height / count)
    window = min(each + 2, height)
    strips = []
    for a in range(0, height, each):
        b = min(a + each, height)
        first = min(max(a - 1, 0), height - window)
        strips.append((a, b, slice(first, first + window), slice(a - first, b - first)))
    return strips


def _parts(height: int, rows: int) -> Iterator[tuple[int, int]]:
    """So many rows at a time, from and to before which."""
    return itertools.pairwise([*range(0, height, max(rows, 1)), height])


def _resnet(block: ResnetBlock, x: FeatureMap) -> FeatureMap:
    """What `block` makes of x, which is lost."""
    shortcut = block.conv_shortcut
    out = x if shortcut is None else x.beside(block.conv2.out_channels)
    hidden = x.beside(out.channels)
    strips = _strips(x.height, x.width * max(x.channels, out.channels))
    norm = x.norm(block.norm1)
    # From the end, so that room is given up with every strip.
    for a, _, rows, inside in reversed(strips):
        before = x.read(rows)
        hidden.write(a, block.conv1(F.silu(norm(before), inplace=True))[:, :, inside])
        if shortcut is not None:
            out.put(a, shortcut(before[:, :, inside]))
            x.cut(a + 2)  # the strip above reads two rows of this one at most
    norm = hidden.norm(block.norm2)
    for a, b, rows, inside in reversed(strips):
        strip = block.conv2(F.silu(norm(hidden.read(rows)), inplace=True))[:, :, inside]
        out.write(a, strip.add_(out.read(slice(a, b))))
        hidden.cut(a + 2)
    return out


def _upsample(layer: Upsample, x: FeatureMap) -> FeatureMap:
    """x at twice its size, as `layer` makes it; x is lost."""
    out = x.beside(layer.conv.out_channels, scale=2)
    for a, _, rows, inside in reversed(_strips(x.height, out.width * 2 * out.channels)):
        out.write(2 * a, layer(x.read(rows))[:, :, 2 * inside.start : 2 * inside.stop])
        x.cut(a + 2)
    return out


def _downsample(layer: Downsample, x: FeatureMap) -> FeatureMap:
    """x at half its size, as `layer` makes it, with zeros right of it and below."""
    out = x.beside(layer.conv.out_channels, scale=0.5)
    for a, b in _parts(out.height, max(ROWS, STRIP // (x.width * x.channels)) // 2):
        end = min(2 * b + 1, x.height)
        out.write(a, layer.conv(F.pad(x.read(slice(2 * a, end)), (0, 1, 0, 2 * b + 1 - end))))
    return out


def _attend(block: PixelAttention, x: FeatureMap) -> None:
    """Let the pixels of x attend to each other, in place."""
    both = 2 * x.channels  # keys and values
    norm = x.norm(block.group_norm)
    if both * x.height * x.width <= STRIP:
        x.write(0, block(x.read(slice(0, x.height))))
        return
    keys_values = x.beside(both)
    for a, b in _parts(x.height, STRIP // both // x.width):
        tokens = _tokens(norm(x.read(slice(a, b))))
        keys_values.put(a, _rows(torch.cat([block.to_k(tokens), block.to_v(tokens)], -1), x.width))
    for a, b in _parts(x.height, QUERIES // x.width):
        before = x.read(slice(a, b))
        query = block.to_q(_tokens(norm(before)))
        x.write(a, before + _rows(block.to_out[0](_attention(query, keys_values)), x.width))


def _attention(query: Tensor, keys_values: FeatureMap) -> Tensor:
    """What queries (tokens, channels) find in a map of keys and values, looked at in parts: the softmax's maximum and
    sum are carried along (Milakov and Gimelshein 2018; Rabe and Staats 2021)."""
    wide = torch.promote_types(query.dtype, torch.float32)
    query = query * query.shape[1] ** -0.5
    out = query.new_zeros(query.shape, dtype=wide)
    total = out.new_zeros(len(query), 1)
    top = out.new_full((len(query), 1), -torch.inf)
    for a, b in _parts(keys_values.height, STRIP // QUERIES // keys_values.width):
        key, value = _tokens(keys_values.read(slice(a, b))).chunk(2, 1)
        scores = (query @ key.T).to(wide)
        higher = torch.maximum(top, scores.amax(1, keepdim=True))
        weights = scores.sub_(higher).exp_()
        fade = (top - higher).exp_()
        total = total * fade + weights.sum(1, keepdim=True)
        out.mul_(fade).add_(weights.to(value.dtype) @ value)
        top = higher
    return out.div_(total).to(query.dtype)


def _tokens(rows: Tensor) -> Tensor:
    """Rows (1, channels, any, width) as (any · width, channels)."""
    return rows.permute(0, 2, 3, 1).flatten(0, 2)


def _rows(tokens: Tensor, width: int) -> Tensor:
    """`_tokens` back to rows."""
    return tokens.unflatten(0, (1, -1, width)).permute(0, 3, 1, 2)


def _decode_in_tiles(vae: TinyVAE, latents: Tensor) -> Tensor:
    """TAESD's decode, tile by tile, each with as many latents around it as its pixels depend on."""
    factor, margin = vae.config.factor, receptive_field(vae.config.blocks)
    height, width = latents.shape[2:]
    image = latents.new_empty(latents.shape[0], vae.config.out_channels, height * factor, width * factor)
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            bottom, right = min(top + TILE, height), min(left + TILE, width)
            first_row, first_column = max(top - margin, 0), max(left - margin, 0)
            tile = vae.decode(latents[:, :, first_row : bottom + margin, first_column : right + margin])
            rows = slice((top - first_row) * factor, (bottom - first_row) * factor)
            columns = slice((left - first_column) * factor, (right - first_column) * factor)
            image[:, :, top * factor : bottom * factor, left * factor : right * factor] = tile[:, :, rows, columns]
    return image


def receptive_field(blocks: tuple[int, ...]) -> int:
    """How many latents away a pixel of TAESD depends on at most, for that many blocks at each resolution."""
    # Each level begins with a convolution, each block has three, and the last level has one more behind.
    pixels = [1 + 3 * count for count in blocks]
    pixels[-1] += 1
    return math.ceil(sum(reach / 2**level for level, reach in enumerate(pixels)))
