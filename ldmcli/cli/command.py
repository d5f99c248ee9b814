"""What every command of `ldm` is: help in groups, rare options behind --help-all, and words that stand for others."""

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import click
from click.core import ParameterSource

from ldmcli.conditioning.hints import argument_hints

# What everyone needs, in the order of the help; then the groups, each with its parameters, or * for all that begin so.
_FIRST = (
    "prompt", "image", "label", "layout", "map", "image_embedding", "negative_prompt", "model", "output", "size",
    "steps", "sampler", "guidance_scale", "seed", "count",
)  # fmt: skip
_GROUPS = {
    "Rows": "format prompt_column grid strict sheet",
    "Run": "dry_run extend retry_failed status watch failed max_images time_limit shard devices engine ray_address",
    "Picture": "width height schedule eta guidance_rescale guidance_interval original_width original_height crop_left "
    "crop_top hires*",
    "Model": "vae refiner refiner_start prediction_type allow_pickle",
    "Prompt": "prompt_syntax on_long_prompt clip_skip dynamic_prompts wildcard_dir",
    "Pictures in": "from_image embedding_row strength noise_level patch image_guidance* depth* resize mask* "
    "invert_mask inpaint_area paste_back",
    "Adapters": "lora* embeddings embedding_dir control_* canny ip_* image_encoder",
    "Output": "image_format quality lossless name upscaler overwrite no_metadata as_json json_file preview* show",
    "Machine": "batch_size device dtype low_vram vae_tiling attention kernels no_cuda_graph compile threads no_cache "
    "no_server keep",
    "Program": "profile quiet verbose help_all _click*",
}
_RARE = (
    "eta guidance_rescale guidance_interval original_width original_height crop_left crop_top refiner_start "
    "prediction_type noise_level patch hires_steps masked_content mask_padding paste_back invert_mask control_start "
    "control_end control_mode control_type ip_adapter_* image_encoder attention kernels no_cuda_graph compile threads "
    "no_cache ray_address engine shard prompt_column"
)
# What a metavar says that is to be named.
_NAMED = {"FILE": "a file", "IMAGE": "a picture", "DIR": "a folder", "PATH": "a file or a folder", "MODEL": "a model"}
_GROUPED = 15  # options from which on a command's are shown in groups
_log = logging.getLogger(__name__)
_ALL = "ldmcli.help-all"


class Command(click.Command):
    """A command with help in groups, whose --size sets width and height, and whose --prompt adds to its prompts."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The parameters, with --help-all where some are rare."""
        params = super().get_params(ctx)
        return [*params, _help_all()] if len(self.params) >= _GROUPED else params

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click's; then what stands for other parameters takes their place. Raises UsageError."""
        try:
            rest = super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise
        if "prompts" in ctx.params and (prompt := ctx.params.pop("prompt", ())):
            typed = ctx.get_parameter_source("prompt") is ParameterSource.COMMANDLINE
            if typed or not ctx.params["prompts"]:
                ctx.params["prompts"] += tuple(prompt)
        for parameter in [] if ctx.resilient_parsing else self.params:
            _check_name(ctx, parameter)
        if "width" in ctx.params and (size := ctx.params.pop("size", None)):
            self._take_size(ctx, size)
        if not ctx.resilient_parsing:
            for hint in argument_hints(ctx.params.get("prompts") or (), ctx.params.get("negative_prompt") or ""):
                _log.warning("%s", hint)
        return rest

    def _take_size(self, ctx: click.Context, size: tuple[int, int]) -> None:
        source = ctx.get_parameter_source("size")
        assert source is not None
        for name, side in zip(("width", "height"), size, strict=True):
            own = ctx.get_parameter_source(name)
            if own is ParameterSource.COMMANDLINE is source:
                raise click.UsageError(f"--size and --{name} say the same; leave out one.", ctx)
            if own is None or source <= own:
                ctx.params[name] = side
                ctx.set_parameter_source(name, source)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        """As click's, without the names that no help shows."""
        unseen = {name for one in self.params for name in getattr(one, "aliases", ())}
        return [item for item in super().shell_complete(ctx, incomplete) if item.value not in unseen]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, in groups where there are many."""
        if len(self.params) < _GROUPED:
            super().format_options(ctx, formatter)
            return
        hidden = 0
        groups: dict[str, dict[str, tuple[str, str]]] = {
            title: {} for title in ("", *_GROUPS)
        }  # "": everyday, and its own
        for parameter in self.get_params(ctx):
            record, name = parameter.get_help_record(ctx), parameter.name or ""
            if record is None or isinstance(parameter, click.Argument):
                continue
            if _listed(name, _RARE) and not ctx.meta.get(_ALL):
                hidden += 1
                continue
            found = (title for title, names in _GROUPS.items() if _listed(name, names))
            groups["" if name in _FIRST else next(found, "")][name] = record
        order = {name: place for place, name in enumerate(_FIRST)}
        groups[""] = dict(sorted(groups[""].items(), key=lambda item: order.get(item[0], len(order))))
        for title, records in groups.items():
            if records:
                with formatter.section(title or "Options"):
                    formatter.write_dl(list(records.values()))
        if hidden:
            formatter.write_paragraph()
            formatter.write_text(f"{hidden} rarer options: {ctx.command_path} --help-all")


def _check_name(ctx: click.Context, parameter: click.Parameter) -> None:
    """Raise UsageError where a file, folder or model is typed as nothing, which as a path would be this folder."""
    metavar, given = parameter.metavar or "", ctx.params.get(parameter.name or "")
    if ctx.get_parameter_source(parameter.name or "") is not ParameterSource.COMMANDLINE:
        return
    if given == "" or (isinstance(given, tuple) and "" in given):
        kind = next((word for kind, word in _NAMED.items() if kind in metavar), "")
        if kind:
            from ldmcli.cli.mistakes import long_name

            cure = "" if parameter.required else ", or leave it out"
            raise click.UsageError(f"{long_name(parameter)} is empty; name {kind}{cure}", ctx)


def command(**settings: Any) -> Callable[[Callable[..., Any]], Command]:
    """click.command, as a Command unless the settings say otherwise."""
    return click.command(**{"cls": Command} | settings)


def values(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[Any]:
    """What a shell offers for a parameter."""
    from ldmcli.cli.completion import values

    return values(ctx, parameter, incomplete)


def ungrouped(command: click.Command) -> Iterator[str]:
    """The names of the options that no group of the help has."""
    known = " ".join([*_FIRST, *_GROUPS.values()])
    options = (one for one in command.params if isinstance(one, click.Option) and not one.hidden)
    return (one.name or "" for one in options if not _listed(one.name or "", known))


def _listed(name: str, names: str) -> bool:
    ends = [one for one in names.split() if one == name or (one.endswith("*") and name.startswith(one[:-1]))]
    return bool(ends)


@functools.cache
def _help_all() -> click.Option:
    return click.Option(
        ["--help-all"], is_flag=True, is_eager=True, expose_value=False, callback=_show_all, help="Show every option."
    )


def show_rare(ctx: click.Context) -> None:
    """Have the help show every option."""
    ctx.meta[_ALL] = True


def _show_all(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        show_rare(ctx)
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()
