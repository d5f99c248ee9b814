"""Edges of a picture (Canny 1986), as OpenCV finds them."""

import numpy as np

_TAN = 13573  # tan 22.5° in units of 2 ** -15, as OpenCV has it


def canny(pixels: np.ndarray, low: int, high: int) -> np.ndarray:
    """Where a picture (height, width) or (height, width, 3), uint8, has edges: (height, width) uint8, 0 or 255. Pixels
    whose gradient is over `high` begin edges, those over `low` go on with them. Bit for bit `cv2.Canny(pixels, low,
    high)`: Sobel's 3×3 gradients with repeated borders, of the strongest channel, measured by |dx| + |dy|."""
    dx, dy = _sobel(pixels)
    size = np.abs(dx) + np.abs(dy)
    if pixels.ndim == 3:
        strongest = size.argmax(2)[..., None]
        dx, dy, size = (np.take_along_axis(each, strongest, 2)[..., 0] for each in (dx, dy, size))
    peaks = (size > low) & _is_peak(dx, dy, size)
    return np.where(_connected(peaks, size > high), 255, 0).astype(np.uint8)


def _sobel(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    padded = np.pad(pixels.astype(np.int32), [(1, 1), (1, 1), *[(0, 0)] * (pixels.ndim - 2)], mode="edge")
    across = padded[:, 2:] - padded[:, :-2]
    along = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    return across[:-2] + 2 * across[1:-1] + across[2:], along[2:] - along[:-2]


def _is_peak(dx: np.ndarray, dy: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Where a gradient is larger than its two neighbours along its own direction, one of four; of two equal ones, the
    one behind is."""
    around = np.pad(size, 1)
    height, width = size.shape

    def at(down: int, right: int) -> np.ndarray:
        return around[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    x, y = np.abs(dx).astype(np.int64), np.abs(dy).astype(np.int64) << 15
    flat = y < x * _TAN
    steep = y > x * _TAN + (x << 16)
    rising = (dx ^ dy) < 0
    horizontal = (size > at(0, -1)) & (size >= at(0, 1))
    vertical = (size > at(-1, 0)) & (size >= at(1, 0))
    falling_slope = (size > at(-1, -1)) & (size > at(1, 1))
    rising_slope = (size > at(-1, 1)) & (size > at(1, -1))
    return np.where(flat, horizontal, np.where(steep, vertical, np.where(rising, rising_slope, falling_slope)))


def _connected(peaks: np.ndarray, strong: np.ndarray) -> np.ndarray:
    """The peaks that hang together with a strong one, by sides or corners: a flood from those, one ring at a time."""
    left = np.pad(peaks, 1)
    width = left.shape[1]
    steps = np.array([-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1])
    flat, found = left.reshape(-1), np.zeros(left.size, bool)
    front = np.flatnonzero(np.pad(peaks & strong, 1))
    while front.size:
        found[front] = True
        flat[front] = False
        around = np.unique(front[:, None] + steps)
        front = around[flat[around]]
    return found.reshape(left.shape)[1:-1, 1:-1]
