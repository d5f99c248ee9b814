"""IP-Adapters and their image encoders, from disk to a device."""

import torch

from ldmcli.checkpoints.load import fill, on_meta
from ldmcli.checkpoints.source import PartSource
from ldmcli.conditioning.image_encoder import ImageEncoder
from ldmcli.networks.ip_adapter import IPAdapter
from ldmcli.steering_config import ImageEncoderConfig, IPAdapterConfig

_UNREAD = ("text_model.", "text_projection.", "logit_scale")  # a whole CLIP's other half


def load_ip_adapter(part: PartSource[IPAdapterConfig], device: torch.device, dtype: torch.dtype) -> IPAdapter:
    """An adapter. Raises BadDataError saying what does not fit."""
    return fill(on_meta(lambda: IPAdapter(part.config)), part, device, dtype)


def load_image_encoder(part: PartSource[ImageEncoderConfig], device: torch.device, dtype: torch.dtype) -> ImageEncoder:
    """An image encoder. Raises BadDataError saying what does not fit."""
    encoder = on_meta(lambda: ImageEncoder(part.config))
    fill(encoder.tower, part, device, dtype, _UNREAD)
    return encoder.complete().eval()
