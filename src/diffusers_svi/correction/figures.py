"""What was measured, in a file that grows figure by figure and is taken up where it is there already."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from .. import __version__
from ..conditioning import Scheme
from ..files import written_whole
from ..fingerprints import differences, made_with
from ..pipeline import SVIPipeline
from ..recipe import film_recipe
from .contestants import BASE, LORA
from .kinds import KINDS, Error, all_errors
from .samples import Sample
from .statistics import Interval, interval, slopes


FORMAT = "diffusers_svi.correction"
SLOPES = ("slope", "colour_slope")
# Beside the contestants, what the LoRA leaves less what the model without it does, sample by sample.
LESS = "lora less base"


class Figures:
    """The figures of a measurement.

    Args:
        path: The JSON file; what it holds is taken up.
        command (`str`, *optional*): What they are made with, to stand in it.

    Raises:
        ValueError: if there is a file that is none of these.
    """

    def __init__(self, path: str | os.PathLike, command: str | None = None):
        self.path = Path(path)
        self._told: dict[str, Any] = {}
        self._made_with: dict[str, str] = {}
        self._measured: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
        if self.path.exists():
            try:
                told = json.loads(self.path.read_text(encoding="utf-8"))
                if told["format"] != FORMAT:
                    raise ValueError(f"its format is {told['format']!r}")
                self._made_with, self._measured = told["made_with"], told["measured"]
                self._told = {name: told[name] for name in ("command", "model", "loras", "scheme") if name in told}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path} holds no figures of a correction ({error!r}). Choose another folder, or move it."
                ) from error
        if command is not None:
            self._told["command"] = command

    def check(self, samples: list[Sample], settings: Mapping[str, Any]) -> None:
        """Raise a `ValueError` if the figures are of other samples or settings, as far as these tell."""
        now = {**_samples(samples), **{name: str(value) for name, value in settings.items()}}
        gone = [name for name in self._made_with if name.startswith("sample ") and name not in now]
        self._refuse({name: value for name, value in self._made_with.items() if name in now or name in gone}, now)

    def begin(self, pipe: SVIPipeline, scheme: Scheme, samples: list[Sample], settings: Mapping[str, Any]) -> None:
        """Say what is measured. More samples than before may follow those that there are; all else is as it was.

        Raises:
            ValueError: if the figures that there are were made with something else.
        """
        libraries = {library.__name__: library.__version__ for library in (torch, diffusers, transformers)}
        now = {
            **{f"version of {name}": version for name, version in {"diffusers_svi": __version__, **libraries}.items()},
            **made_with(pipe, settings),
            "scheme": str(scheme),
            **_samples(samples),
        }
        self._refuse(self._made_with, now)
        self._made_with = now
        recipe = film_recipe(pipe, {}, torch.zeros(1, 3, 1, 1), scheme)
        self._told.update({name: recipe[name] for name in ("model", "loras", "scheme")})
        self._write()

    def has(self, name: str, number: int, error: Error) -> bool:
        """Whether a contestant's figures of an error are there, of sample `number`, from 0."""
        return str(error) in self._measured.get(name, {}).get(str(number), {})

    def add(self, name: str, number: int, error: Error, found: dict[str, float]) -> None:
        """Keep `in`, `out`, `colour_in` and `colour_out` of an error, on disk."""
        self._measured.setdefault(name, {}).setdefault(str(number), {})[str(error)] = found
        self._write()

    @property
    def summary(self) -> dict[str, dict[str, dict[str, Interval]]]:
        """By contestant, and `LESS` where there are both, by error, what went `in` and each of `SLOPES`."""
        result: dict[str, dict[str, dict[str, Interval]]] = {}
        for name in self._names:
            result[name] = {
                str(error): {
                    "in": interval([found["in"] for found in self._of(name, error).values()]),
                    **{of: interval([*self._slopes(name, error, of).values()]) for of in SLOPES},
                }
                for error in self._errors(name)
            }
        if len(result) == 2:
            result[LESS] = {
                str(error): {of: interval(self._less(error, of)) for of in SLOPES} for error in self._errors(LORA)
            }
        return result

    @property
    def scheme(self) -> str:
        """How the clips are chained, as text."""
        return self._made_with.get("scheme", "")

    @property
    def _names(self) -> list[str]:
        return [name for name in (BASE, LORA) if self._measured.get(name)]

    def _errors(self, name: str) -> list[Error]:
        found = {error for errors in self._measured[name].values() for error in errors}
        return [error for error in all_errors() if str(error) in found]

    def _of(self, name: str, error: Error) -> dict[str, dict[str, float]]:
        """Of every sample that has them."""
        return {number: found[str(error)] for number, found in self._sorted(name).items() if str(error) in found}

    def _slopes(self, name: str, error: Error, of: str) -> dict[str, float]:
        found = {number: slopes(figures)[of] for number, figures in self._of(name, error).items()}
        return {number: slope for number, slope in found.items() if slope is not None}

    def _less(self, error: Error, of: str) -> list[float]:
        base, lora = (self._slopes(name, error, of) for name in (BASE, LORA))
        return [lora[number] - base[number] for number in lora if number in base]

    def _sorted(self, name: str) -> dict[str, dict[str, dict[str, float]]]:
        return dict(sorted(self._measured[name].items(), key=lambda item: int(item[0])))

    def _refuse(self, before: Mapping[str, str], now: Mapping[str, str]) -> None:
        changed = differences(before, now)
        if changed:
            told = "; ".join(f"{name}: {was!r} then, {now!r} now" for name, (was, now) in changed.items())
            raise ValueError(
                f"{self.path} has figures that were made with something else ({told}). Ask for the same to go on with "
                "it, or choose another folder."
            )

    def _write(self) -> None:
        order = [str(error) for error in all_errors()]
        measured = {
            name: {number: {error: found[error] for error in order if error in found} for number, found in of.items()}
            for name in self._names
            for of in [self._sorted(name)]
        }
        kinds = {kind.name: {"values": kind.values, "unit": kind.unit} for kind in KINDS.values()}
        told = {"format": FORMAT, **dict(sorted(self._told.items())), "made_with": self._made_with, "kinds": kinds}
        with written_whole(self.path) as unfinished:
            text = json.dumps({**told, "summary": self.summary, "measured": measured}, indent=1)
            unfinished.write_text(text + "\n", encoding="utf-8")


def _samples(samples: list[Sample]) -> dict[str, str]:
    return {f"sample {number}": sample.told() for number, sample in enumerate(samples, start=1)}
