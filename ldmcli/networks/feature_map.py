"""Feature maps of which only some rows are needed at a time: in memory while they are small, else out of the way.

A map of more than KEPT bytes is kept in a temporary file without a name, so that it takes none of the process's memory:
the kernel holds it in its page cache while there is room for it, and nothing of it is left when the process ends, by
whatever means. For a GPU, such a map is kept in the host's memory instead.
"""

import contextlib
import errno
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import GroupNorm

from ldmcli.errors import StorageError, printable

KEPT = 1 << 26  # bytes of a map up to which it stays where it is worked on


class FeatureMap:
    """A map (1, channels, height, width) of the kind and on the device of `like`, written and read by rows.

    Its channels' means and variances, which a group norm needs, are gathered as the rows are written.
    """

    def __init__(self, channels: int, height: int, width: int, *, like: Tensor) -> None:
        """Raises StorageError."""
        self.channels, self.height, self.width = channels, height, width
        self._like = like
        # Of the rows written so far. Room for them is taken once: small tensors that stay, one after each strip's large
        # ones, would keep the C library from reusing the place of these, and memory would grow after all.
        self._counted = 0
        wide = torch.promote_types(like.dtype, torch.float32)
        self._mean, self._variance = torch.zeros((2, channels), dtype=wide, device=like.device)
        self._whole: Tensor | None = None
        small = channels * height * width * like.element_size() <= KEPT
        if small or like.device.type != "cpu":
            self._whole = self._empty(height, like.device if small else torch.device("cpu"))
        else:
            self._folder = "the folder for temporary files"
            with self._storing():
                self._folder = _roomy_folder()
                # Open as long as the map is there.
                self._file = tempfile.TemporaryFile(buffering=0, dir=self._folder)  # noqa: SIM115
            weakref.finalize(self, self._file.close)

    def beside(self, channels: int, scale: float = 1) -> "FeatureMap":
        """An unwritten map of this one's kind, `scale` times as high and wide."""
        return FeatureMap(channels, int(scale * self.height), int(scale * self.width), like=self._like)

    def read(self, rows: slice) -> Tensor:
        """Some rows, (1, channels, any, width); not to be changed. Raises StorageError."""
        if self._whole is not None:
            return self._whole[:, :, rows].to(self._like.device)
        found = self._empty(rows.stop - rows.start)
        with self._storing():
            self._file.seek(rows.start * self._row)
            _transfer(self._file.readinto, found)
        return found

    def write(self, a: int, rows: Tensor) -> None:
        """Put rows, (1, channels, any, width), at a. Raises StorageError."""
        pixels = rows.permute(0, 2, 3, 1).flatten(0, 2).to(self._mean.dtype)
        mean = pixels.mean(0)
        self._counted += rows.shape[2]
        share = rows.shape[2] / self._counted
        # torch.var says the same as this mean of squares; over this axis it takes four times as long.
        new = (pixels - mean).square_().mean(0).sub_(self._variance)
        away = mean.sub_(self._mean)
        # Moments of parts to those of all: the variance is the mean one plus that of the means (Chan et al. 1983).
        self._variance.add_(new, alpha=share).addcmul_(away, away, value=share * (1 - share))
        self._mean.add_(away, alpha=share)
        self.put(a, rows)

    def put(self, a: int, rows: Tensor) -> None:
        """As `write`, for rows that will be written over before a norm asks for them."""
        if self._whole is not None:
            self._whole[:, :, a : a + rows.shape[2]] = rows
            return
        with self._storing():
            self._file.seek(a * self._row)
            _transfer(self._file.write, rows.contiguous(memory_format=torch.channels_last))

    def cut(self, a: int) -> None:
        """Give up the rows from a on, and the room that they take in a file."""
        if self._whole is None:
            self._file.truncate(a * self._row)

    def norm(self, norm: GroupNorm) -> Callable[[Tensor], Tensor]:
        """The group norm of the whole map, which has been written once since the last norm, for rows of it."""
        mean, variance = (part.unflatten(0, (norm.num_groups, -1)) for part in (self._mean, self._variance))
        total = mean.mean(1, keepdim=True)
        variance = (variance + (mean - total) ** 2).mean(1, keepdim=True)
        scale = (variance + norm.eps).rsqrt().expand_as(mean).flatten() * norm.weight
        shift = norm.bias - total.expand_as(mean).flatten() * scale
        scale, shift = scale[:, None, None], shift[:, None, None]
        self._counted = 0
        self._mean.zero_()
        self._variance.zero_()
        return lambda rows: (rows * scale).add_(shift).to(rows.dtype)

    @property
    def _row(self) -> int:
        """Bytes in a row."""
        return self.channels * self.width * self._like.element_size()

    def _empty(self, rows: int, device: torch.device | None = None) -> Tensor:
        shape = (1, self.channels, rows, self.width)
        last = torch.channels_last  # so that rows of a single map lie in one piece
        return torch.empty(shape, dtype=self._like.dtype, device=device or self._like.device, memory_format=last)

    @contextlib.contextmanager
    def _storing(self) -> Iterator[None]:
        """What goes wrong with the file inside the block is a StorageError."""
        try:
            yield
        except OSError as error:
            size = f"{self._row * self.height / 1e6:,.0f} MB"
            raise StorageError(
                f"a temporary file of {size} for the autoencoder, in {printable(self._folder)}, failed "
                f"({error.strerror or error}); make room there, or set TMPDIR to a folder on a disk with more."
            ) from None


def _transfer(move: Callable[[memoryview], int | None], rows: Tensor) -> None:
    """Move rows (1, channels, any, width), channels last, from or to a file."""
    left = memoryview(rows.permute(0, 2, 3, 1).flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
    while left:  # Linux moves 2 GiB at a time at most
        done = move(left)
        if not done:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        left = left[done:]


def _roomy_folder() -> str:
    """Where temporary files go: TMPDIR, else /var/tmp, because /tmp is in memory on many systems."""
    if os.environ.get("TMPDIR") or not os.access("/var/tmp", os.W_OK | os.X_OK):
        return tempfile.gettempdir()
    return "/var/tmp"
