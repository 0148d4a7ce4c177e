"""Context parallelism of diffusers (`transformer.enable_parallelism`): the tokens of a clip, shared by processes."""

import math
from collections.abc import Iterable

from diffusers import WanTransformer3DModel


def check_context_parallel(transformers: Iterable[WanTransformer3DModel], latents: tuple[int, ...]) -> None:
    """Refuse a film that the processes cannot share, which diffusers would notice in the first clip.

    Args:
        transformers (`Iterable[WanTransformer3DModel]`): Of the pipeline.
        latents (`tuple[int, int, int, int]`):
            Shape of a clip's latents, `(z_dim, latent_frames, latent_height, latent_width)`.

    Raises:
        ValueError: if the tokens of a clip, or with Ulysses the heads of attention, are no multiple of the processes.
    """
    for transformer in transformers:
        config = getattr(transformer._parallel_config, "context_parallel_config", None)
        if config is None or config.ulysses_anything or config.ring_anything:
            continue
        lengths = zip(latents[1:], transformer.config.patch_size, strict=True)
        tokens, heads = math.prod(length // patch for length, patch in lengths), transformer.config.num_attention_heads
        processes = config.ring_degree * config.ulysses_degree
        if tokens % processes or heads % config.ulysses_degree:
            raise ValueError(
                f"`height`, `width` and `num_frames` make {tokens} tokens a clip, for {heads} heads of attention: "
                f"{processes} processes cannot share them evenly. Choose another size, as many processes as divide "
                "both, or `ContextParallelConfig(ulysses_anything=True)`."
            )
