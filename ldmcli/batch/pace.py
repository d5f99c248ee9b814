"""How fast pictures come, and how long the others will take."""

from collections import deque

_SPAN_S = 60.0  # the rate is that of this time before the last picture …
_LEAST = 50  # … and of so many pictures at least: those of a batch come all at once


class Pace:
    """The rate at which pictures came of late. Times are seconds of any clock, `start` when drawing began."""

    def __init__(self, start: float) -> None:
        self._since = start
        self._came: deque[float] = deque()

    def note(self, at: float) -> None:
        """A picture came, or failed."""
        self._came.append(at)
        while len(self._came) > _LEAST and self._came[0] < at - _SPAN_S:
            self._since = self._came.popleft()

    def per_second(self, now: float) -> float:
        """Pictures a second; 0 where none has come. Falls as long as none comes."""
        seconds = max(now, *self._came, self._since) - self._since if self._came else 0.0
        return len(self._came) / seconds if seconds > 0 else 0.0

    def seconds_left(self, pictures: float, now: float) -> float | None:
        """How long so many more take; None where that cannot be told yet."""
        rate = self.per_second(now)
        return pictures / rate if rate else None


def summary(per_second: float, seconds_left: float | None, failed: int) -> str:
    """Rate, time left and failures as a progress line has them, as far as there are any."""
    rate = ""
    if per_second:
        rate = f"{per_second:.1f} pictures/s" if per_second >= 1 else f"{1 / per_second:.1f} s/picture"
    left = "" if seconds_left is None else f"{_clock(seconds_left)} left"
    return ", ".join(filter(None, (rate, left, f"{failed} failed" if failed else "")))


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
