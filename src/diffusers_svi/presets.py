"""The published family: which model a LoRA is for, how its films were made, and the ways of loading it."""

from dataclasses import dataclass


WAN_21 = "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
WAN_21_720P = "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"
WAN_22 = "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
WAN_22_5B = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
AUTHORS = "vita-video-gen/svi-model"
# Seeds of the clips are so far apart. source: the authors' `seed_times`
SEED_STEP = 42
DTYPES = ("float32", "bfloat16", "float16")
OFFLOADS = ("none", "model", "group")
QUANTIZATIONS = ("none", "quanto", "fp8")
# Kinds of GGUF files whose memory is planned.
GGUF = ("Q8_0", "Q4_0", "Q4_K")
_EXPERT = "version-2.0/SVI_Wan2.2-I2V-A14B_{expert}_noise_lora_v2.0{kind}.safetensors"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A member of the family. Scheme and what CLIP sees come with its LoRA.

    Args:
        model (`str`): Base model on the Hub.
        lora (`str`, *optional*): Repository of its LoRA.
        weight_name, weight_name_2 (`str`, *optional*): Its file there, and that of the low-noise expert.
        guidance_scale (`float`, defaults to 5.0): Weight of the prompt.
        fps (`int`, defaults to 16): Frames a second.
        shift (`float`, defaults to 5.0): Flow shift of the Euler schedule.
        num_inference_steps (`int`, defaults to 50): Steps a clip.
        num_frames (`int`, defaults to 81): Frames a clip.
        follows (`str`, *optional*): What its films follow beside text, "audio" or "pose".
    """

    model: str
    lora: str | None = AUTHORS
    weight_name: str | None = None
    weight_name_2: str | None = None
    guidance_scale: float = 5.0
    fps: int = 16
    shift: float = 5.0
    num_inference_steps: int = 50
    num_frames: int = 81
    follows: str | None = None

    def has_lora(self, lora: str | None) -> bool:
        """Whether films have a LoRA where `lora` is asked for: another one, "none", or that of the preset."""
        return (lora or self.lora or "none") != "none"


def _a14b(kind: str, guidance_scale: float = 5.0) -> Preset:
    high, low = (_EXPERT.format(expert=expert, kind=kind) for expert in ("high", "low"))
    return Preset(model=WAN_22, weight_name=high, weight_name_2=low, fps=15, guidance_scale=guidance_scale)


PRESETS = {
    "film": Preset(model=WAN_21, weight_name="version-1.0/svi-film-opt-10212025.safetensors"),
    "film-transitions": Preset(model=WAN_21, weight_name="version-1.0/svi-film-transitions.safetensors"),
    "shot": Preset(model=WAN_21, weight_name="version-1.0/svi-shot.safetensors"),
    "tom": Preset(model=WAN_21, weight_name="version-1.0/svi-tom.safetensors"),
    "film-2.0": Preset(model=WAN_21, weight_name="version-2.0/SVI_Wan2.1-I2V-14B_lora_v2.0.safetensors"),
    "shot-2.0": _a14b(""),
    "pro": _a14b("_pro", guidance_scale=4.0),
    "talk": Preset(
        model=WAN_21, weight_name="version-1.0/svi-talk.safetensors", guidance_scale=2.0, fps=25, follows="audio"
    ),
    "dance": Preset(
        model=WAN_21, weight_name="version-1.0/svi-dance.safetensors", guidance_scale=2.0, fps=25, follows="pose"
    ),
    "ti2v-5b": Preset(model=WAN_22_5B, lora="Impulse2000/svi-model-pro-5b", fps=24),
    "none": Preset(model=WAN_21, lora=None),
}
