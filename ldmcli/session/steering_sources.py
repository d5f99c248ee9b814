"""The networks that requests name to steer by pictures, looked at, not read."""

import dataclasses
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmcli.checkpoints.source import PartSource, embedded_folder
from ldmcli.config import ModelConfig
from ldmcli.control import EMBEDDED_CONTROL, INPAINT, TYPES, Control
from ldmcli.disk.hashes import FileHashes
from ldmcli.disk.opening import bad_file
from ldmcli.errors import MissingInputError, UsageError, printable
from ldmcli.fitting import FittedRequest
from ldmcli.images.formats import format_of_file
from ldmcli.remarks import warn_once
from ldmcli.spec import GenerationRequest, ModelSpec
from ldmcli.steering_config import AdapterConfig, ImageEncoderConfig

if TYPE_CHECKING:
    from ldmcli.checkpoints.control_source import ControlSource
    from ldmcli.checkpoints.ip_adapter_source import IPAdapterSource

_log = logging.getLogger(__name__)
ENCODER = "image_encoder"  # a model's own, in its folder
_SILHOUETTE, _SILHOUETTE_FILE = "tiny-emoji-silhouette", "model.safetensors"  # what EMBEDDED_CONTROL stands for


class SteeringSources:
    """Control networks, IP-Adapters and their image encoders for a model, each looked at once while its files stay as
    they are."""

    def __init__(self, spec: ModelSpec, model: ModelConfig, folder: Path) -> None:
        """`folder` is the model's, or its file."""
        self._spec, self._model, self._folder = spec, model, folder
        self._controls: dict[str, ControlSource] = {}
        self._ip_adapters: dict[str, IPAdapterSource] = {}
        self._image_encoders: dict[Path, PartSource[ImageEncoderConfig]] = {}
        self._hashes: dict[Path, tuple[PartSource[Any], str]] = {}  # by path: those of many gigabytes found once

    def checked(self, fitted: FittedRequest, hashes: FileHashes) -> FittedRequest:
        """The request with its networks and their pictures looked at, and those of strength 0 left out. Raises
        LdmError."""
        from ldmcli.images.pixels import facts_of

        inputs, controls = dict(fitted.inputs), []

        def note(name: str, i: int, value: str | bytes | None) -> None:
            """Note a picture, unless it is the one that is drawn on."""
            if value is not None and i < len(getattr(fitted.recorded, name)):
                inputs[f"{name}:{i}"] = facts_of(value).sha256

        for i, control in enumerate(fitted.controls):
            source = self.control(control.net)
            inputs[f"control_net:{i}"] = self._sha256(source.part, hashes)
            note("control_image", i, control.image)
            if control.strength and not any(control.active(each.steps_taken) for each in fitted.passes):
                between = f"{control.start:g} to {control.end:g} of {fitted.steps_taken} steps"
                warn_once(_log, f"{printable(source.name)} changes nothing, for no step lies whole in {between}")
            if control.strength:
                controls.append(_checked_type(control, source, fitted))
        for i, prompt in enumerate(fitted.image_prompts):
            adapter = self.ip_adapter(prompt.adapter)
            inputs[f"ip_adapter:{i}"] = self._sha256(adapter.part, hashes)
            inputs[f"image_encoder:{i}"] = self._sha256(adapter.encoder, hashes)
            note("ip_adapter_image", i, prompt.image)
            note("ip_adapter_mask", i, prompt.mask)
            prompt.transformers(self._model.unet)
        prompts = tuple(prompt for prompt in fitted.image_prompts if prompt.strength)
        return dataclasses.replace(
            fitted, controls=tuple(controls), image_prompts=prompts, inputs=tuple(inputs.items())
        )

    def _sha256(self, part: PartSource[Any], hashes: FileHashes) -> str:
        known, sha256 = self._hashes.get(part.path, (None, ""))
        if known is not part:
            sha256 = part.sha256(hashes)
            self._hashes[part.path] = part, sha256
        return sha256

    def control(self, name: str) -> "ControlSource":
        """The network that requests name so. Raises as `open_control` does."""
        found = self._controls.get(name)
        if found is None or _changed(found.part):
            from ldmcli.checkpoints.control_source import open_control

            found = open_control(_control_path(name), self._model, allow_pickle=self._spec.allow_pickle)
            self._controls[name] = found
        return found

    def ip_adapter(self, name: str) -> "IPAdapterSource":
        """The IP-Adapter that requests name so, with its image encoder. Raises as `open_ip_adapter` does."""
        found = self._ip_adapters.get(name)
        if found is None or _changed(found.part, found.encoder):
            from ldmcli.checkpoints.ip_adapter_source import encoder_names, open_ip_adapter, with_encoder
            from ldmcli.hub.listing import find_model

            spec = self._spec
            part = open_ip_adapter(find_model(name, half=False), self._model, allow_pickle=spec.allow_pickle)
            names = [spec.image_encoder] if spec.image_encoder else encoder_names(name, part)
            found = with_encoder(part, (self.image_encoder(find_model(each, half=False)) for each in names))
            self._ip_adapters[name] = found
        return found

    def image_encoder(self, path: Path) -> PartSource[ImageEncoderConfig]:
        """The image encoder there. Raises as `open_image_encoder` does."""
        found = self._image_encoders.get(path)
        if found is None or _changed(found):
            from ldmcli.checkpoints.ip_adapter_source import open_image_encoder

            found = open_image_encoder(path, allow_pickle=self._spec.allow_pickle)
            self._image_encoders[path] = found
        return found

    def embedding(self, request: GenerationRequest, hashes: FileHashes) -> dict[str, str]:
        """The SHA-256 of what a request's embedding is read from, or made of, by field. Raises as `check_embedding` and
        `embedder` do."""
        assert request.image_embedding is not None
        if not is_picture(request.image_embedding):
            from ldmcli.checkpoints.image_embedding_file import check_embedding

            config: Any = self._model.conditioner
            return {"image_embedding": check_embedding(request, config, hashes, allow_pickle=self._spec.allow_pickle)}
        if request.embedding_row:
            given = f"embedding_row {request.embedding_row}"
            raise UsageError(f"{given} is for a file of embeddings, and this is a picture; leave it out.")
        from ldmcli.images.pixels import facts_of

        found = {"image_embedding": facts_of(request.image_embedding).sha256}
        return found | {"image_encoder": self._sha256(self.embedder(), hashes)}

    def embedder(self) -> PartSource[ImageEncoderConfig]:
        """What makes embeddings of pictures for a model that reads those. Raises MissingInputError where there is none,
        BadDataError where it makes others."""
        from ldmcli.checkpoints.folder_config import check_processor
        from ldmcli.hub.listing import find_model

        named, own, width = self._spec.image_encoder, self._folder / ENCODER, self._model.unet.pooled_dim
        if named is None and not os.path.isdir(own):
            raise MissingInputError(
                "the model has no image encoder beside it that would make an embedding of a picture; name one with "
                "--image-encoder, or give a safetensors file of the embedding."
            )
        found = self.image_encoder(own if named is None else find_model(named, half=False))
        if named is None:
            check_processor(self._folder / "feature_extractor" / "preprocessor_config.json", found.config.image_size)
        if found.config.projection_dim != width:
            what = f"gives embeddings of {found.config.projection_dim} numbers, and the model reads {width}"
            raise bad_file(found.path, what, "name the encoder it was made for with --image-encoder")
        return found


def is_picture(path: str) -> bool:
    """Whether an embedding is to be made of this file, a picture, rather than read from it."""
    return format_of_file(Path(path)) is not None


def _changed(*parts: PartSource[Any]) -> bool:
    return any(file.changed for part in parts for file in part.files)


def _control_path(name: str) -> Path:
    """Where the network called `name` is: here, with this program, or on the hub."""
    from ldmcli.hub.listing import find_here, find_model

    if name == EMBEDDED_CONTROL and find_here(name) is None:
        return embedded_folder(_SILHOUETTE, _SILHOUETTE_FILE, "--control-net") / _SILHOUETTE_FILE
    return find_model(name, half=False)


def _checked_type(control: Control, source: "ControlSource", fitted: FittedRequest) -> Control:
    """The control as its network is told of it. Raises UsageError where the type of its picture is missing or cannot be
    meant."""
    name = printable(source.name)
    if source.types and not control.type:
        raise UsageError(f"{name} follows pictures of several types; say which with --control-type.")
    if control.type and not source.types and control.type != INPAINT:
        raise UsageError(f"{name} follows one type of picture; leave --control-type {control.type} out.")
    if source.types and TYPES[control.type] >= source.types:
        raise UsageError(f"{name} knows {source.types} types of pictures, and {control.type} is none of them.")
    if control.type and TYPES[control.type] == TYPES[INPAINT] and fitted.mask is None:
        raise UsageError(f"--control-type {control.type} is for a picture with a mask; give --mask.")
    if isinstance(source.config, AdapterConfig) and control.type:
        raise UsageError(f"{name} is an adapter; leave --control-type {control.type} out.")
    return dataclasses.replace(control, masked=0.0) if source.types else control
