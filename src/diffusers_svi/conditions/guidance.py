"""Guidance by two conditions in three passes, through a pipeline that knows of two."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AudioGuidance:
    r"""How far text and audio are followed.

    Of three predictions, u with neither (the negative prompt, and audio of zeros), d with the audio and the negative
    prompt, and c with both, the guided one is

        v = u + audio_guidance_scale · (d - u) + guidance_scale · (c - d)

    A pipeline of diffusers makes v = u' + guidance_scale · (c - u') out of two. Both are the same for

        u' = (u + audio_guidance_scale · (d - u) - guidance_scale · d) / (1 - guidance_scale)

    Without guidance by the text (a `guidance_scale` of 1 and less) the pipeline makes one prediction, with the prompt,
    and there is no negative prompt: v = u + audio_guidance_scale · (c - u), where u has the prompt too.

    Args:
        guidance_scale (`float`): Of the text.
        audio_guidance_scale (`float`): Of the audio; at 1, d or c alone is what is asked for, and no pass is added.
    """

    guidance_scale: float
    audio_guidance_scale: float

    def adds_a_pass(self, call: str | None) -> bool:
        """Whether the audio is also to be left out in a call of the pipeline, its "cond" or its "uncond"."""
        guided = "uncond" if self.guidance_scale > 1 else "cond"
        return self.audio_guidance_scale != 1 and call == guided

    def combined(self, heard: torch.Tensor, unheard: torch.Tensor) -> torch.Tensor:
        """The prediction that the pipeline is given, in float32: `heard` has the audio, `unheard` does not."""
        heard, unheard = heard.float(), unheard.float()
        guided = unheard + self.audio_guidance_scale * (heard - unheard)
        if self.guidance_scale <= 1:
            return guided
        return (guided - self.guidance_scale * heard) / (1 - self.guidance_scale)
