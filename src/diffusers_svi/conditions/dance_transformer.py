"""`SVIDanceTransformer3DModel`: a Wan transformer that sees poses, by the pose encoder of UniAnimate."""

from typing import Any, ClassVar

import torch
from diffusers import WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - of a saved pipeline, diffusers looks for it here
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..wan import TEMPORAL_FACTOR


# Strides in time, height and width; after the last of these comes a convolution of the size of a patch.
STRIDES = ((1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2))


class PoseEmbedder(nn.Module):
    """From pictures of poses to a token for every patch of the latents.

    Args:
        pose_dim (`int`): Channels between its layers.
        dim (`int`): Of a token.
        patch_size (`tuple[int, int, int]`): Of the transformer.
    """

    def __init__(self, pose_dim: int, dim: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__()
        channels = [3, *[pose_dim] * len(STRIDES)]
        self.layers = nn.ModuleList(
            [
                *(
                    nn.Conv3d(channels[i], channels[i + 1], kernel_size=3, stride=stride, padding=1)
                    for i, stride in enumerate(STRIDES)
                ),
                nn.Conv3d(pose_dim, dim, kernel_size=patch_size, stride=patch_size),
            ]
        )

    def forward(self, pose: torch.Tensor) -> torch.Tensor:
        """From `(batch, 3, 1 + 4n, height, width)` to `(batch, dim, 1 + n, height / 16, width / 16)`."""
        # source: UniAnimate repeats the first picture, so that every latent frame has four
        hidden = torch.cat([pose[:, :, :1].expand(-1, -1, TEMPORAL_FACTOR - 1, -1, -1), pose], dim=2)
        for layer in self.layers[:-1]:
            hidden = nn.functional.silu(layer(hidden))
        return self.layers[-1](hidden)


class SVIDanceTransformer3DModel(WanTransformer3DModel):
    r"""A Wan transformer with the pose encoder of UniAnimate, whose tokens are added to those of the patches.

    A call sees what `attention_kwargs` has under `"pose"`: `(batch, 3, 1 + 4n, height, width)` in [0, 1], a picture
    for every frame at the size of the film. Without it the model is its parent. Its tokens are multiplied by
    `"pose_weight"`, `(batch,)`, where that is given: by 0 in samples that are to have no poses.

    Args:
        pose_dim (`int`, defaults to 16): Channels between the layers of the encoder.
        patch_size, ..., pos_embed_seq_len: As in the parent.
    """

    _skip_layerwise_casting_patterns: ClassVar[list[str]] = [
        *WanTransformer3DModel._skip_layerwise_casting_patterns,
        "pose_embedder",
    ]

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 36,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        pose_dim: int = 16,
    ) -> None:
        super().__init__(
            patch_size,
            num_attention_heads,
            attention_head_dim,
            in_channels,
            out_channels,
            text_dim,
            freq_dim,
            ffn_dim,
            num_layers,
            cross_attn_norm,
            qk_norm,
            eps,
            image_dim,
            added_kv_proj_dim,
            rope_max_seq_len,
            pos_embed_seq_len,
        )
        self.pose_embedder = PoseEmbedder(pose_dim, num_attention_heads * attention_head_dim, patch_size)
        # What a call sees, until the patches have it.
        self._pose: torch.Tensor | None = None
        self._handle: RemovableHandle | None = None
        self.watch_patches()

    def watch_patches(self) -> None:
        """Add poses to what the present `patch_embedding` makes: to be called when it has become another."""
        if self._handle is not None:
            self._handle.remove()
        layer = self.patch_embedding
        # A LoRA comes and goes around the layer.
        layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        self._handle = layer.register_forward_hook(self._with_pose)

    def _with_pose(self, _layer: nn.Module, _inputs: Any, patches: torch.Tensor) -> torch.Tensor:
        pose, self._pose = self._pose, None
        return patches if pose is None else patches + pose

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """As in the parent; what `attention_kwargs` may hold beside, the class tells.

        Raises:
            ValueError: for poses of another shape than the film.
        """
        given = dict(attention_kwargs or {})
        pose, weight = given.pop("pose", None), given.pop("pose_weight", None)
        inputs = (hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image)
        if pose is None:
            return super().forward(*inputs, return_dict=return_dict, attention_kwargs=given)
        self._check_pose(pose, hidden_states)
        self._pose = self.pose_embedder(pose.to(device=hidden_states.device, dtype=hidden_states.dtype))
        if weight is not None:
            self._pose = self._pose * weight.to(self._pose).view(-1, 1, 1, 1, 1)
        try:
            predicted = super().forward(*inputs, return_dict=return_dict, attention_kwargs=given)
            assert self._pose is None, "`patch_embedding` has become another: call `watch_patches`"
        finally:
            self._pose = None
        return predicted

    def _check_pose(self, pose: torch.Tensor, hidden_states: torch.Tensor) -> None:
        batch, _, latent_frames, *size = hidden_states.shape
        # Three of the layers halve height and width, as the VAE does.
        wanted = (batch, 3, 1 + TEMPORAL_FACTOR * (latent_frames - 1), *(8 * length for length in size))
        if pose.shape != wanted:
            raise ValueError(f"`pose` must be (batch, 3, frames, height, width) = {wanted}, got {tuple(pose.shape)}.")
