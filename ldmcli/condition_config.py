"""Frozen descriptions of what encodes conditions other than prompts and layouts."""

from typing import ClassVar

from ldmcli.frozen import frozen


@frozen
class ClassesConfig:
    """A table of class embeddings, of `hidden_size` each. `null` is the one that stands for no class, which guidance
    needs."""

    kind: ClassVar[str] = "label"
    classes: int
    hidden_size: int
    null: int | None = None
    part: str = "class_embedder"


@frozen
class MapConfig:
    """Semantic maps of so many `classes` as `channels` that join the latents: halved as often as the autoencoder
    does."""

    kind: ClassVar[str] = "map"
    classes: int
    channels: int
    halvings: int
    part: str = "map_encoder"


@frozen
class ImageEmbeddingConfig:
    """Embeddings of pictures, `hidden_size` numbers each, which are noised in units of their `statistics`, mean and
    deviation, where the model has these."""

    kind: ClassVar[str] = "image_embedding"
    hidden_size: int
    statistics: bool
    part: str = "image_normalizer"
