"""What diffusers' caches (`transformer.enable_cache`) ask for beside what the parent gives them."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from diffusers import FasterCacheConfig, PyramidAttentionBroadcastConfig, SchedulerMixin, WanTransformer3DModel


# They keep one memory for all calls, and Wan's pipeline makes two a step.
_FOR_ONE_PASS = (PyramidAttentionBroadcastConfig, FasterCacheConfig)


def check_caches(transformers: Iterable[WanTransformer3DModel], guidance_scale: float) -> None:
    """Refuse a cache that would do nothing, or wrong.

    Raises:
        ValueError: if one is enabled, but none of the transformer's layers was named to it; if it would answer the
            call without the prompt with what it kept of the call with it.
    """
    for transformer in transformers:
        config = transformer._cache_config
        if isinstance(config, _FOR_ONE_PASS) and guidance_scale > 1:
            raise ValueError(
                f"`{type(config).__name__}` cannot be used with guidance (`guidance_scale`, `guidance_scale_2` over "
                "1): it would answer the pass without the prompt with the attention of the pass with it. Turn it "
                "off, or take a cache that keeps them apart, as `FirstBlockCacheConfig` does."
            )
        hooks = [
            hook
            for module in transformer.modules()
            for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values()
        ]
        if transformer.is_cache_enabled and not any(hook._is_stateful for hook in hooks):
            raise ValueError(
                f"`{type(config).__name__}` has no effect: the layers that it names do not exist in Wan. Call "
                "`disable_cache()`, then `enable_cache()` with names that do, for `TaylorSeerCacheConfig` "
                r"`cache_identifiers=(r'blocks\.\d+\.attn[12]',)`."
            )


@contextmanager
def steps_told(transformers: Iterable[WanTransformer3DModel], scheduler: SchedulerMixin) -> Iterator[None]:
    """While this is open, the transformers' `cache_context` tells where denoising is.

    The parent gives the name of a call alone, "cond" or "uncond". `SeaCacheConfig` needs index, count and sigma of the
    step too, and computes every step where it does not get them. A scheduler that has none of that tells nothing.
    """
    with ExitStack() as stack:
        for transformer in transformers:
            transformer.cache_context = _told(transformer.cache_context, scheduler)
            stack.callback(delattr, transformer, "cache_context")
        yield


def _told(cache_context: Any, scheduler: Any) -> Any:
    def context(name: str, **given: Any) -> AbstractContextManager[None]:
        step = getattr(scheduler, "step_index", None) or 0  # None until the first step is done
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is not None:
            told = {"step_index": step, "num_inference_steps": len(scheduler.timesteps), "sigma": float(sigmas[step])}
            given = told | given
        return cache_context(name, **given)

    return context
