"""Wrong words of a command line, and where they lead: the nearest command or option by meaning, then by spelling; or
a word on what this program does not do. And click's own errors as sentences like all others. Imported when one is."""

import difflib
import os
import re
from collections.abc import Iterable

import click
from click.core import ParameterSource

from ldmcli.cli.configured import all_commands
from ldmcli.errors import printable

_COMMANDS_MEANT = {
    "txt2img": "generate gen draw t2i text2img text2image txt2image texttoimage create imagine make render run "
    "paint picture image prompt",
    "img2img": "i2i image2image img2image imagetoimage inpaint outpaint edit redraw variation variations",
    "sample": "unconditional classconditional uncond",
    "batch": "batches many queue jobs file",
    "upscale": "upscaler enhance enlarge superres superresolution esrgan",
    "info": "inspect metadata exif pnginfo parameters describe",
    "show": "view display look see preview imgcat icat viewer",
    "gallery": "html web page pages album contactsheet sheet",
    "pull": "download fetch get install add",
    "models": "list ls checkpoints ckpts model",
    "samplers": "schedulers schedules sampler",
    "bench": "benchmark perf speed time",
    "serve": "server api http webui daemon start",
    "completion": "complete completions autocomplete autocompletion shell bash zsh",
    "man": "manpage manual docs documentation",
    "schema": "jsonschema fields format formats",
    "config": "configure configuration settings setup preferences options profiles profile",
}
_TOPICS = {"help": "--help", "version": "--version"}
_NOT_DONE = {
    "train finetune dreambooth": "models are not trained here, but for the embedded one, by make train",
    "convert merge quantize prune": "models are not converted or merged into files; --lora and --vae change them as "
    "they are loaded",
    "video animate txt2vid img2vid fps frames numframes": "videos are not drawn, only pictures",
    "hypernetwork hypernetworks": "hypernetworks are not read; --lora takes LoRAs and --embedding embeddings",
    "tiling tile seamless": "seamless pictures are not drawn",
    "restorefaces facerestore facerestoration gfpgan codeformer": "faces are not restored; ldm upscale takes networks "
    "that redraw details",
    "nsfw safety safetychecker disablesafetychecker filter": "there is no filter to turn on or off",
    "styles style": "there are no styles; write them into the prompt, or into a profile of the configuration file",
    "subseed subseedstrength variationseed variationstrength": "seeds are not mixed; ldm img2img with a low --strength "
    "draws variations",
    "tomeratio tokenmerging tome": "tokens are not merged",
    "fp8 int8 int4 nf4 quantization": "weights are read in 16 or 32 bits, see --dtype",
    "apikey token login": "keys are taken from the environment alone, HF_TOKEN for the hub's",
}
_OPTIONS_MEANT = {
    "count": "n num number samples nsamples niter iterations images amount total",
    "output": "outdir out outputdir outputpath outpath outputfolder save saveto dir folder o dest destination outfile",
    "model": "ckpt checkpoint ckptpath modelid modelpath weights sdmodel pretrainedmodelnameorpath base",
    "negative_prompt": "neg negative negativetext uc without",
    "size": "resolution res dimensions aspect imagesize",
    "steps": "ddimsteps numsteps numinferencesteps samplingsteps inferencesteps iters",
    "sampler": "samplingmethod samplername method solver",
    "device": "gpus gpuid",
    "dtype": "precision float16 float32 full",
    "low_vram": "offload cpuoffload lowmemory",
    "attention": "flash sdpa flashattention optsdpattention",
    "image": "input inputimage init initimage initimg source",
    "strength": "denoise denoising denoisingstrength noise",
    "mask": "maskimage inpaintmask",
    "overwrite": "force replace yes y",
    "quiet": "silent s",
    "verbose": "debug log loglevel",
    "image_format": "type filetype extension ext",
    "clip_skip": "clipstopatlastlayers clipskiplayers",
    "prediction_type": "parameterization",
    "no_metadata": "strip nometa",
    "no_cache": "nocaching",
    "upscaler": "enhance enlarge",
    "loras": "lora loraname adapter",
    "embeddings": "embedding ti textualinversion",
    "vae_tiling": "tiledvae vaeslicing",
    "profile": "preset",
    "prompt": "text caption",
    "show": "display view inline imgcat",
    "preview": "livepreview previewevery showprogress",
}
# Options elsewhere that are an option with a value here.
_WITH_VALUE = {
    "eps": "--prediction-type eps", "epsilon": "--prediction-type eps", "v": "--prediction-type v",
    "vpred": "--prediction-type v", "vprediction": "--prediction-type v", "xformers": "--attention xformers",
    "fp16": "--dtype fp16", "half": "--dtype fp16", "bf16": "--dtype bf16", "fp32": "--dtype fp32",
    "nohalf": "--dtype fp32", "cpu": "--device cpu", "cuda": "--device cuda", "gpu": "--device cuda",
    "medvram": "--low-vram", "lowvram": "--low-vram", "karras": "--schedule karras",
    "plms": "--sampler plms", "ddim": "--sampler ddim", "dpm": "--sampler dpmpp-2m", "dpmsolver": "--sampler dpmpp-2m",
}  # fmt: skip
_FILES = {
    (".png", ".jpg", ".jpeg", ".webp"): "ldm info {0} tells what it is, ldm img2img -i {0} draws on it, ldm upscale "
    "{0} enlarges it",
    (".txt", ".csv", ".tsv", ".jsonl", ".gz"): "ldm batch {0} -o DIR draws its rows",
    (".safetensors", ".ckpt", ".pt", ".bin"): "ldm -m {0} PROMPT draws with it, ldm info {0} tells what it is",
}
_CLICK = (
    (r"(.*) is not a valid integer(?: range)?\.?", r"\1 is not a whole number"),
    (r"(.*) is not a valid float(?: range)?\.?", r"\1 is not a number"),
    (r"(.*) is not a valid boolean\..*", r"\1 is neither true nor false"),
    (r"(.*) is not in the range x>=(\S+?)\.?", r"\1 is not \2 or more"),
    (r"(.*) is not in the range (\S+?)<=x<=(\S+?)\.?", r"\1 is not from \2 to \3"),
    (r"(.*) is not one of (.*?)\.?", None),
)
_SHORTEST = 3  # letters, from which on a word may be one that is spelled wrong
_STOP = 0.75  # how alike two words are, from which on one may be meant for the other


def asked_about(word: str, commands: Iterable[str]) -> str:
    """A question about a first argument, a single word, that is no command and probably no prompt; "" where it may be
    drawn."""
    name, shown = _bare(word), printable(word, 60)
    for endings, advice in _FILES.items():
        if word.lower().endswith(endings):
            missing = "" if os.path.exists(word) else ", and there is none here"
            return f"{shown} is the name of a file{missing}: {advice.format(shown)}"
    if name in _TOPICS:
        return f"“{shown}” is no command: did you mean ldm {_TOPICS[name]}, or to draw it, ldm txt2img {shown}?"
    commands = tuple(commands)
    if note := _not_done(name):
        return f"“{shown}” is no command: {note}; ldm txt2img {shown} draws the word"
    found = next((command for command, names in _COMMANDS_MEANT.items() if name in names.split()), "")
    if found not in commands and len(name) >= _SHORTEST:
        found = next(iter(difflib.get_close_matches(name, commands, 1, _STOP)), "")
    return f"“{shown}” is no command: did you mean ldm {found}, or to draw it, ldm txt2img {shown}?" if found else ""


def usage_sentence(error: click.ClickException) -> str:
    """click's message in this program's words, without a point at its end."""
    if isinstance(error, click.NoSuchOption):
        return _no_such_option(error)
    if isinstance(error, click.BadOptionUsage):
        if "not take" in error.message:
            return f"{error.option_name} takes no value"
        params = error.ctx.command.params if error.ctx else []
        kind = next((one.metavar for one in params if error.option_name in one.opts and one.metavar), "")
        return f"{error.option_name} needs a value{f', {kind}' if kind else ''}"
    if isinstance(error, click.MissingParameter):
        names = error.param.get_error_hint(error.ctx) if error.param and error.ctx else ""
        return f"give {names.replace(chr(39), '') or 'what is missing'}"
    if isinstance(error, click.BadParameter) and error.param is not None:
        return _bad_value(error, error.param)
    message = error.format_message().strip()
    if found := re.fullmatch(r"Got unexpected extra arguments? \((.*)\)", message, re.DOTALL):
        return _left_over(printable(found[1], 100), getattr(error, "ctx", None))
    return message.removesuffix(".")


def _left_over(words: str, context: click.Context | None) -> str:
    """On arguments that a command has no place for."""
    arguments = [one for one in context.command.params if isinstance(one, click.Argument)] if context else []
    path = context.command_path if context else "ldm"
    if path.endswith((" sample", " batch")):
        cure = "; ldm txt2img draws prompts"
    else:
        cure = "; put quotes around what has blanks" if arguments else ""
    if not arguments:
        return f"{path} takes options alone, and “{words}” is none{cure}"
    name = re.sub(r"^\[(.*)\]$", r"\1", long_name(arguments[0]))
    return f"{path} takes one {name}, and “{words}” is left over{cure}"


def _bad_value(error: click.BadParameter, parameter: click.Parameter) -> str:
    name = long_name(parameter)
    source = error.ctx.get_parameter_source(parameter.name or "") if error.ctx else None
    if source is ParameterSource.ENVIRONMENT:
        name += f" (from {parameter.envvar})"
    elif source is ParameterSource.DEFAULT_MAP:
        name += " (from the configuration file)"
    message = error.message.strip()
    for pattern, made in _CLICK:
        if not (found := re.fullmatch(pattern, message, re.DOTALL)):
            continue
        if made is not None:
            message = found.expand(made)
        elif isinstance(parameter.type, click.Choice):
            choices = [str(one) for one in parameter.type.choices]
            near = difflib.get_close_matches(found[1].strip("'\"").lower(), choices, 1, _STOP)
            if near:
                message = f"{found[1]} is none of {', '.join(choices)}: did you mean {near[0]}?"
            else:
                message = f"{found[1]} is not known; choose from {', '.join(choices)}"
        break
    return f"{name}{' ' if message[:1] in '-.0123456789' + chr(39) else ': '}{message.removesuffix('.')}"


def long_name(parameter: click.Parameter) -> str:
    """What a parameter is called in a sentence: an option's long name, an argument's metavar."""
    if isinstance(parameter, click.Argument):
        return parameter.human_readable_name
    return next((name for name in parameter.opts if name.startswith("--")), parameter.opts[0])


def _no_such_option(error: click.NoSuchOption) -> str:
    from ldmcli.batch.fields import field_named

    given, context = error.option_name, error.ctx
    path = context.command_path if context else "ldm"
    refused = f"{path} has no option {printable(given, 60)}"
    name = _bare(given)
    options = (
        {one.name or "": one for one in context.command.params if isinstance(one, click.Option)} if context else {}
    )
    options = {key: one for key, one in options.items() if not one.hidden}
    spelled = {text: long_name(one) for one in options.values() for text in one.opts if text.startswith("--")}
    if (value := _WITH_VALUE.get(name, "")).partition(" ")[0] in spelled:
        return f"{refused}: did you mean {value}?"
    meant = next((key for key, names in _OPTIONS_MEANT.items() if name in names.split()), "")
    for key in filter(None, (meant, field_named(given))):
        if key in options:
            also = ", or -n, the negative prompt" if name == "n" and "negative_prompt" in options else ""
            return f"{refused}: did you mean {long_name(options[key])}{also}?"
    if note := _not_done(name):
        return f"{refused}: {note}"
    for command in all_commands():
        for one in command.params:
            if (
                isinstance(one, click.Option)
                and not one.hidden
                and (given in one.opts or (meant and one.name == meant))
            ):
                return f"{refused}: {long_name(one)} is one of ldm {command.name}"
    if near := difflib.get_close_matches("--" + given.lstrip("-"), spelled, 1, _STOP):
        return f"{refused}: did you mean {near[0]}?"
    return refused


def _not_done(name: str) -> str:
    return next((note for names, note in _NOT_DONE.items() if name in names.split()), "")


def _bare(text: str) -> str:
    return re.sub(r"[\s_-]+", "", text.lower())
