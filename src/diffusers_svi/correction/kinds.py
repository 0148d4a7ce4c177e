"""The kinds of errors, three sizes of each. Nothing heavy is imported here: `--help` shows them."""

from dataclasses import dataclass


SIZES = ("small", "medium", "large")
OWN = "own"
VAE = "vae"


@dataclass(frozen=True)
class Kind:
    """A kind of error, as it is put on the pixels of the clip before, which are in [0, 1]; the result is clipped.

    Args:
        name (`str`): Of the kind.
        values (`tuple[float, float, float]`): Its sizes, `SIZES`.
        unit (`str`): What they count.
        source (`str`): Where they come from.
    """

    name: str
    values: tuple[float, float, float]
    unit: str
    source: str


_DRIFT = "chosen: about what 5 and 50 clips of svi-tiny do to the light, and a size between"
KINDS = {
    kind.name: kind
    for kind in (
        Kind(VAE, (1, 3, 10), "round trips through the VAE", "a film of so many clips that carries frames"),
        Kind("cast", (0.02, 0.04, 0.08), "of the range, more red and less blue", _DRIFT),
        Kind("exposure", (0.02, 0.05, 0.1), "darker: x * (1 - size)", _DRIFT),
        Kind("contrast", (0.05, 0.1, 0.3), "more contrast: x + size * (x - its mean)", "chosen"),
        Kind("saturation", (0.1, 0.2, 0.5), "more colour: x + size * (x - its grey)", "chosen"),
        Kind("blur", (0.5, 1, 2), "pixels, deviation of the Gaussian", "chosen"),
        Kind("noise", (0.01, 0.03, 0.1), "of the range, deviation of the noise", "chosen"),
        Kind("jpeg", (75, 40, 15), "quality of JPEG", "75 is Pillow's default; the others are chosen"),
        Kind(OWN, (0.3, 0.5, 0.7), "noise level that the clip is made anew from", "chosen: what it shows stays"),
    )
}


@dataclass(frozen=True)
class Error:
    """An error of one kind and size.

    Args:
        kind (`str`): One of `KINDS`.
        size (`str`): One of `SIZES`.
    """

    kind: str
    size: str

    def __str__(self) -> str:
        return f"{self.kind} {self.size}"

    @property
    def value(self) -> float:
        """Its size in the unit of its kind."""
        return KINDS[self.kind].values[SIZES.index(self.size)]


def all_errors(kinds: tuple[str, ...] = tuple(KINDS), sizes: tuple[str, ...] = SIZES) -> list[Error]:
    """Every size of every kind, in the order of the tables. None chosen is all."""
    kinds, sizes = kinds or tuple(KINDS), sizes or SIZES
    return [Error(kind, size) for kind in KINDS if kind in kinds for size in SIZES if size in sizes]
