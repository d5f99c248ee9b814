"""What a sampler sees of a model: `(latents, step) -> noise_prediction`."""

from collections.abc import Callable

from torch import Tensor

from ldmcli.sampling.schedule import Step

Denoiser = Callable[[Tensor, Step], Tensor]


def as_noise_prediction(output: Tensor, latents: Tensor, step: Step, prediction_type: str) -> Tensor:
    """The noise that a model's output means, for models trained to predict noise, v (Salimans & Ho 2022) or the image.

    All tensors share one shape. This is the only place that knows prediction types.
    """
    if prediction_type == "epsilon":
        return output
    signal, noise = step.alpha_cumprod**0.5, (1.0 - step.alpha_cumprod) ** 0.5
    if prediction_type == "v_prediction":
        return signal * output + noise * latents
    return (latents - signal * output) / noise  # "sample"
