"""What runs on the GPU, in Triton's language. The only module that imports triton, and itself imported on first use.

Feature maps are given as (image, pixel, channel), channels last. All arithmetic is in float32, whatever is read and
written. Offsets to an image or a block are computed in 64 bits, those inside a block in 32. Numbers that vary from
layer to layer are not specialised on, so that a whole network needs few compilations; but for those that are multiples
of 16, by which Triton knows how much it may read at once. Parameters are many because a launch passes pointers and
numbers, nothing that could hold them together.
"""

import triton
from triton import language as tl


@triton.jit
def _to_groups(values: tl.tensor, members: tl.tensor) -> tl.tensor:
    """Sums over a block's rows and over each group's columns, (groups,)."""
    return tl.sum(tl.where(members, tl.sum(values, 0)[None, :], 0.0), 1)


@triton.jit
def _to_columns(values: tl.tensor, members: tl.tensor) -> tl.tensor:
    """Each column's group's value, (columns,)."""
    return tl.sum(tl.where(members, values[:, None], 0.0), 0)


@triton.jit
def _shift_of(
    shift: tl.tensor, shift_stride: tl.tensor, image: tl.tensor, channel: tl.tensor, inside: tl.tensor
) -> tl.tensor:
    """What is added to these channels of an image before its norm. `shift` has a row for each image, `shift_stride`
    apart; 0: one for all; negative: none."""
    return tl.load(shift + image * shift_stride + channel, mask=inside & (shift_stride >= 0), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["shift_stride", "pixels", "groups", "part_pixels"])
def part_moments(
    x: tl.tensor,
    shift: tl.tensor,
    means: tl.tensor,
    squares: tl.tensor,
    shift_stride: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    groups: tl.tensor,
    part_pixels: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOGETHER: tl.constexpr,
    MEMBERS: tl.constexpr,
) -> None:
    """Mean of each group in each part of an image's pixels, and the sum of squared distances from it, both (image,
    part, group): programs (parts, blocks of TOGETHER groups, images). A group is WIDTH channels; COLUMNS and MEMBERS
    are powers of two with room for a block's channels and groups."""
    part, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    row, column, group = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, MEMBERS)
    members = (column // WIDTH)[None, :] == group[:, None]
    channel = tl.program_id(1) * (TOGETHER * WIDTH) + column
    inside = (column < TOGETHER * WIDTH) & (channel < channels)
    added = _shift_of(shift, shift_stride, image, channel, inside)
    begin = part * part_pixels
    count = tl.minimum(part_pixels, pixels - begin)
    here = x + (image * pixels + begin) * channels
    offsets = row[:, None] * channels + channel[None, :]
    mean = tl.zeros((ROWS, COLUMNS), tl.float32)
    distances = tl.zeros((ROWS, COLUMNS), tl.float32)
    met = 0.0
    # Each place of the block has a mean of its own at first (Welford 1962), which no large mean can cancel.
    for first in range(0, count, ROWS):
        there = (first + row < count)[:, None]
        value = tl.load(here + offsets, mask=there & inside[None, :], other=0.0).to(tl.float32)
        met += 1.0
        away = tl.where(there, value + added[None, :] - mean, 0.0)
        step = away * (1.0 / met)
        mean += step
        distances += away * (away - step)
        here += ROWS * channels
    # Then those of a group are joined (Chan et al. 1983).
    number = ((count - row + ROWS - 1) // ROWS).to(tl.float32)[:, None]
    middle = _to_groups(mean * number, members) / (count * WIDTH).to(tl.float32)
    apart = tl.where(inside[None, :], mean - _to_columns(middle, members)[None, :], 0.0)
    inner = (group < TOGETHER) & (tl.program_id(1) * TOGETHER + group < groups)
    to = (image * tl.num_programs(0) + part) * groups + tl.program_id(1) * TOGETHER + group
    tl.store(means + to, middle, mask=inner)
    tl.store(squares + to, _to_groups(distances + apart * apart * number, members), mask=inner)


@triton.jit(do_not_specialize=["shift_stride", "activate", "pixels", "groups", "part_pixels"])
def norm_parts(
    x: tl.tensor,
    out: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    shift: tl.tensor,
    means: tl.tensor,
    squares: tl.tensor,
    shift_stride: tl.tensor,
    activate: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    groups: tl.tensor,
    part_pixels: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOGETHER: tl.constexpr,
    MEMBERS: tl.constexpr,
) -> None:
    """The norm with what `part_moments` gave, and SiLU of it where `activate` is 1: programs as there, and no more than
    PARTS parts."""
    part, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    row, column, group = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, MEMBERS)
    members = (column // WIDTH)[None, :] == group[:, None]
    channel = tl.program_id(1) * (TOGETHER * WIDTH) + column
    inside = (column < TOGETHER * WIDTH) & (channel < channels)
    # The parts' moments to the group's.
    inner = (group < TOGETHER) & (tl.program_id(1) * TOGETHER + group < groups)
    each = tl.arange(0, PARTS)[:, None]
    there = (each < tl.num_programs(0)) & inner[None, :]
    size = tl.where(there, (tl.minimum(part_pixels, pixels - each * part_pixels) * WIDTH).to(tl.float32), 0.0)
    moments = (image * tl.num_programs(0) + each) * groups + tl.program_id(1) * TOGETHER + group[None, :]
    mean = tl.load(means + moments, mask=there, other=0.0)
    within = tl.load(squares + moments, mask=there, other=0.0)
    total = (pixels * WIDTH).to(tl.float32)
    middle = tl.sum(mean * size, 0) / total
    apart = mean - middle[None, :]
    inverse = tl.rsqrt(tl.sum(within + apart * apart * size, 0) / total + eps)
    # What each channel is moved by and multiplied with.
    centre = _to_columns(middle, members) - _shift_of(shift, shift_stride, image, channel, inside)
    scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32) * _to_columns(inverse, members)
    offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    begin = part * part_pixels
    count = tl.minimum(part_pixels, pixels - begin)
    start = (image * pixels + begin) * channels
    read, write = x + start, out + start
    offsets = row[:, None] * channels + channel[None, :]
    for first in range(0, count, ROWS):
        mask = (first + row < count)[:, None] & inside[None, :]
        value = tl.load(read + offsets, mask=mask, other=0.0).to(tl.float32)
        value = (value - centre[None, :]) * scale[None, :] + offset[None, :]
        value = tl.where(activate > 0, value / (1.0 + tl.exp(-value)), value)
        tl.store(write + offsets, value.to(out.dtype.element_ty), mask=mask)
        read += ROWS * channels
        write += ROWS * channels


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


@triton.jit(do_not_specialize=["residuals", "rows"])
def add_and_norm_rows(
    h: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    norm_bias: tl.tensor,
    normed: tl.tensor,
    residuals: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """h + bias in place of h, with 1 of `residuals` that too, and its layer norm: programs (blocks of rows), COLUMNS
    channels at most."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, channel = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = channel < channels
    mask = (first + row < rows)[:, None] & inside[None, :]
    at = first * channels + row[:, None] * channels + channel[None, :]
    value = tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    value += tl.load(residual + at, mask=mask & (residuals > 0), other=0.0).to(tl.float32)
    tl.store(h + at, value.to(h.dtype.element_ty), mask=mask)
    apart = tl.where(mask, value - (tl.sum(value, 1) / channels)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(apart * apart, 1) / channels + eps)
    out = apart * scale[:, None] * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    out += tl.load(norm_bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(normed + at, out.to(normed.dtype.element_ty), mask=mask)
