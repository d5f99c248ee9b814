"""The weights that options name: a model, and maybe another VAE and a refiner; looked at, not read."""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmcli.checkpoints.source import ModelSource, embedded_model, open_model, with_prediction_type
from ldmcli.conditioning.chunks import tokenize
from ldmcli.errors import BadDataError, LdmError, UsageError, printable
from ldmcli.spec import GenerationRequest, fit_to_model
from ldmcli.speed.cpu.heap import LARGEST_KEPT, FilledHeap
from ldmcli.speed.cpu.threads import available_cores
from ldmcli.speed.memory import check_memory, host_memory
from ldmcli.speed.startup import likely_number_size, settle_down
from ldmcli.stopwatch import Stopwatch

if TYPE_CHECKING:
    from ldmcli.checkpoints.stored_text import Remembered
    from ldmcli.checkpoints.vae_source import VAESource
    from ldmcli.networks.unet import UNet
    from ldmcli.pipeline import Pipeline
    from ldmcli.speed.policy import Runtime

_log = logging.getLogger(__name__)
_MUCH = 256 << 20  # bytes of weights for which memory is got ahead of time
_FILLING = 3  # threads that do so at most
_OTHER_WEIGHTS = ("vae", "refiner", "prediction_type")  # options beside the model that a picture depends on


@dataclasses.dataclass(frozen=True)
class Sources:
    """What to draw with. `unet` is the model's, where it had to be read to know what the model is; `tiled`, whether
    pictures are decoded in little memory."""

    model: ModelSource
    vae: "VAESource | None" = None
    refiner: ModelSource | None = None
    unet: "UNet | None" = None
    tiled: bool = False

    def load(
        self,
        runtime: "Runtime",
        *,
        first: Sequence[GenerationRequest] = (),
        memory: "Remembered | None" = None,
        stopwatch: Stopwatch | None = None,
    ) -> "Pipeline":
        """Read all weights; the prompts of what is drawn `first` are encoded meanwhile, unless `memory` has them."""
        from ldmcli.pipeline import load_pipeline

        model, refiner = (s and dataclasses.replace(s, half=runtime.half) for s in (self.model, self.refiner))
        assert model is not None
        pipeline = load_pipeline(
            model,
            runtime,
            vae=self.vae,
            refiner=refiner,
            unet=self.unet,
            tile_vae=self.tiled,
            first=first,
            memory=memory,
            stopwatch=stopwatch,
        )
        settle_down()
        return pipeline

    def fill_heap(self, device: str, dtype: str) -> FilledHeap | None:
        """Begin to get memory for the weights from the kernel, before torch is imported and by the command line's words
        for where to compute; None where that gains nothing."""
        number, threads = likely_number_size(device, dtype), min(available_cores() - 1, _FILLING)
        if not (number and threads):
            return None
        model = dataclasses.replace(self.model, half=number == 2)
        try:
            parts = [model.keys(part) for part in (("unet",) if self.vae else ("unet", "vae"))]
        except LdmError:
            return None  # those who read will tell
        # A VAE's encoder, which is not read, counts too: the first step needs some room.
        sizes = [number * math.prod(file.tensors[key].shape) for keys in parts for key, file in keys.items()]
        size = sum(size for size in sizes if size < LARGEST_KEPT)
        return FilledHeap(size, threads) if _MUCH <= size <= host_memory() // 2 else None

    def settled(self, runtime: "Runtime") -> "Sources":
        """With the model's prediction type found out, if only its U-Net can tell."""
        from ldmcli.pipeline import settled

        model, unet = settled(dataclasses.replace(self.model, half=runtime.half), runtime)
        return dataclasses.replace(self, model=model, unet=unet)

    def fit(self, request: GenerationRequest) -> GenerationRequest:
        """The request with the model's own settings filled in. Raises UsageError where the model, or this machine's
        memory, cannot draw it."""
        fitted = fit_to_model(request, self.model.config)
        assert fitted.width is not None
        assert fitted.height is not None
        check_memory(self.model.config, fitted.width, fitted.height, tiled=self.tiled)
        return fitted

    @property
    def token_limit(self) -> int:
        """How many tokens of a prompt the model reads, or of each chunk of it; begin and end marks not counted."""
        return self.model.config.text_encoders[0].max_length - 2

    def check_length(self, text: str, request: GenerationRequest) -> str:
        """What of a prompt of `request` the model does not read: "" if it reads all. Raises UsageError if something is
        cut off and the request says that this is an error."""
        chunked = request.on_long_prompt == "chunk"
        prompts = (tokenize(t, text, syntax=request.prompt_syntax, chunked=chunked) for t in self.model.tokenizers)
        cut = max((prompt.cut_text for prompt in prompts), key=len)
        if cut and request.on_long_prompt == "error":
            raise UsageError(
                f"a prompt is longer than the {self.token_limit} tokens the model reads; too much: “{printable(cut)}”."
            )
        return cut

    def identity(self, options: Mapping[str, Any], sha256: str) -> dict[str, str]:
        """What a picture says of the weights it was drawn with; `sha256` is the model's."""
        named = {"name": self.model.name, "path": _shareable(options["model"]), "sha256": sha256}
        return named | {key: _shareable(options[key]) for key in _OTHER_WEIGHTS if options[key]}


def open_sources(options: Mapping[str, Any]) -> Sources:
    """Look at the headers of all that the options name, fetching models of the hub. Raises LdmError."""
    allow_pickle = options["allow_pickle"]
    model = open_model(located(options["model"], options), allow_pickle=allow_pickle, own_vae=not options["vae"])
    if options["prediction_type"]:
        model = with_prediction_type(model, options["prediction_type"])
    config = model.config
    _log.debug("%s: %s, prediction type %s", model.name, config.family, config.schedule.prediction_type)
    vae = refiner = None
    if options["vae"]:
        from ldmcli.checkpoints.vae_source import open_vae

        vae = open_vae(located(options["vae"], options), config, allow_pickle=allow_pickle)
    if options["refiner"]:
        refiner = open_model(located(options["refiner"], options), allow_pickle=allow_pickle, own_vae=False)
        _check_refiner(model, refiner)
    elif options["refiner_start"] is not None:
        raise UsageError("--refiner-start is for a model with a --refiner; name one, or leave it out.")
    return Sources(model, vae, refiner, tiled=options["vae_tiling"])


def located(model: str | None, options: Mapping[str, Any]) -> Path:
    """Where a model is on disk: the embedded one for None, fetched for a name of the hub."""
    from ldmcli.hub.fetch import locate

    return embedded_model() if model is None else locate(model, half=options["dtype"] != "fp32")


def _check_refiner(model: ModelSource, refiner: ModelSource) -> None:
    """Raises BadDataError where the two do not work on the same latents with the same steps."""
    one, other = model.config, refiner.config
    same = (
        one.unet.in_channels == other.unet.in_channels
        and one.vae.factor == other.vae.factor
        and one.vae.scaling_factor == other.vae.scaling_factor
        and one.schedule.training_steps == other.schedule.training_steps
    )
    if not same:
        raise BadDataError(
            f"{printable(str(refiner.path))} ({other.family}) cannot refine what {printable(str(model.path))} "
            f"({one.family}) begins: their latents differ."
        )


def _shareable(model: str | None) -> str:
    """A model's path as it may stand in a picture that is given away: without the name of the user's home."""
    if model is None:
        return ""
    path, home = Path(model), Path.home()
    return str(Path("~") / path.relative_to(home)) if path.is_relative_to(home) else model
