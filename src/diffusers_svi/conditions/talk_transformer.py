"""`SVITalkTransformer3DModel`: a Wan transformer that hears, by the audio modules of MultiTalk."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from diffusers import WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - of a saved pipeline, diffusers looks for it here
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import nn

from ..wan import TEMPORAL_FACTOR
from .windows import latent_windows


class AudioEmbedder(nn.Module):
    """Tokens of audio for every latent frame.

    Args:
        window (`int`): Rows of features around a frame.
        audio_dim (`int`): Values of a row, layers times channels.
        hidden_dim (`int`): Of its layers.
        num_tokens (`int`): For a latent frame.
        token_dim (`int`): Of a token.
    """

    def __init__(self, window: int, audio_dim: int, hidden_dim: int, num_tokens: int, token_dim: int) -> None:
        super().__init__()
        self.first = nn.Linear(window * audio_dim, hidden_dim)
        self.rest = nn.Linear((window + TEMPORAL_FACTOR - 1) * audio_dim, hidden_dim)
        self.hidden = nn.Linear(hidden_dim, hidden_dim)
        self.tokens = nn.Linear(hidden_dim, num_tokens * token_dim)
        self.norm = FP32LayerNorm(token_dim)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """From `(batch, 1 + 4n, window, layers, channels)` to `(batch, 1 + n, num_tokens, token_dim)`."""
        first, rest = latent_windows(windows)
        hidden = torch.cat([self.first(first.flatten(2)), self.rest(rest.flatten(2))], dim=1).relu()
        tokens = self.tokens(self.hidden(hidden).relu())
        return self.norm(tokens.unflatten(2, (-1, *self.norm.normalized_shape)))


class AudioAttnProcessor:
    """Attention of the tokens of a latent frame to the audio of that frame, and to no other."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "AudioAttention", hidden_states: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
        batch, frames = audio.shape[:2]
        # (batch, frames x tokens of a frame, dim) -> (batch x frames, tokens of a frame, heads, head_dim)
        query = attn.to_q(hidden_states).unflatten(1, (frames, -1)).flatten(0, 1).unflatten(2, (attn.heads, -1))
        key, value = (layer(audio).flatten(0, 1).unflatten(2, (attn.heads, -1)) for layer in (attn.to_k, attn.to_v))
        heard = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        heard = heard.flatten(2, 3).type_as(hidden_states).unflatten(0, (batch, frames)).flatten(1, 2)
        return attn.to_out(heard)


class AudioAttention(nn.Module, AttentionModuleMixin):
    """The attention of [`AudioAttnProcessor`]: no norms of queries and keys, no positions.

    Args:
        dim (`int`): Of the tokens of the film.
        heads (`int`): Of the attention.
        token_dim (`int`): Of the tokens of audio.
    """

    _default_processor_cls = AudioAttnProcessor
    _available_processors: ClassVar[list[type]] = [AudioAttnProcessor]
    _supports_qkv_fusion = False
    is_cross_attention = True

    def __init__(self, dim: int, heads: int, token_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(token_dim, dim)
        self.to_v = nn.Linear(token_dim, dim)
        self.to_out = nn.Linear(dim, dim)
        self.processor: Any = AudioAttnProcessor()

    def forward(self, hidden_states: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
        return self.processor(self, hidden_states, audio)


class SVITalkTransformerBlock(WanTransformerBlock):
    """A block of Wan with attention to audio between that to the text and the feed-forward network.

    Args:
        token_dim (`int`): Of the tokens of audio.
        dim, ffn_dim, num_heads, qk_norm, cross_attn_norm, eps, added_kv_proj_dim: As in the parent.
    """

    def __init__(
        self,
        token_dim: int,
        dim: int,
        ffn_dim: int,
        num_heads: int,
        qk_norm: str = "rms_norm_across_heads",
        cross_attn_norm: bool = False,
        eps: float = 1e-6,
        added_kv_proj_dim: int | None = None,
    ) -> None:
        super().__init__(dim, ffn_dim, num_heads, qk_norm, cross_attn_norm, eps, added_kv_proj_dim)
        self.audio_norm = FP32LayerNorm(dim, eps)
        self.audio_attn = AudioAttention(dim, num_heads, token_dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        """As in the parent; the tokens of audio come behind the two tensors of `rotary_emb`, if there are any."""
        cos, sin, *audio = rotary_emb
        modulation = self.scale_shift_table + temb.float()
        # Of TI2V-5B every token has a modulation of its own: (batch, tokens, 6, dim) instead of (batch, 6, dim).
        shift, scale, gate, ff_shift, ff_scale, ff_gate = (
            modulation.unbind(2) if temb.ndim == 4 else modulation.chunk(6, dim=1)
        )
        normed = (self.norm1(hidden_states.float()) * (1 + scale) + shift).type_as(hidden_states)
        attended = self.attn1(normed, None, None, (cos, sin))
        hidden_states = (hidden_states.float() + attended * gate).type_as(hidden_states)

        normed = self.norm2(hidden_states.float()).type_as(hidden_states)
        hidden_states = hidden_states + self.attn2(normed, encoder_hidden_states, None, None)

        if audio:
            normed = self.audio_norm(hidden_states.float()).type_as(hidden_states)
            hidden_states = hidden_states + self.audio_attn(normed, audio[0])

        normed = (self.norm3(hidden_states.float()) * (1 + ff_scale) + ff_shift).type_as(hidden_states)
        return (hidden_states.float() + self.ffn(normed).float() * ff_gate).type_as(hidden_states)


# diffusers' caches ask what a block returns.
TransformerBlockRegistry.register(SVITalkTransformerBlock, TransformerBlockMetadata(return_hidden_states_index=0))


class SVITalkTransformer3DModel(WanTransformer3DModel):
    r"""A Wan transformer with the audio modules of MultiTalk: a projection of audio, and an attention in every block.

    A call hears what `attention_kwargs` has under `"audio"`: `(batch, 1 + 4n, audio_window, layers, channels)`, what
    [`audio_windows`] gives for every frame. With an [`AudioGuidance`] under `"audio_guidance"`, the call that it names
    (as `cache_context` tells it) is made twice, with this audio and with zeros, and answered by one combination of
    both in float32. Without `"audio"` the model is its parent.

    Tokens of audio reach the blocks as arguments, behind their positions: what is computed again, with gradient
    checkpointing, hears what was heard first. A context-parallel run is not supported, as it would cut latent frames.

    Args:
        audio_window (`int`, defaults to 5): Rows of features that a frame hears.
        audio_dim (`int`, defaults to 9216): Values of a row, layers times channels: 12 x 768 of wav2vec2-base.
        audio_hidden_dim (`int`, defaults to 512): Of the layers of the projection.
        audio_tokens (`int`, defaults to 32): Tokens of audio of a latent frame.
        audio_token_dim (`int`, defaults to 768): Values of a token.
        patch_size, ..., pos_embed_seq_len: As in the parent.
    """

    _no_split_modules: ClassVar[list[str]] = ["SVITalkTransformerBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["SVITalkTransformerBlock"]
    _keep_in_fp32_modules: ClassVar[list[str]] = [*WanTransformer3DModel._keep_in_fp32_modules, "audio_norm"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = [
        *WanTransformer3DModel._skip_layerwise_casting_patterns,
        "audio_embedder",
    ]
    _cp_plan = None

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
        audio_window: int = 5,
        audio_dim: int = 12 * 768,
        audio_hidden_dim: int = 512,
        audio_tokens: int = 32,
        audio_token_dim: int = 768,
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
        dim = num_attention_heads * attention_head_dim
        block = (dim, ffn_dim, num_attention_heads, qk_norm, cross_attn_norm, eps, added_kv_proj_dim)
        self.blocks = nn.ModuleList([SVITalkTransformerBlock(audio_token_dim, *block) for _ in range(num_layers)])
        self.audio_embedder = AudioEmbedder(audio_window, audio_dim, audio_hidden_dim, audio_tokens, audio_token_dim)
        # What a call hears, until the blocks have it; and what the pipeline calls this call.
        self._audio: torch.Tensor | None = None
        self._call: str | None = None
        self.rope.register_forward_hook(self._with_audio)

    def _with_audio(self, _rope: nn.Module, _inputs: Any, rotary_emb: tuple[torch.Tensor, ...]) -> Any:
        audio, self._audio = self._audio, None
        return rotary_emb if audio is None else (*rotary_emb, audio)

    @contextmanager
    def cache_context(self, name: str, **told: Any) -> Iterator[None]:
        """As in the parent; `name` is also which of the passes of guidance this is."""
        before, self._call = self._call, name
        try:
            with super().cache_context(name, **told):
                yield
        finally:
            self._call = before

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
            ValueError: for audio of another shape than the film and the model ask for.
        """
        given = dict(attention_kwargs or {})
        audio, guidance = given.pop("audio", None), given.pop("audio_guidance", None)
        inputs = (hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image)
        if audio is None:
            return super().forward(*inputs, return_dict=return_dict, attention_kwargs=given)
        self._check_audio(audio, hidden_states)
        predicted = self._hearing(audio, inputs, given)
        if guidance is not None and guidance.adds_a_pass(self._call):
            # Caches keep this pass apart from the other two.
            with self.cache_context("without audio"):
                unheard = self._hearing(torch.zeros_like(audio), inputs, given)
            predicted = guidance.combined(predicted, unheard)
        return Transformer2DModelOutput(sample=predicted) if return_dict else (predicted,)

    def _hearing(self, audio: torch.Tensor, inputs: tuple, given: dict[str, Any]) -> torch.Tensor:
        hidden_states = inputs[0]
        self._audio = self.audio_embedder(audio.to(device=hidden_states.device, dtype=hidden_states.dtype))
        return super().forward(*inputs, return_dict=False, attention_kwargs=given)[0]

    def _check_audio(self, audio: torch.Tensor, hidden_states: torch.Tensor) -> None:
        frames = 1 + TEMPORAL_FACTOR * (hidden_states.shape[2] // self.config.patch_size[0] - 1)
        wanted = (hidden_states.shape[0], frames, self.config.audio_window)
        if audio.ndim != 5 or audio.shape[:3] != wanted or audio[0, 0, 0].numel() != self.config.audio_dim:
            raise ValueError(
                f"`audio` must be (batch, frames, window, layers, channels) with {wanted} and layers x channels = "
                f"{self.config.audio_dim}, got {tuple(audio.shape)}."
            )
