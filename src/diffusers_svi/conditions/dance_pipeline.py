"""`SVIDancePipeline`: films that follow poses."""

from collections.abc import Iterable, Iterator
from typing import Any, Unpack

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput

from ..chain import ChainState
from ..clips import Clip, ClipSpec
from ..inputs import Film
from ..lora_file import LoraFile
from ..options import FilmOptions
from ..pipeline import with_film_options
from .condition_pipeline import ConditionPipeline
from .dance_transformer import SVIDanceTransformer3DModel
from .pose import PoseLike, Poses, open_pose
from .rows import Rows
from .windows import film_rows, first_frame, pose_pictures


# source: the authors' script for SVI-Dance
GUIDANCE = 2.0


class SVIDancePipeline(ConditionPipeline):
    r"""SVI-Dance: Wan 2.1 I2V with the pose encoder of UniAnimate and a LoRA; frame n of the film sees pose n.

    Components and `from_pretrained` are those of [`SVIPipeline`], with a [`SVIDanceTransformer3DModel`] once the pose
    encoder is loaded, which lies in the file of the LoRA: `load_lora_weights` loads both. A saved pipeline has it.
    """

    _follows = "pose"
    _kind = SVIDanceTransformer3DModel
    _guidance_scale = GUIDANCE
    _longer = "The film ends with its poses: leave `num_clips` out, or pass `loop_pose=True` to begin with them again."

    @with_film_options(guidance_scale=GUIDANCE)
    def __call__(
        self,
        image: PipelineImageInput | None = None,
        prompts: str | ClipSpec | Iterable[str | ClipSpec] | None = None,
        *,
        pose: PoseLike | Poses | None = None,
        loop_pose: bool = False,
        return_dict: bool = True,
        **options: Unpack[FilmOptions],
    ) -> WanPipelineOutput | tuple:
        r"""
        Generate a film that follows poses: the clips of [`~SVIDancePipeline.stream`], joined.

        Args:
            image, prompts, return_dict, options:
                As in [`SVIPipeline`]. `guidance_scale` defaults to 2.0. `num_clips` defaults to as many as the poses
                are long, for which the last prompt holds; the last clip runs on to its end, where the last pose holds.
                More clips are refused, unless poses loop.
            pose (`str`, `np.ndarray`, `torch.Tensor`, `list[PIL.Image.Image]` or what `open_pose` gave):
                Pictures of poses, one a film frame: a video, a folder, keypoints in a file, or frames, see
                [`open_pose`]. Those of another aspect than the film's are padded; open them by `open_pose` for another
                fit, or for a video of another rate. Pose n belongs to frame n of the film, also where the film goes on
                from a `state` or began with a video.
            loop_pose (`bool`, defaults to `False`):
                Whether the poses begin again where they end. The number of clips is then that of a call of
                [`SVIPipeline`].

        Returns and raises as [`SVIPipeline`].
        """
        given: Any = {**options, "pose": pose, "loop_pose": loop_pose}
        return super().__call__(image, prompts, return_dict=return_dict, **given)

    @with_film_options(guidance_scale=GUIDANCE)
    def stream(
        self,
        image: PipelineImageInput | None = None,
        prompts: str | ClipSpec | Iterable[str | ClipSpec] | None = None,
        *,
        pose: PoseLike | Poses | None = None,
        loop_pose: bool = False,
        **options: Unpack[FilmOptions],
    ) -> Iterator[Clip]:
        r"""Generate a film that follows poses clip by clip: as [`SVIPipeline`], with the poses of a call."""
        given: Any = {**options, "pose": pose, "loop_pose": loop_pose}
        return super().stream(image, prompts, **given)

    def load_lora_weights(self, *args: Any, **options: Any) -> None:
        """Load a LoRA as [`SVIPipeline`] does, that of SVI-Dance with the pose encoder that lies in its file.

        Raises:
            ValueError: as there, and if the encoder is missing or does not fit. Nothing has been loaded then.
        """
        with self._back_if_it_fails():
            super().load_lora_weights(*args, **options)

    def _load_modules(self, component: str, lora: LoraFile) -> None:
        if lora.modules:
            self._put_modules(component, lora.modules)
        elif lora.condition is not None and not self.has_modules:
            raise ValueError(
                f"The LoRA {lora.name!r} comes without the pose encoder, `dwpose_embedding`, and the transformer has "
                "none. Load the published file, or a model that was saved with one."
            )

    def _opened(self, condition: Any, height: int, width: int) -> Rows:
        poses = open_pose(condition, height, width)
        size = poses[:1].shape[1:3]
        if size != (height, width):
            raise ValueError(
                f"`pose` was opened for a film of {size[0]} x {size[1]} (height x width), but this one is {height} x "
                f"{width}. Open it by `open_pose(pose, {height}, {width})`."
            )
        return poses

    def _check_film(
        self,
        image: PipelineImageInput | None,
        prompts: str | ClipSpec | Iterable[str | ClipSpec] | None,
        options: FilmOptions,
    ) -> Film:
        given: Any = {"pose": None, "loop_pose": False, **options}
        pose, loop = given.pop("pose"), given.pop("loop_pose")
        if not isinstance(loop, bool):
            raise ValueError(f"`loop_pose` must be `True` or `False`, got {loop!r}.")
        return self._following(image, prompts, given, pose, loop, {"loop_pose": loop})

    def _generate(
        self,
        state: ChainState,
        last: torch.Tensor | None,
        clip_resize: str,
        bar_config: dict[str, Any],
        **options: Any,
    ) -> torch.Tensor:
        given = dict(options.pop("attention_kwargs"))
        seen = film_rows(given.pop("pose"), first_frame(state), state.num_frames, given.pop("loop_pose"))
        given["pose"] = pose_pictures(seen[None].to(self._execution_device))
        return super()._generate(state, last, clip_resize, bar_config, attention_kwargs=given, **options)
