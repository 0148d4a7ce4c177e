"""What the first clip of a film begins with: its start image, or the state of a chain that goes on."""

import torch
from diffusers.utils import logging

from .chain import ChainState
from .conditioning import Scheme
from .fingerprints import differences


logger = logging.get_logger(__name__)

# Under this name a state tells the seed of its last clip, where it had one of its own.
SEED = "seed"


def first_state(
    pixels: torch.Tensor | None,
    state: ChainState | None,
    scheme: Scheme,
    num_frames: int,
    height: int,
    width: int,
    latent_shape: tuple[int, int, int, int],
    generator: torch.Generator | None,
) -> ChainState:
    """What the first clip begins with: `state` if it fits, or a new one out of `pixels`, the start image.

    `latent_shape` is that of a clip: channels, latent frames, height and width.
    """
    if state is None:
        assert pixels is not None
        return ChainState(conditioning=scheme, num_frames=num_frames, image=pixels)
    asked, saved = (num_frames, height, width), (state.num_frames, *state.image.shape[-2:])
    if asked != saved:
        raise ValueError(
            f"`state` comes from a chain with `num_frames`, `height`, `width` = {saved}, but {asked} is asked for."
        )
    channels, _, *size = latent_shape
    carried = None if state.latents is None else (state.latents.shape[1], *state.latents.shape[3:])
    if carried is not None and carried != (channels, *size):
        of_state, of_model = (" x ".join(map(str, shape)) for shape in (carried, (channels, *size)))
        raise ValueError(
            f"`state` carries latents of {of_state} (channels x height x width), but this model's are of {of_model}: "
            "it comes from a chain of another model."
        )
    if pixels is not None and not torch.equal(pixels, state.image):
        raise ValueError("`image` is not the start image of the chain that `state` comes from. Leave it out.")
    if state.generator is not None and generator is None:
        raise ValueError(
            "`state` comes from a chain that drew its noise from a `generator`. Pass one, in any state, on the "
            "same kind of device: it is set to where the chain stopped."
        )
    if state.generator is not None and generator is not None:
        try:
            torch.Generator(generator.device).set_state(state.generator)
        except RuntimeError as error:
            raise ValueError(
                f"`state` holds a state of its generator that a `generator` on {generator.device} does not take: "
                f"{error} Pass one on the kind of device that the chain was made on."
            ) from error
    return state


def refuse_changes(state: ChainState, now: dict[str, str]) -> None:
    """Raise a `ValueError` where a chain cannot go on with what there is now."""
    changed = differences(state.made_with, now)
    for name, remedy in (
        ("model", "Load the model that it was made with."),
        ("noise", "Pass the same one, of the whole film."),
    ):
        if name in changed:
            before, after = changed[name]
            raise ValueError(f"`state` comes from a chain with `{name}` {before!r}, but now it is {after!r}. {remedy}")


def warn_of_changes(state: ChainState, now: dict[str, str]) -> None:
    """Warn where the last clip of a chain was made with something else than it would be now."""
    changed = differences(state.made_with, now)
    if changed:
        told = "; ".join(f"{name}: {before} then, {after} now" for name, (before, after) in changed.items())
        logger.warning(
            f"`state` comes from a chain that was made with something else ({told}). The film goes on with what is "
            "there now; pass `ignore_state_settings=True` if that is meant."
        )
