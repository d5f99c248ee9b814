"""The networks that requests name to steer by pictures, looked at, not read."""

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmcli.checkpoints.source import PartSource, embedded_folder
from ldmcli.config import ModelConfig
from ldmcli.control import EMBEDDED_CONTROL, INPAINT, TYPES, Control
from ldmcli.disk.hashes import FileHashes
from ldmcli.errors import UsageError, printable
from ldmcli.fitting import FittedRequest
from ldmcli.remarks import warn_once
from ldmcli.spec import ModelSpec
from ldmcli.steering_config import AdapterConfig, ImageEncoderConfig

if TYPE_CHECKING:
    from ldmcli.checkpoints.control_source import ControlSource
    from ldmcli.checkpoints.ip_adapter_source import IPAdapterSource

_log = logging.getLogger(__name__)
_SILHOUETTE, _SILHOUETTE_FILE = "tiny-emoji-silhouette", "model.safetensors"  # what EMBEDDED_CONTROL stands for


class SteeringSources:
    """Control networks, IP-Adapters and their image encoders for a model, each looked at once while its files stay as
    they are."""

    def __init__(self, spec: ModelSpec, model: ModelConfig) -> None:
        self._spec, self._model = spec, model
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
