"""The kinds of adapter: what the tensors of one module are called in a file, and which of them belong together.

Without torch: `ldm info` reads headers alone. What the kinds compute is in `deltas`.
"""

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator

_PAIR = ("lora_{}.weight", "lora.{}.weight", "lora_linear_layer.{}.weight")  # sd-scripts; diffusers, of two ages
# By our name of a factor: what follows the module's name in a key, first the dot.
_ENDINGS: dict[str, tuple[str, ...]] = {
    "down": (*(form.format("down") for form in _PAIR), "lora_A.weight", "lora_A.default.weight", "lora_A"),
    "up": (*(form.format("up") for form in _PAIR), "lora_B.weight", "lora_B.default.weight", "lora_B"),
    "up_bias": ("lora_B.bias", "lora_B.default.bias", "lora_up.bias"),
    "mid": ("lora_mid.weight",),
    "magnitude": (
        *(f"lora_magnitude_vector{end}" for end in ("", ".weight", ".default", ".default.weight")),  # PEFT
        "magnitude",  # ai-toolkit
    ),
    **{name: (f"{name}.weight",) for name in ("a1", "a2", "b1", "b2", "bm")},
    **{
        name: (name,)
        for name in (
            *("alpha", "scale", "dora_scale", "rescale", "on_input", "weight"),
            *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
            *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
            *("oft_blocks", "oft_diag", "diff", "diff_b", "w_norm", "b_norm"),
        )
    },
}
_FACTORS = {f".{ending}": factor for factor, endings in _ENDINGS.items() for ending in endings}
# The same where a dot lacks: `attn1.processor.to_q_lora.down.weight`.
_FACTORS |= {f"_lora.{factor}.weight": factor for factor in ("down", "up")}
_LONGEST = max(ending.count(".") for ending in _FACTORS)
_COMMON = {"alpha", "diff_b"}
SCALARS = {"alpha", "scale", "on_input"}


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of adapter: the sets of factors, one of which it needs, and those it may have beside. `ranks` are the
    factors, the likeliest first, whose given axis is as long as the rank."""

    name: str
    needs: tuple[frozenset[str], ...]
    may: frozenset[str] = frozenset()
    ranks: tuple[tuple[str, int], ...] = ()

    def fits(self, factors: Collection[str]) -> bool:
        """Whether these are all that the kind needs, and no more than it may have."""
        extra = self.may | _COMMON
        return any(need <= set(factors) <= need | extra for need in self.needs)


def _sets(*needs: Iterable[str]) -> tuple[frozenset[str], ...]:
    return tuple(map(frozenset, needs))


_SCALE = frozenset({"scale"})
_DORA = _SCALE | {"dora_scale", "magnitude"}
_HALVES = ([("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")], [("lokr_w2",), ("lokr_w2_a", "lokr_w2_b")])
_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
KINDS = (
    Kind("LoRA", _sets(("down", "up")), _DORA | {"mid", "up_bias"}, (("down", 0),)),
    Kind("LoHa", _sets(_HADA), _DORA | {"hada_t1", "hada_t2"}, (("hada_w1_b", 0),)),
    Kind(
        "LoKr",
        _sets(*(first + second for first, second in itertools.product(*_HALVES))),
        _DORA | {"lokr_t2"},
        (("lokr_w2_b", 0), ("lokr_w1_b", 0)),
    ),
    Kind("GLoRA", _sets(("a1", "a2", "b1", "b2")), _SCALE | {"bm"}, (("b2", 0),)),
    Kind("IA3", _sets(("weight", "on_input"))),
    Kind("OFT", _sets(("oft_blocks",), ("oft_diag",)), frozenset({"rescale"})),
    Kind("full", _sets(("diff",), ("diff_b",), ("w_norm",), ("b_norm",), ("w_norm", "b_norm"))),
)


def split(key: str) -> tuple[str, str] | None:
    """A key's module, as the file spells it, and our name of the factor; None where it ends like no factor."""
    for at in _cuts(key):
        factor = _FACTORS.get(key[at:])
        if factor:
            return key[:at], factor
    return None


def _cuts(key: str) -> Iterator[int]:
    """Where a factor's name may begin in `key`, from the left."""
    without_dot = key.rfind("_lora.")
    if without_dot > 0:
        yield without_dot
    dots = [at for at, mark in enumerate(key) if mark == "." and at]
    yield from dots[-_LONGEST:]


def kind_of(factors: Collection[str]) -> Kind | None:
    """The kind that these factors of one module make up."""
    return next((kind for kind in KINDS if kind.fits(factors)), None)
