"""What runs on the GPU, in Triton's language. The only module that imports triton, and itself imported on first use.

Feature maps are given as (image, pixel, channel), channels last. All arithmetic is in float32, whatever is read and
written. Offsets to an image or a block are computed in 64 bits, those inside a block in 32. Numbers that vary from
layer to layer are not specialised on, so that a whole network needs few compilations. Parameters are many because a
launch passes pointers and numbers, nothing that could hold them together.
"""

import triton
from triton import language as tl


@triton.jit
def _moments(
    here: tl.tensor,
    pixels: tl.tensor,
    inside: tl.tensor,
    offsets: tl.tensor,
    row: tl.tensor,
    step: tl.tensor,
    ROWS: tl.constexpr,
) -> tl.tensor:
    """For each place of a block that is moved over `pixels` rows, ROWS at a time: how many numbers it met, their mean
    and the sum of their squared distances from it (Welford 1962), which no large mean can cancel."""
    mean = tl.zeros_like(offsets).to(tl.float32)
    squares = tl.zeros_like(mean)
    met = 0.0
    for first in range(0, pixels, ROWS):
        mask = (first + row < pixels)[:, None] & inside[None, :]
        value = tl.load(here + offsets, mask=mask, other=0.0).to(tl.float32)
        met += 1.0
        away = value - mean
        mean = tl.where(mask, mean + away * (1.0 / met), mean)
        squares = tl.where(mask, squares + away * (value - mean), squares)
        here += step
    count = ((pixels - row + ROWS - 1) // ROWS).to(tl.float32)
    return tl.where(inside[None, :], count[:, None], 0.0), mean, squares


@triton.jit(do_not_specialize=["shift_stride", "activate", "pixels"])
def norm_group(
    x: tl.tensor,
    out: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    shift: tl.tensor,
    shift_stride: tl.tensor,
    activate: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The whole norm of one group of one image: programs (groups, images). `shift` has a row for each image,
    `shift_stride` apart; 0: one for all; negative: none."""
    group, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    width = channels // tl.num_programs(0)
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    start = image * pixels * channels + group * width
    offsets = row[:, None] * channels + column[None, :]
    step = ROWS * channels
    total, middle, squares = 0.0, 0.0, 0.0
    for left in range(0, width, COLUMNS):
        inside = left + column < width
        added = _shift_of(shift, shift_stride, image, group * width + left + column, inside)
        count, mean, within = _moments(x + start + left, pixels, inside, offsets, row, step, ROWS)
        size = tl.sum(count)
        mean += added[None, :]
        here = tl.sum(count * mean) / size
        apart = mean - here
        # These channels with those before (Chan et al. 1983).
        away = here - middle
        squares += tl.sum(within + count * apart * apart) + away * away * (total * size / (total + size))
        total += size
        middle += away * (size / total)
    inverse = tl.rsqrt(squares / total + eps)
    for left in range(0, width, COLUMNS):
        inside = left + column < width
        channel = group * width + left + column
        centre = middle - _shift_of(shift, shift_stride, image, channel, inside)
        scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32) * inverse
        offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
        read, write = x + start + left, out + start + left
        for first in range(0, pixels, ROWS):
            mask = (first + row < pixels)[:, None] & inside[None, :]
            value = tl.load(read + offsets, mask=mask, other=0.0).to(tl.float32)
            value = _finished(value, centre, scale, offset, activate)
            tl.store(write + offsets, value.to(out.dtype.element_ty), mask=mask)
            read += step
            write += step


@triton.jit(do_not_specialize=["pixels", "part_pixels"])
def channel_moments(
    x: tl.tensor,
    means: tl.tensor,
    squares: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    part_pixels: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Mean and sum of squared distances from it, (image, part, channel), of each channel in each part of an image's
    pixels: programs (parts, blocks of channels, images)."""
    part, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    row, column = tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < channels
    offsets = row[:, None] * channels + column[None, :]
    first = part * part_pixels
    here = x + (image * pixels + first) * channels
    size = tl.minimum(part_pixels, pixels - first)
    count, mean, distances = _moments(here, size, inside, offsets, row, ROWS * channels, ROWS)
    middle = tl.sum(count * mean, 0) / size.to(tl.float32)
    apart = mean - middle[None, :]
    to = (image * tl.num_programs(0) + part) * channels + column
    tl.store(means + to, middle, mask=inside)
    tl.store(squares + to, tl.sum(distances + count * apart * apart, 0), mask=inside)


@triton.jit(do_not_specialize=["shift_stride", "pixels", "parts", "part_pixels"])
def group_moments(
    means: tl.tensor,
    squares: tl.tensor,
    weight: tl.tensor,
    shift: tl.tensor,
    shift_stride: tl.tensor,
    centres: tl.tensor,
    scales: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    parts: tl.tensor,
    part_pixels: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """From what `channel_moments` gave, what to subtract from each channel and what to multiply it by then, (image,
    channel): programs (groups, images)."""
    group, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    width = channels // tl.num_programs(0)
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    start = image * parts * channels
    total = (pixels * width).to(tl.float32)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for left in range(0, width, COLUMNS):
        inside = left + column < width
        channel = group * width + left + column
        added = _shift_of(shift, shift_stride, image, channel, inside)
        for first in range(0, parts, ROWS):
            part = first + row
            mask = (part < parts)[:, None] & inside[None, :]
            size = tl.minimum(part_pixels, pixels - part * part_pixels).to(tl.float32)
            mean = tl.load(means + start + part[:, None] * channels + channel[None, :], mask=mask, other=0.0)
            sums += tl.where(mask, (mean + added[None, :]) * size[:, None], 0.0)
    middle = tl.sum(sums) / total
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for left in range(0, width, COLUMNS):
        inside = left + column < width
        channel = group * width + left + column
        centre = middle - _shift_of(shift, shift_stride, image, channel, inside)
        for first in range(0, parts, ROWS):
            part = first + row
            mask = (part < parts)[:, None] & inside[None, :]
            size = tl.minimum(part_pixels, pixels - part * part_pixels).to(tl.float32)
            offsets = part[:, None] * channels + channel[None, :]
            apart = tl.load(means + start + offsets, mask=mask, other=0.0) - centre[None, :]
            within = tl.load(squares + start + offsets, mask=mask, other=0.0)
            sums += tl.where(mask, within + apart * apart * size[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(sums) / total + eps)
    for left in range(0, width, COLUMNS):
        inside = left + column < width
        channel = group * width + left + column
        centre = middle - _shift_of(shift, shift_stride, image, channel, inside)
        scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32) * inverse
        tl.store(centres + image * channels + channel, centre, mask=inside)
        tl.store(scales + image * channels + channel, scale, mask=inside)


@triton.jit(do_not_specialize=["activate", "pixels"])
def norm_map(
    x: tl.tensor,
    out: tl.tensor,
    centres: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    activate: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The norm with what `group_moments` gave: programs (blocks of pixels, blocks of channels, images)."""
    first, image = tl.program_id(0) * ROWS, tl.program_id(2).to(tl.int64)
    row, channel = tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = channel < channels
    mask = (first + row < pixels)[:, None] & inside[None, :]
    start = (image * pixels + first) * channels
    offsets = row[:, None] * channels + channel[None, :]
    centre = tl.load(centres + image * channels + channel, mask=inside, other=0.0)
    scale = tl.load(scales + image * channels + channel, mask=inside, other=0.0)
    offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + start + offsets, mask=mask, other=0.0).to(tl.float32)
    value = _finished(value, centre, scale, offset, activate)
    tl.store(out + start + offsets, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _shift_of(
    shift: tl.tensor, shift_stride: tl.tensor, image: tl.tensor, channel: tl.tensor, inside: tl.tensor
) -> tl.tensor:
    """What is added to these channels of an image before its norm."""
    return tl.load(shift + image * shift_stride + channel, mask=inside & (shift_stride >= 0), other=0.0).to(tl.float32)


@triton.jit
def _finished(
    value: tl.tensor, centre: tl.tensor, scale: tl.tensor, offset: tl.tensor, activate: tl.tensor
) -> tl.tensor:
    """Normed values, and SiLU of them where `activate` is 1."""
    value = (value - centre[None, :]) * scale[None, :] + offset[None, :]
    return tl.where(activate > 0, value / (1.0 + tl.exp(-value)), value)


@triton.jit(do_not_specialize=["rows"])
def gate(
    x: tl.tensor, out: tl.tensor, rows: tl.tensor, inner: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr
) -> None:
    """value · gelu(gate) of rows that hold `inner` values and their gates: programs (blocks of rows, of columns)."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, column = tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (first + row < rows)[:, None] & (column < inner)[None, :]
    offsets = row[:, None] * inner + column[None, :]
    values = x + first * 2 * inner + offsets + row[:, None] * inner
    value = tl.load(values, mask=mask, other=0.0).to(tl.float32)
    opening = tl.load(values + inner, mask=mask, other=0.0).to(tl.float32)
    opening = 0.5 * opening * (1.0 + tl.erf(opening * 0.7071067811865476))
    tl.store(out + first * inner + offsets, (value * opening).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["biases", "rows"])
def add_rows(
    h: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    residual_bias: tl.tensor,
    biases: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """h + bias + residual in place of h, and with 2 `biases` the residual's own: programs (blocks of rows, of
    channels)."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, channel = tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = channel < channels
    mask = (first + row < rows)[:, None] & inside[None, :]
    offsets = row[:, None] * channels + channel[None, :]
    added = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    added += tl.load(residual_bias + channel, mask=inside & (biases > 1), other=0.0).to(tl.float32)
    here = h + first * channels + offsets
    value = tl.load(here, mask=mask, other=0.0).to(tl.float32) + added[None, :]
    value += tl.load(residual + first * channels + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(here, value.to(h.dtype.element_ty), mask=mask)
