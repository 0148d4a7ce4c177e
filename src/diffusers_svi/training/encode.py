"""What the encoders make of samples and captions. It is kept in a cache, and they are loaded only for what is missing.

The latents of clips and conditions are those of the schemes, so training sees what inference will see.
"""

import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import WanImageToVideoPipeline
from diffusers.training_utils import free_memory
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from ..checks import check_choice
from ..conditioning import Carried, Scheme
from ..pixels import CLIP_RESIZES, squash, to_pil, to_uint8
from ..wan import encode_video
from .cache import CachedSamples, TensorCache, fingerprint
from .samples import Samples


ENCODERS = ("vae", "text_encoder", "tokenizer", "image_encoder", "image_processor")


def fingerprint_encoders(folder: str | os.PathLike) -> str:
    """Of the encoders in a local model folder, 64 hexadecimal digits: their settings and the ends of their weights."""
    folder, digest = Path(folder), hashlib.sha256()
    for component in ENCODERS:
        for file in sorted((folder / component).rglob("*")):
            if not file.is_file():
                continue
            digest.update(f"{file.relative_to(folder)} {file.stat().st_size}".encode())
            with open(file, "rb") as stream:
                # Whatever changes weights changes both ends of the file; reading all of a text encoder takes long.
                digest.update(stream.read(2**20))
                stream.seek(max(0, file.stat().st_size - 2**20))
                digest.update(stream.read())
    return digest.hexdigest()


@torch.no_grad()
def encode_sample(
    pipe: WanImageToVideoPipeline,
    sample: dict,
    scheme: Scheme,
    num_frames: int,
    first_clips: bool = False,
    clip_resize: str = "crop",
) -> dict[str, torch.Tensor]:
    """Latents of a sample's clip and what the model is given to go on from the clip before.

    Args:
        pipe (`WanImageToVideoPipeline`): With the encoders; it needs no transformer.
        sample (`dict`): One of [`Samples`]; with a history if the scheme carries latents.
        scheme (`Scheme`): How clips are chained.
        num_frames (`int`): Frames of the clip.
        first_clips (`bool`, defaults to `False`): Whether it is to be told too what the first clip of a film is given.

    Returns:
        On the CPU in float32: `latents` `(z_dim, latent_frames, h, w)`, `condition` of [`Scheme.condition`] and, for
        models with an image encoder, `image_embeds` `(tokens, dim)`; with `first_clips` the last two also as
        `first_condition` and `first_image_embeds`.
    """
    device = pipe.vae.device
    video, frames, reference = (sample[name][None].to(device) for name in ("video", "condition", "reference"))
    clip, history = video[:, :, -num_frames:], video[:, :, :num_frames]
    # A film begins with its start image, which is the reference or anchor too.
    known, first = Carried(reference), Carried(frames[:, :, 0])
    # source: the image that CLIP sees is the first condition frame, never augmented; with an anchor latent, the anchor
    begin = clip[:, :, 0]
    seen = reference
    if scheme.carried_latents:
        known = Carried(reference, latents=encode_video(pipe.vae, history))
    elif scheme.carried_frames:
        known, first = Carried(reference, frames), Carried(begin, frames[:, :, :1])
        seen = begin
    given = {"": (known, seen), **({"first_": (first, begin)} if first_clips else {})}

    encoded = {"latents": encode_video(pipe.vae, clip)}
    for prefix, (carried, image) in given.items():
        encoded[f"{prefix}condition"] = scheme.condition(
            pipe.vae, carried, num_frames, bool(pipe.config.expand_timesteps)
        )
        if pipe.image_encoder is not None:
            picture = to_pil(to_uint8(image[0]))
            if clip_resize == "squash":
                picture = squash(picture, pipe.image_encoder.config.image_size)
            encoded[f"{prefix}image_embeds"] = pipe.encode_image(picture, device)
    return {name: value[0].float().cpu() for name, value in encoded.items()}


@torch.no_grad()
def encode_caption(pipe: WanImageToVideoPipeline, caption: str, max_sequence_length: int = 512) -> torch.Tensor:
    """The embedding of a prompt as the pipeline has it, `(tokens, dim)`, on the CPU in float32."""
    embeds = pipe.encode_prompt(caption, None, False, max_sequence_length=max_sequence_length)[0]
    return embeds[0].float().cpu()


def encode_samples(
    samples: Samples,
    scheme: Scheme,
    cache: TensorCache,
    load_pipeline: Callable[[], WanImageToVideoPipeline],
    encoders: str,
    *,
    text_dtype: torch.dtype,
    max_sequence_length: int = 512,
    first_clips: bool = False,
    clip_resize: str = "crop",
    num_workers: int = 0,
) -> tuple[CachedSamples, torch.Tensor]:
    """All samples, encoded; what the cache lacks is added to it, by every process its share.

    Args:
        samples (`Samples`): What is trained on.
        scheme (`Scheme`): How clips are chained.
        cache (`TensorCache`): Where what is encoded is kept.
        load_pipeline (`Callable`): Gives the pipeline with its encoders; called only if anything is missing.
        encoders (`str`): What they are, part of the keys: `fingerprint_encoders` of their folder.
        text_dtype (`torch.dtype`): What the text encoder computes in, part of the keys of captions.
        max_sequence_length (`int`, defaults to 512): Tokens of a prompt.
        first_clips (`bool`, defaults to `False`), clip_resize (`str`, defaults to `"crop"`):
            As in [`encode_sample`].
        num_workers (`int`, defaults to 0): Processes that read the videos.

    Returns:
        The samples, as [`encode_sample`] has them and with `prompt_embeds`, and the embedding of the empty prompt.
    """
    check_choice("clip_resize", clip_resize, CLIP_RESIZES)
    state = PartialState()
    captions = [samples.caption(index) for index in range(len(samples))]
    kinds = [*(["first"] if first_clips else []), *(["squash"] if clip_resize == "squash" else [])]
    keys = [fingerprint(samples.key(i), encoders, scheme.to_dict(), *kinds) for i in range(len(samples))]
    text_keys = {
        caption: fingerprint(encoders, str(text_dtype), max_sequence_length, caption) for caption in {*captions, ""}
    }
    missing = [index for index, key in enumerate(keys) if key not in cache]
    missing_texts = sorted(caption for caption, key in text_keys.items() if key not in cache)
    # No process may look for what another one has already written.
    state.wait_for_everyone()
    if missing or missing_texts:
        pipe = load_pipeline()
        progress = partial(tqdm, disable=not state.is_main_process, leave=False)
        with state.split_between_processes(missing_texts) as share:
            for caption in progress(share, desc="Encoding captions"):
                cache.save(text_keys[caption], {"prompt_embeds": encode_caption(pipe, caption, max_sequence_length)})
        with state.split_between_processes(missing) as share:
            loader = DataLoader(Subset(samples, share), batch_size=None, num_workers=num_workers)
            for index, sample in zip(share, progress(loader, desc="Encoding clips"), strict=True):
                num_frames = samples.layout(index).num_frames
                encoded = encode_sample(pipe, sample, scheme, num_frames, first_clips, clip_resize)
                cache.save(keys[index], encoded)
        del pipe
        free_memory()
    state.wait_for_everyone()
    dataset = CachedSamples(cache, [(key, text_keys[text]) for key, text in zip(keys, captions, strict=True)])
    return dataset, cache.load(text_keys[""])["prompt_embeds"]
