"""What options take: how their texts become values."""

import re
from typing import Any, ClassVar

import click

from ldmcli.errors import UsageError, printable
from ldmcli.images.formats import FORMATS
from ldmcli.sampling.names import nearest_sampler, sampler_of, schedule_of
from ldmcli.spec import LoRA

_UNITS = {"s": 1, "m": 60, "h": 3600, "": 1}


class Duration(click.ParamType):
    """A time such as 90s, 10m or 1.5h, in seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", str(value), re.ASCII)
        if found is None:
            raise click.BadParameter(f"{printable(repr(value))} is not a time such as 90s, 55m or 1.5h.", ctx, param)
        return float(found[1]) * _UNITS[found[2]]


class Device(click.ParamType):
    name = "auto|cpu|cuda[:N]"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        kind, colon, number = value.partition(":")
        if value in ("auto", "cpu", "cuda") or (kind == "cuda" and colon and number.isascii() and number.isdigit()):
            return value
        raise click.BadParameter(f"{printable(repr(value))} is not auto, cpu, cuda or cuda:N.", ctx, param)


class Interval(click.ParamType):
    name = "low:high"

    def convert(
        self, value: str | tuple[float, float], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, float]:
        if isinstance(value, tuple):
            return value
        low, colon, high = value.partition(":")
        try:
            if colon:
                return float(low), float(high)
        except ValueError:
            pass
        raise click.BadParameter(f"{printable(repr(value))} is not two numbers with a colon between.", ctx, param)


class LoRAText(click.ParamType):
    """A file, folder or name with one or two weights after colons."""

    name = "lora"
    envvar_list_splitter = ";"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> LoRA:
        try:
            return LoRA.read(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


class Sampler(click.Choice[str]):
    """A sampler by any program's name, which may say the schedule too: `dpmpp-2m karras`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        named = sampler_of(value)
        if not named and (near := nearest_sampler(value)):
            self.fail(f"{printable(repr(value))} is not drawn with here; {near} is the nearest.", param, ctx)
        return " ".join(filter(None, named)) if named else super().convert(value, param, ctx)


class Schedule(click.Choice[str]):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(schedule_of(value) or value, param, ctx)


class Name(click.types.StringParamType):
    """A text that may be given again; in the environment, with semicolons between."""

    envvar_list_splitter = ";"


class Attention(click.Choice[str]):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        # What there was once passes: whoever chooses the runtime says why it is gone.
        return value if value == "measured" else super().convert(value, param, ctx)


class ImageFormat(click.Choice[str]):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert("jpeg" if value == "jpg" else value, param, ctx)


class Whole(click.types.StringParamType):
    """A text that may be given again; in the environment, one alone."""

    envvar_list_splitter = "\0"


class Size(click.ParamType):
    name = "wxh"

    def convert(
        self, value: str | tuple[int, int], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"\s*(\d{1,9})\s*[x×*:,]\s*(\d{1,9})\s*", value, re.ASCII | re.IGNORECASE)
        side = re.fullmatch(r"\d{1,9}", value, re.ASCII)
        if not (found or side):
            raise click.BadParameter(f"{printable(repr(value))} is not WIDTHxHEIGHT, such as 512x768.", ctx, param)
        return (int(found[1]), int(found[2])) if found else (int(value), int(value))


class Seed(click.types.IntParamType):
    """A whole number, or -1 for a random one, which is None."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seed = super().convert(value, param, ctx)
        return None if seed == -1 else seed


class Prediction(click.Choice[str]):
    """What a U-Net predicts, in its short and its long names."""

    _LONG: ClassVar = {"eps": "epsilon", "v": "v_prediction", "sample": "sample"}

    def __init__(self) -> None:
        super().__init__(list(self._LONG))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        short = {long: name for name, long in self._LONG.items()}.get(str(value).replace("-", "_"), value)
        return self._LONG[super().convert(short, param, ctx)]


class Shard(click.ParamType):
    name = "i/n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", str(value), re.ASCII)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise click.BadParameter(f"{printable(repr(value))} is not I/N with I from 1 to N.", ctx, param)
        return int(found[1]), int(found[2])


class RowFormat(click.Choice[str]):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in (*FORMATS, "jpg"):
            self.fail(f"{value!r} is no format of rows; --image-format is what pictures are written as.", param, ctx)
        return super().convert(value, param, ctx)
