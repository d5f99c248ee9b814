"""One U-Net with its text encoders: what turns requests into the model that a sampler's denoiser is made of."""

import dataclasses
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ldmcli.conditioning.chunks import tokenize
from ldmcli.conditioning.prompts import Conditioning, PromptEncoder, zeros_like
from ldmcli.config import ModelConfig
from ldmcli.networks.unet import UNet, UNetContext
from ldmcli.sampling.denoiser import Denoiser, Model, predicting
from ldmcli.sampling.guidance import pushed, within
from ldmcli.sampling.noise import sent
from ldmcli.sampling.schedule import Step
from ldmcli.spec import GenerationRequest
from ldmcli.speed.cuda.graph import CudaRecorder, Function, Graphs
from ldmcli.speed.policy import Runtime

# How pleasing SDXL's refiner is told the picture is, for prompts and for negative prompts: its authors' numbers.
_AESTHETIC, _NEGATIVE_AESTHETIC = 6.0, 2.5

# What a U-Net is told beside the latents: time embeddings (steps, 1 or batch, width); keys and values of the prompts.
_Told = tuple[Tensor, UNetContext]


@dataclasses.dataclass
class DiffusionModel:
    """A U-Net and its prompt encoder on their device. On a GPU its steps are recorded and replayed, if the runtime says
    so; not where parts come and go to save memory, which recordings would hold."""

    config: ModelConfig
    runtime: Runtime
    unet: UNet
    prompts: PromptEncoder
    graphs: Graphs | None = dataclasses.field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        tuning = self.runtime.tuning
        if tuning.graph and not tuning.low_vram:
            self.graphs = Graphs(CudaRecorder(self.runtime.device))

    def denoiser(self, requests: Sequence[GenerationRequest], steps: Sequence[Step]) -> Denoiser:
        """The denoiser of a batch of requests that agree in all but prompts and seed, for latents of this batch; what
        does not depend on the latents is computed here, once. `steps` are those of the whole run."""
        settings = requests[0]
        scale, interval = settings.guidance_scale, settings.guidance_interval
        assert scale is not None
        pairs = conditions(self.config, self.prompts, requests)
        negative, positive = [pair[0] for pair in pairs], [pair[1] for pair in pairs]

        def plain() -> Model:
            return self._model(self._predict, "plain", [self._told(positive, requests, steps)])

        if not is_guided(self.config, settings):
            return predicting(plain(), self.config.schedule.prediction_type)
        how = (scale, settings.guidance_rescale)
        both = self._told_both(negative, positive, requests, steps)
        model = self._model(lambda inputs, contexts: self._predict_guided(inputs, contexts, *how), how, both)
        if interval:
            model = within(interval, model, plain())
        return predicting(model, self.config.schedule.prediction_type)

    def free_graphs(self) -> None:
        """Give back the memory of recorded steps; where they are called again they are recorded again."""
        if self.graphs:
            self.graphs.free()

    def _predict(self, inputs: Sequence[Tensor], contexts: Sequence[UNetContext]) -> Tensor:
        """The U-Net's output, float32, for latents and the time embeddings of each of the contexts: with two of them,
        which are of different lengths, each gets half of the latents."""
        latents, *embeddings = inputs
        parts = latents.to(self.runtime.dtype, memory_format=torch.channels_last).chunk(len(contexts))
        outputs = [
            self.unet(part, embedding, context).float()
            for part, embedding, context in zip(parts, embeddings, contexts, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _predict_guided(
        self, inputs: Sequence[Tensor], contexts: Sequence[UNetContext], scale: float, rescale: float
    ) -> Tensor:
        """The same with guidance; the contexts, or the first of two, are those of the negative prompts."""
        latents, *embeddings = inputs
        return pushed(self._predict([torch.cat([latents, latents]), *embeddings], contexts), scale, rescale)

    def _model(self, function: Function, form: Hashable, told: Sequence[_Told]) -> Model:
        """A function of latents with time embeddings, and of contexts, as the model of a run. `form`: what else it
        depends on, beside the U-Net."""
        tables, contexts = [table for table, _ in told], [context for _, context in told]

        def inputs(latents: Tensor, step: Step) -> list[Tensor]:
            return [latents, *(table[step.index] for table in tables)]

        if not self.graphs:
            return lambda latents, step: function(inputs(latents, step), contexts)
        run = self.graphs.bind(self.unet, function, form, contexts, len(tables[0]))
        return lambda latents, step: run(inputs(latents, step))

    def _told_both(
        self,
        negative: Sequence[Conditioning],
        positive: Sequence[Conditioning],
        requests: Sequence[GenerationRequest],
        steps: Sequence[Step],
    ) -> list[_Told]:
        """What the U-Net is told in a batch of twice the size, the negative prompts' half first: once, or for each half
        where the prompts' contexts are of other lengths."""
        if negative[0].context.shape == positive[0].context.shape:
            return [self._told([*negative, *positive], requests, steps)]
        return [self._told(negative, requests, steps, negative=True), self._told(positive, requests, steps)]

    def chunks(self, request: GenerationRequest) -> tuple[int, int]:
        """How many chunks long the contexts of the request's negative prompt and prompt are; requests drawn together
        must agree in both."""
        chunked = request.on_long_prompt == "chunk"
        if not chunked and request.prompt_syntax == "plain":
            return 1, 1

        def count(text: str) -> int:
            found = (
                tokenize(encoder.tokenizer, text, syntax=request.prompt_syntax, chunked=chunked)
                for encoder in self.prompts.encoders
            )
            return max(len(prompt.chunks) for prompt in found)

        positive = count(request.prompt)
        empty_is_zeros = self.config.zero_empty_negative and not request.negative_prompt
        return positive if empty_is_zeros else count(request.negative_prompt), positive

    def _told(
        self,
        conditions: Sequence[Conditioning],
        requests: Sequence[GenerationRequest],
        steps: Sequence[Step],
        *,
        negative: bool = False,
    ) -> _Told:
        """What the U-Net is told beside the latents for these steps and conditions: one for each request, which may be
        the negative prompts'; or two, the negative prompts' half first."""
        device, dtype = self.runtime.device, self.runtime.dtype
        context = torch.cat([c.context for c in conditions]).to(device, dtype)
        keys_values = self.unet.project_context(context)
        timesteps = sent(torch.tensor([step.timestep for step in steps], dtype=torch.float32), device)
        embeddings = self.unet.embed_time(timesteps, requests[0].guidance_scale or 0.0)[:, None]  # (steps, 1, width)
        if self.config.unet.added_numbers:
            negatives = [negative or i < len(conditions) - len(requests) for i in range(len(conditions))]
            pooled = torch.cat([c.pooled for c in conditions if c.pooled is not None]).to(device, dtype)
            added = self.unet.embed_added(pooled, sent(self._numbers(requests, negatives), device))
            embeddings = embeddings + added  # (steps, batch, width)
        return embeddings, keys_values

    def _numbers(self, requests: Sequence[GenerationRequest], negatives: Sequence[bool]) -> Tensor:
        """What SDXL is told of each picture, (len(negatives), added_numbers): its original size, where it was cropped,
        and its size; the refiner, in place of the last, how pleasing it is. `negatives` marks the negative prompts."""
        rows = []
        for i, negative in enumerate(negatives):
            r = requests[i % len(requests)]
            assert r.width is not None
            assert r.height is not None
            row: list[float] = [r.original_height or r.height, r.original_width or r.width, r.crop_top, r.crop_left]
            if self.config.unet.added_numbers == len(row) + 2:
                row += [r.height, r.width]
            else:
                row += [_NEGATIVE_AESTHETIC if negative else _AESTHETIC]
            rows.append(row)
        return torch.tensor(rows, dtype=torch.float32)


def is_guided(config: ModelConfig, request: GenerationRequest) -> bool:
    """Whether a request, fitted to the model, is drawn with its negative prompt too. A model that reads the guidance
    scale is not pushed as well."""
    return request.guidance_scale != 1 and not config.unet.guidance_dim


def conditions(
    config: ModelConfig, prompts: PromptEncoder, requests: Sequence[GenerationRequest]
) -> list[tuple[Conditioning, Conditioning]]:
    """What each request's negative prompt and prompt mean to the U-Net; without guidance, twice the prompt. The
    requests agree in all but prompts and seed."""
    settings = requests[0]

    def encode(texts: Sequence[str]) -> list[Conditioning]:
        return prompts.encode(
            texts,
            syntax=settings.prompt_syntax,
            chunked=settings.on_long_prompt == "chunk",
            clip_skip=settings.clip_skip,
        )

    texts = [r.prompt for r in requests]
    if not is_guided(config, settings):
        return [(c, c) for c in encode(texts)]
    zeros = [config.zero_empty_negative and not r.negative_prompt for r in requests]
    texts += [r.negative_prompt for r, none in zip(requests, zeros, strict=True) if not none]
    encoded = encode(texts)
    positives, negatives = encoded[: len(requests)], iter(encoded[len(requests) :])
    return [
        (zeros_like(positive) if none else next(negatives), positive)
        for positive, none in zip(positives, zeros, strict=True)
    ]
