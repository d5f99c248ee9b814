"""Options that commands share, and how each is also read from the environment."""

import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ldmcli.cli.command import values
from ldmcli.cli.configured import use_config
from ldmcli.cli.option_types import (
    Attention,
    Device,
    Duration,
    ImageFormat,
    Interval,
    LoRAText,
    Name,
    Prediction,
    Sampler,
    Schedule,
    Seed,
    Size,
)  # fmt: skip
from ldmcli.cli.terminal import LogHandler
from ldmcli.hires import STRENGTH as HIRES_STRENGTH
from ldmcli.images.formats import FORMATS, QUALITY
from ldmcli.sampling.catalogue import SAMPLERS
from ldmcli.spacings import SPACINGS
from ldmcli.spec import (
    HIRES_FIELDS,
    IMAGE_FIELDS,
    INPAINT_AREAS,
    KERNELS,
    LONG_PROMPTS,
    MASKED_CONTENTS,
    PROMPT_SYNTAXES,
    REFINER_START,
    RESIZES,
    STEERING,
    ModelSpec,
    RuntimeSpec,
)

if TYPE_CHECKING:
    from ldmcli.conditioning.dynamic import DynamicPrompts

_Command = TypeVar("_Command", bound=Callable[..., Any])


class EnvOption(click.Option):
    """An option that is also read from LDM_NAME: --guidance-scale from LDM_GUIDANCE_SCALE. `aliases` are names of other
    programs, which no help shows."""

    def __init__(self, names: Sequence[str], *, aliases: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__([*names, *aliases], shell_complete=values, **kwargs)
        self.aliases = aliases
        if self.envvar is None and self.name is not None:
            self.envvar = f"LDM_{self.name.upper()}"

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """click's, without the aliases."""
        opts = self.opts
        try:
            self.opts = [name for name in opts if name not in self.aliases]
            return super().get_help_record(ctx)
        finally:
            self.opts = opts


def option(*names: str, **settings: Any) -> Callable[[_Command], _Command]:
    """click.option, also read from the environment."""
    return click.option(*names, cls=EnvOption, **settings)


def together(*decorators: Callable[[Any], Any]) -> Callable[[_Command], _Command]:
    """A decorator that puts several options on a command, shown in this order."""

    def decorate(command: _Command) -> _Command:
        for one in reversed(decorators):
            command = one(command)
        return command

    return decorate


def verbosity_options(command: _Command) -> _Command:
    """--profile, -q and -v, which take effect at once."""
    command = option(
        "-q", "--quiet", is_flag=True, expose_value=False, is_eager=True, callback=_quiet, help="Only errors on stderr."
    )(command)
    command = option("-v", "--verbose", is_flag=True, expose_value=False, callback=_verbose, help="More on stderr.")(
        command
    )
    return option("--profile", metavar="NAME", expose_value=False, is_eager=True, callback=use_config,
                  help="Start from these lines of the configuration file, see `ldm config`.")(command)  # fmt: skip


def json_option(help_text: str) -> Callable[[_Command], _Command]:
    """--json, passed on as `as_json`."""
    return option("--json", "as_json", is_flag=True, envvar="LDM_JSON", help=help_text)


# What a picture is drawn with: these become a GenerationRequest's fields of the same names.
REQUEST_OPTIONS = (
    "negative_prompt", "width", "height", "steps", "sampler", "schedule", "eta", "guidance_scale", "guidance_rescale",
    "guidance_interval", "prompt_syntax", "on_long_prompt", "clip_skip", "original_width", "original_height",
    "crop_left", "crop_top", "refiner_start", "loras", "embeddings",
)  # fmt: skip
_SAMPLING = (
    option("--size", type=Size(), metavar="WxH",
           help="Width and height in pixels.  [default: the model's own]"),
    option("-W", "--width", type=int, help="Pixels, as in --size."),
    option("-H", "--height", type=int, help="Pixels, as in --size."),
    option("--steps", type=int, help="Sampling steps.  [default: the model's own; 50, or 4 where it is distilled]"),
    option("--sampler", type=Sampler(list(SAMPLERS)),
           help="See `ldm samplers`; other programs' names go too.  [default: the model's own; ddim, euler for SDXL, "
           "what a distilled model wants]"),
    option("--schedule", aliases=["--scheduler"], type=Schedule(SPACINGS),
           help="Where the steps sit.  [default: the model's own]"),
    option("--eta", type=float, default=0.0, show_default=True, help="Fresh noise in DDIM: 0 none, 1 as in DDPM."),
    option(
        "-g", "--guidance-scale", "--cfg-scale", aliases=["--guidance", "--cfg"], type=float,
        help="How closely to follow the prompt; 1 is unguided, twice as fast.  [default: the model's own; 7.5, SDXL 5, "
        "Turbo 1]",
    ),
    option("--guidance-rescale", type=float, default=0.0, show_default=True,
           help="Take back what guidance adds to the contrast: 0 nothing, 1 all (Lin et al. use 0.7)."),
    option("--guidance-interval", type=Interval(), metavar="LOW:HIGH",
           help="Guide only at noise levels sigma from LOW to HIGH (Kynkäänniemi et al.; for SDXL 0.28:5.42)."),
)  # fmt: skip
_REQUEST = (
    option("-n", "--negative-prompt", metavar="TEXT", default="", help="What the picture should not show."),
    *_SAMPLING,
    option("--prompt-syntax", type=click.Choice(PROMPT_SYNTAXES), default="plain", show_default=True,
           help="weighted: (word:1.3), (word), [word], \\(, BREAK and <lora:NAME:WEIGHT> count; plain: what you type "
           "is what is read."),
    option("--on-long-prompt", type=click.Choice(LONG_PROMPTS), default="warn", show_default=True,
           help="A prompt longer than the model reads: cut it with a warning, refuse, or read it in chunks."),
    option("--clip-skip", type=int, default=1, show_default=True,
           help="Which of the text encoder's last layers to read: 1 is the model's usual, 2 the one before."),
    option("--original-width", type=int, help="SDXL: size of the imagined original.  [default: the picture's]"),
    option("--original-height", type=int, help="SDXL: as --original-width."),
    option("--crop-left", type=int, default=0, show_default=True, help="SDXL: where that was cropped."),
    option("--crop-top", type=int, default=0, show_default=True, help="SDXL: as --crop-left."),
    option("--refiner-start", type=float,
           help="Share of the noise schedule after which the refiner takes over.  [default: 0.8 with --refiner]"),
    option("--lora", "loras", envvar="LDM_LORA", type=LoRAText(), multiple=True, metavar="LORA[:WEIGHT[:TEXT_WEIGHT]]",
           help="Merge a LoRA, or another adapter, into the model: a file, a name in --lora-dir or on the hub. May be "
           "given again; TEXT_WEIGHT is that of the text encoders.  [default weights: 1]"),
    option("--embedding", "embeddings", type=Name(), multiple=True, envvar="LDM_EMBEDDING", metavar="FILE[:WORD]",
           help="A textual-inversion embedding, a file or ORG/NAME of the hub, for prompts that hold WORD, in any "
           "letter case; may be given again.  [default word: the file's name]"),
)  # fmt: skip


# What a picture is drawn on, where a command takes any: fields of a GenerationRequest too.
_FILE = click.Path(allow_dash=True, readable=False)  # for shells to complete; what is wrong is said where it is read
_IMAGE = (
    option("-i", "--image", "--init-img", type=_FILE, metavar="FILE",
           help="The picture to start from: PNG, JPEG, WebP, GIF, BMP, TIFF; - is standard input."),
    option("--strength", "--denoising-strength", type=float,
           help="How much of it is drawn anew: 1 all, as if there were no picture; 0 nothing, it only passes the VAE.  "
           "[default: 0.75]"),
    option("--resize", type=click.Choice(RESIZES), default="stretch", show_default=True,
           help="How it comes to the size, which is --width and --height or its own rounded down: stretched, "
           "cropped, or with its edges continued."),
    option("--image-guidance-scale", "--image-cfg-scale", type=float,
           help="How closely a model that edits pictures by words (InstructPix2Pix) keeps to the picture.  [default: "
           "1.5]"),
    option("--depth", type=_FILE, metavar="FILE",
           help="The picture's depth map, for models that read one: grey of 8 or 16 bits, nearer is brighter."),
    option("--noise-level", type=int,
           help="How much noise a model that enlarges pictures adds to the picture first, 0 to 350.  [default: 20]"),
    option("--patch", type=int, metavar="PIXELS",
           help="How much of the picture's side such a model computes at once; 0 all.  [default: 128]"),
    option("--mask", type=_FILE, metavar="FILE|alpha",
           help="Repaint only what is white in this picture; alpha: where the picture itself is transparent."),
    option("--invert-mask", is_flag=True, help="Repaint what is black instead."),
    option("--mask-blur", type=float, default=0.0, show_default=True, help="Soften the mask's edge, in pixels."),
    option("--masked-content", type=click.Choice(MASKED_CONTENTS), default="original", show_default=True,
           help="What repainting starts from: the picture, the colours around, noise, or nothing."),
    option("--inpaint-area", type=click.Choice(INPAINT_AREAS), default="whole", show_default=True,
           help="Draw the whole picture, or only the mask's surroundings at the full size, which is --width and "
           "--height or the model's own."),
    option("--mask-padding", type=int, default=32, show_default=True,
           help="How many pixels around the mask --inpaint-area masked draws."),
    option("--paste-back/--no-paste-back", default=True, show_default=True,
           help="Leave what is not masked as it was, pixel for pixel."),
)  # fmt: skip


# A second, larger pass, where a command draws: fields of a GenerationRequest too.
_HIRES = (
    option("--hires", metavar="SCALE|WxH",
           help="Enlarge what is drawn, and draw it again in that size: 2 times, or 1024x768."),
    option("--hires-strength", type=float, help=f"How much of it is drawn anew.  [default: {HIRES_STRENGTH}]"),
    option("--hires-steps", type=int, help="Steps of this second pass.  [default: as many as of the first]"),
    option("--hires-upscaler", metavar="latent|lanczos|embedded|FILE",
           help="What enlarges: interpolation of the latents, which stay blurred below a strength of 0.5; of the "
           "picture; or a network, as for --upscale.  [default: latent]"),
)  # fmt: skip


def request_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request that the options give."""
    names = (*REQUEST_OPTIONS, *IMAGE_FIELDS, *HIRES_FIELDS, *STEERING)
    settings = {name: options[name] for name in names if name in options}
    if options["refiner"] and settings.get("refiner_start") is None:
        settings["refiner_start"] = REFINER_START
    return settings


def dynamic_prompts(options: Mapping[str, Any]) -> "DynamicPrompts | None":
    """What draws prompts by lot, where that is asked for."""
    if not options["dynamic_prompts"]:
        return None
    from ldmcli.conditioning.dynamic import DynamicPrompts

    return DynamicPrompts(None if options["wildcard_dir"] is None else expanded(options["wildcard_dir"]))


def model_spec(options: Mapping[str, Any]) -> ModelSpec:
    """The weights that the options name."""
    return ModelSpec(**{field.name: options[field.name] for field in dataclasses.fields(ModelSpec)})


def runtime_spec(options: Mapping[str, Any]) -> RuntimeSpec:
    """Where and how the options say to compute."""
    own = ("device", "dtype", "attention", "kernels", "threads", "compile", "low_vram", "vae_tiling")
    given = {name: options[name] for name in own}
    return RuntimeSpec(**given, cuda_graph=not options["no_cuda_graph"], cache=not options["no_cache"])


# Which weights.
_MODEL = (
    option("-m", "--model", metavar="MODEL",
           help="Diffusers folder, .safetensors file, a name in the folder LDM_MODELS, or ORG/NAME[@REVISION] of the "
           "Hugging Face hub.  [default: the embedded model]"),
    option("--vae", metavar="MODEL", help="Another VAE, a folder or file, or TAESD, for a quick look."),
    option("--refiner", metavar="MODEL", help="An SDXL refiner for the last steps."),
    option("--lora-dir", metavar="DIR", help="Where LoRAs are found by name, for --lora and for <lora:NAME:WEIGHT>."),
    option("--embedding-dir", metavar="DIR",
           help="A folder of embeddings, each for prompts that hold its file's name; only those are opened."),
    option("--upscale", "upscaler", envvar="LDM_UPSCALE", metavar="FILE|embedded",
           help="Make each picture larger by this network, as `ldm upscale` does; embedded: by the model's own, where "
           "its folder has one, else by a general one that comes along."),
    option("--image-encoder", metavar="MODEL",
           help="The CLIP vision model, a folder or file, for IP-Adapters and unCLIP models without one beside them."),
    option("--prediction-type", type=Prediction(),
           help="What the U-Net was trained to predict (noise, v, or the picture), where the files do not tell it "
           "right."),
    option("--allow-pickle", is_flag=True,
           help="Read .ckpt and .bin files too, by torch's restricted unpickler alone."),
)  # fmt: skip

_ATTENTIONS = ("auto", "sdpa", "chunked", "math", "flash", "cudnn", "efficient", "xformers")


# Where and how to compute.
_RUNTIME = (
    option("--dtype", type=click.Choice(["auto", "fp16", "bf16", "fp32"]), default="auto", show_default=True,
           help="Numbers to compute with; auto: fp16 on a GPU, bf16 on a CPU that has it, else fp32."),
    option("--device", type=Device(), metavar="[auto|cpu|cuda|cuda:N]", default="auto", show_default=True,
           help="Where to compute; auto: the GPU if there is one."),
    option("--attention", type=Attention(_ATTENTIONS), default="auto", show_default=True,
           help="How attention is computed: as suits device and shapes, by torch's choice (sdpa), by chunks (best for "
           "bf16 on a CPU), plainly (math), or by one kernel for GPUs."),
    option("--kernels", type=click.Choice(KERNELS), default="auto", show_default=True,
           help="This program's own kernels where they work (on a GPU fused norms, activations and sums: triton; on a "
           "CPU convolutions in fewer multiplications), or torch's alone."),
    option("--no-cuda-graph", is_flag=True, help="On a GPU: launch every operation anew in every step."),
    option("--compile", is_flag=True,
           help="Let torch.compile work on the U-Net: minutes at first, kept on disk for the next time."),
    option("--low-vram", is_flag=True, help="On a GPU: hold only the part at work there, the others in host memory."),
    option("--threads", type=click.IntRange(1, 1024), metavar="N",
           help="Threads to compute with on a CPU.  [default: one a core; a small model's pictures one each]"),
    option("--no-cache", is_flag=True, help="Neither read nor keep hashes of weights on disk."),
    option("--vae-tiling", is_flag=True,
           help="Let the VAE work strip by strip: the same picture in little memory, slower; large maps go to TMPDIR."),
)  # fmt: skip


def file_options(*names: str) -> Callable[[_Command], _Command]:
    """The options that say how pictures are written; `names` is what the format's is called."""
    return together(
        option(*names, "image_format", type=ImageFormat(list(FORMATS)),
               help="What pictures are written as.  [default: by the output's ending; png]"),
        option("--quality", type=click.IntRange(1, 100),
               help=f"Of JPEG and WebP: 1 small, 100 best.  [default: {QUALITY}]"),
        option("--lossless", is_flag=True, help="Of WebP: keep every pixel as it is."),
    )  # fmt: skip


name_option = option(
    "--name",
    metavar="PATTERN",
    help="Names of files in a folder, such as {row:05d}-{id}-{seed}: row, number, id, prompt and other settings, in "
    "safe characters.",
)

# Pictures as they grow.
preview_options = together(
    option("--preview", type=click.IntRange(1), metavar="N",
           help="Show every N steps how the picture grows: in the terminal with --show, or in --preview-file."),
    option("--preview-file", metavar="FILE.png",
           help="Write how the picture grows into this file, every step or every N; it is replaced each time."),
)  # fmt: skip

show_option = option("--show", is_flag=True, help="Show each picture in the terminal too, see `ldm show`.")

# How prompts are drawn by lot, where a command does so.
dynamic_options = together(
    option("--dynamic-prompts", is_flag=True,
           help="Draw by lot what prompts leave open, by each picture's seed: {a|b}, {2$$a|b|c}, __WILDCARD__."),
    option("--wildcard-dir", metavar="DIR", help="Where WILDCARD.txt is found, a choice a line."),
)  # fmt: skip


sampling_options = together(*_SAMPLING)  # those of them that go without prompts
request_options = together(*_REQUEST)  # what to draw, and how: REQUEST_OPTIONS
image_options = together(*_IMAGE)  # which picture to draw on: IMAGE_FIELDS
hires_options = together(*_HIRES)  # how to draw again in a larger size: HIRES_FIELDS
model_options = together(*_MODEL)  # with which weights
device_options = together(*_RUNTIME[:2])  # --dtype and --device alone
tiling_option = _RUNTIME[-1]
runtime_options = together(*_RUNTIME)  # where and how to compute


# Whether another process holds the model.
server_options = together(
    option("--no-server", is_flag=True, help="Do without the server of `ldm serve`, if there is one."),
    option("--keep", type=Duration(), metavar="TIME",
           help="Leave a server behind that ends after 90s, 10m, 1h … without work; the next command finds it."),
)  # fmt: skip


# How many pictures, and how they are written, of every command that draws as it is typed.
output_options = together(
    option("-s", "--seed", type=Seed(), metavar="INTEGER",
           help="Seed of the first picture; -1 is random.  [default: random, reported]"),
    option("-c", "--count", aliases=["--num-images", "--batch-count"], type=click.IntRange(1), default=1,
           show_default=True, help="Pictures per prompt, with seeds SEED, SEED+1, …"),
    option("-b", "--batch-size", type=click.IntRange(1, 1024), default=1, show_default=True,
           help="Pictures computed at once."),
    option("-o", "--output", metavar="PATH", default=".",
           help="A folder, a .png, .jpg or .webp file, or - for stdout.  [default: this folder]"),
    file_options("--image-format", "--format"),
    name_option,
    show_option,
    preview_options,
    option("--from-image", metavar="FILE",
           help="Run the request in this picture again, one of another program as far as it can be taken; options "
           "given win over it."),
    runtime_options,
    server_options,
    option("--overwrite", is_flag=True, help="Replace files that are there already."),
    option("--no-metadata", is_flag=True, help="Write no prompt and settings into the picture."),
    json_option("Report each picture as a JSON line."),
    verbosity_options,
)  # fmt: skip


def expanded(path: str) -> Path:
    """`path` with a leading ~ or ~user spelled out; as it stands where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _quiet(_context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    _log_to_stderr(logging.ERROR if value else logging.INFO)


def _verbose(_context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        _log_to_stderr(logging.DEBUG)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return f"ldm: {level}{super().format(record)}"


def _log_to_stderr(level: int) -> None:
    handler = LogHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(message)s"))
    logger = logging.getLogger("ldmcli")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
