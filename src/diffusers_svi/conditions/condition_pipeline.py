"""`ConditionPipeline`: films that follow something beside text, frame by frame."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.utils.torch_utils import unwrap_module

from ..chain import ChainState
from ..checks import check_count
from ..clips import ClipSpec
from ..conditioning import Scheme
from ..inputs import Film, check_kinds, check_num_frames, check_size, choose_scheme
from ..lora_layers import EXPERTS, experts_of
from ..options import FILM_DEFAULTS, FilmOptions
from ..pipeline import SVIPipeline
from ..specs import check_clip
from ..start_image import read_image
from .converters import with_modules
from .rows import Rows
from .windows import clips_to_cover


class ConditionPipeline(SVIPipeline):
    """What [`SVITalkPipeline`] and [`SVIDancePipeline`] share: modules for a condition, and films as long as it."""

    # The transformer that has the modules.
    _kind: ClassVar[type[Any]]
    # Weight of the prompt where none is given.
    _guidance_scale: ClassVar[float]
    # What to do where the condition ends before the film.
    _longer: ClassVar[str]

    @property
    def has_modules(self) -> bool:
        """Whether the pipeline has the modules for the condition, in every transformer."""
        return all(isinstance(transformer, self._kind) for transformer in experts_of(self).values())

    def _put_modules(self, component: str, state_dict: dict[str, torch.Tensor]) -> None:
        """Give `component` published modules, beside the layers that it has."""
        transformer = getattr(self, component)
        self.register_modules(**{component: with_modules(self._kind, transformer, state_dict)})

    @contextmanager
    def _back_if_it_fails(self) -> Iterator[None]:
        """Where something that is done in this context fails, the transformers are those from before it."""
        before = {name: getattr(self, name) for name in EXPERTS}
        try:
            yield
        except BaseException:
            self.register_modules(**before)
            raise

    def _opened(self, condition: Any, height: int, width: int) -> Rows:
        """The condition of a film of this size, once it is sure that it can be one."""
        raise NotImplementedError

    def _following(
        self,
        image: PipelineImageInput | None,
        prompts: str | ClipSpec | Iterable[str | ClipSpec] | None,
        options: FilmOptions,
        condition: Any,
        loop: bool,
        own: dict[str, Any],
    ) -> Film:
        """The film that follows `condition`, which stands among `attention_kwargs` with the settings `own`."""
        name = str(self._follows)
        if condition is None:
            raise ValueError(f"`{name}`, which the film is to follow, is missing. `SVIPipeline` makes films without.")
        if not self.has_modules:
            raise ValueError(
                f"`{name}` is given, but the model has no modules for it. Load the published ones with their LoRA, by "
                "`load_lora_weights`, or a model that was saved with them."
            )
        given: Any = {"guidance_scale": self._guidance_scale, **options}
        merged = {**FILM_DEFAULTS, **given}
        check_kinds(merged)
        if image is None and merged["state"] is None:
            return super()._check_film(image, prompts, given)
        picture = None if image is None else read_image(image)
        height, width = check_size(self, merged["height"], merged["width"], picture, merged["state"])
        rows = self._opened(condition, height, width)
        if not loop:
            given["num_clips"] = self._num_clips(len(rows), prompts, merged)
        film = super()._check_film(image, prompts, given)
        settings = {**film.settings, **own, name: told_of(len(rows), rows.fingerprint)}
        kwargs = {**(film.clip_options["attention_kwargs"] or {}), **own, name: rows}
        return replace(film, settings=settings, clip_options={**film.clip_options, "attention_kwargs": kwargs})

    def _num_clips(self, length: int, prompts: Any, merged: dict[str, Any]) -> int:
        """Clips of the film that ends with its condition, or of the shorter one that is asked for."""
        state = merged["state"]
        num_frames = check_num_frames(self, merged["num_frames"])
        trained, ignored = self.lora_conditioning, merged["ignore_lora_conditioning"]
        scheme = choose_scheme(merged["conditioning"], merged["condition_frames"], state, trained, ignored)
        scheme.check(num_frames, self.config.expand_timesteps)
        prompts = merged["prompt"] if prompts is None else prompts
        listed = [prompts] if isinstance(prompts, (ClipSpec, Mapping)) else prompts
        listed = listed if isinstance(listed, (list, tuple)) else []
        specs = [check_clip(item, index) for index, item in enumerate(listed)]
        source, asked = "prompts", sum(spec.num_clips for spec in specs)
        if merged["num_clips"] is not None:
            source, asked = "num_clips", check_count("num_clips", merged["num_clips"], 1)
        elif merged["prompt_embeds"] is not None:
            source, asked = "prompt_embeds", len(merged["prompt_embeds"])
        most = self.clips_that_follow(length, scheme, num_frames, state, specs, asked, source)
        return asked if source == "num_clips" else most

    @classmethod
    def clips_that_follow(
        cls,
        length: int,
        scheme: Scheme,
        num_frames: int,
        state: ChainState | None,
        specs: list[ClipSpec],
        asked: int,
        source: str,
    ) -> int:
        """Clips of the film that ends with its condition, as [`most_clips`] tells.

        Raises:
            ValueError: if more are asked for, by `source`, an argument.
        """
        most = most_clips(length, scheme, num_frames, state, specs)
        if asked > most or most < 1:
            raise ValueError(
                f"`{cls._follows}` has {length} frames, which make {most} clips of `num_frames`={num_frames} with "
                f"{scheme}, but {asked or 'at least one'} are asked for by `{source}`. {cls._longer}"
            )
        return most

    @property
    def _bare_transformer(self) -> Any:
        return unwrap_module(self.transformer)


def most_clips(length: int, scheme: Scheme, num_frames: int, state: ChainState | None, specs: list[ClipSpec]) -> int:
    """Clips of the film that ends with its condition.

    Args:
        length (`int`): Frames of the condition.
        scheme (`Scheme`), num_frames (`int`): How clips are chained, and the frames of one.
        state (`ChainState`, *optional*): What the film goes on from.
        specs (`list[ClipSpec]`): Its clips, as far as they are known.
    """
    # After a cut nothing is told again: the film is longer.
    told_anew = scheme.overlap * _cuts(specs, state)
    return clips_to_cover(max(length - told_anew, 1), scheme, num_frames, state)


def told_of(length: int, fingerprint: str) -> str:
    """What a film remembers of a condition, by which another is known."""
    return f"{length} frames {fingerprint[:16]}"


def _cuts(specs: list[ClipSpec], state: ChainState | None) -> int:
    """The clips still to be made that begin with a cut, where something goes before."""
    made, index, count = 0 if state is None else state.num_clips, 0, 0
    for spec in specs:
        goes_on = index > 0 or (state is not None and state.continues)
        count += spec.cut is not None and index >= made and goes_on
        index += spec.num_clips
    return count
