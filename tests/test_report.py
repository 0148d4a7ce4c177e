"""What a run tells of itself: films with their figures, and the model card."""

import json
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from conftest import make_components
from diffusers_svi import HeldLatents, LatentMotion, PixelMotion, SVIEulerScheduler, SVIPipeline
from diffusers_svi.lora_file import lora_metadata
from diffusers_svi.training.films import save_film
from diffusers_svi.training.model_card import (
    TrainedLora,
    make_model_card,
    read_description,
    weight_name,
    write_model_card,
)
from diffusers_svi.training.quality import drift_figures
from test_lora import make_lora


def test_a_film_its_strip_and_its_figures(tmp_path):
    """The second clip ends darker by a fifth, with half the contrast and half the sharpness."""
    stripes = np.where(np.arange(32) % 4 < 2, 0.3, 0.7)[None, :, None] * np.ones((16, 32, 3))
    dark = 0.5 + (stripes - 0.5) / 2 - 0.2
    clips = [np.stack([np.zeros_like(stripes), stripes]), np.stack([stripes, stripes, dark])]
    figures = save_film(tmp_path / "validation" / "step-3.mp4", clips, fps=8)
    assert figures["colour_shift"] == pytest.approx([0, 0.2])
    assert figures["contrast_kept"] == pytest.approx([1, 0.5])
    assert figures["sharpness_kept"] == pytest.approx([1, 0.5])
    assert json.loads((tmp_path / "validation" / "step-3.json").read_text()) == figures == drift_figures(clips)
    strip = np.asarray(PIL.Image.open(tmp_path / "validation" / "step-3.png"))
    assert np.array_equal(strip, np.concatenate([stripes, dark], axis=1).__mul__(255).round())
    with av.open(tmp_path / "validation" / "step-3.mp4") as container:
        assert container.streams.video[0].average_rate == 8
        assert sum(1 for _ in container.decode(video=0)) == 5


def trained(**values) -> TrainedLora:
    settings = {"preset": "pro", "p_vid": 0.9, "export_rank": None}
    settings |= {"height": 64, "width": 96, "num_frames": 17, "fps": 8, "flow_shift": 3.5}
    options = {"base_model": "Wan-AI/some-model", "scheme": LatentMotion(1), "method": "by hand", "settings": settings}
    return TrainedLora(**{**options, **values})


def write_card(folder: Path, *loras: TrainedLora) -> ModelCard:
    """By way of what lies beside the weights."""
    for lora in loras:
        lora.save(folder)
        assert read_description(folder, lora.expert) == lora
    write_model_card(folder, "me/my-lora", loras[0].expert)
    return ModelCard.load(folder / "README.md")


def code_of(card: ModelCard) -> str:
    code = card.text.split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")
    return code


def test_the_card_says_how_the_lora_is_used_and_was_made(tmp_path):
    # A card that was there before is not what is written.
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\nAn older card.\n")
    card = write_card(tmp_path, trained())
    data = card.data.to_dict()
    assert data.pop("tags") == ["image-to-video", "diffusers", "diffusers-training", "lora", "wan", "svi"]
    assert data == {
        "base_model": "Wan-AI/some-model",
        "library_name": "diffusers",
        "pipeline_tag": "image-to-video",
    }
    text = card.text
    assert "An older card" not in text and "trained by hand" in text and "`LatentMotion(num_latents=1)`" in text
    assert "[Wan-AI/some-model](https://huggingface.co/Wan-AI/some-model)" in text
    assert "| preset | pro |\n| p_vid | 0.9 |\n" in text and "export_rank" not in text and "## Sample" not in text
    code = code_of(card)
    assert '    "me/my-lora",\n    weight_name="pytorch_lora_weights.safetensors",\n)' in code
    assert "height=64,\n    width=96,\n    num_frames=17,\n" in code and "fps=8)" in code
    # In the table and in the example alike.
    assert "from_config(pipe.scheduler.config, shift=3.5)" in code and "| flow_shift | 3.5 |" in text


def test_the_card_of_an_expert_with_a_sample(tmp_path):
    figures = {"colour_shift": [0.0, 0.12345], "sharpness_kept": [1.0, 0.9]}
    low = trained(base_model=str(tmp_path), expert="low", film="validation/step-3.mp4", figures=figures)
    card = write_card(tmp_path, low)
    # The Hub takes no local folder for a model.
    assert card.data.base_model is None and f"`{tmp_path}`" in card.text
    name = "pytorch_lora_weights_low_noise.safetensors"
    assert f'    weight_name="{name}",\n    load_into_transformer_2=True,\n' in code_of(card)
    assert "[2 clips](validation/step-3.mp4)" in card.text and "(validation/step-3.png)" in card.text
    assert (
        "| clip | colour shift | sharpness kept |\n|---|---|---|\n| 1 | 0.000 | 1.000 |\n| 2 | 0.123 | 0.900 |\n"
        in (card.text)
    )


@pytest.mark.parametrize(
    ("kind", "experts", "scheme"),
    [
        ("wan2.1", [None], PixelMotion(5, "reference", num_references=2)),
        ("a14b", ["high"], LatentMotion(1)),
        ("a14b", ["low"], LatentMotion(1)),
        ("a14b", ["high", "low"], LatentMotion(1)),
        ("ti2v-5b", [None], HeldLatents(1)),
    ],
)
def test_the_code_of_the_card_runs(tmp_path, monkeypatch, kind, experts, scheme):
    """On a local model of the kind, small and without a GPU, but else word for word."""
    monkeypatch.chdir(tmp_path)
    pipe = SVIPipeline(**make_components(kind))
    pipe.save_pretrained("model")
    PIL.Image.new("RGB", (32, 32), "teal").save("start.png")
    Path("me/my-lora").mkdir(parents=True)
    settings = {"height": 32, "width": 32, "num_frames": 9, "fps": 8, "flow_shift": 3.5}
    for expert in experts:
        save_file(make_lora(pipe.transformer), f"me/my-lora/{weight_name(expert)}", lora_metadata(scheme, expert))
        lora = trained(base_model="model", scheme=scheme, expert=expert, settings=settings)
        lora.save("me/my-lora")
    write_model_card("me/my-lora", "me/my-lora", experts[0])
    code = code_of(ModelCard.load("me/my-lora/README.md")).replace('.to("cuda")', "")
    names = {}
    exec(code.replace("film = pipe(\n", "film = pipe(\n    num_inference_steps=2,\n"), names)
    pipe = names["pipe"]
    assert pipe.lora_conditioning == scheme and len(names["film"]) == scheme.film_length(2, 9)
    assert pipe.vae.dtype == torch.float32 and pipe.transformer.dtype == torch.bfloat16
    assert type(pipe.scheduler) is SVIEulerScheduler and pipe.scheduler.config.shift == 3.5
    in_use = [expert for expert, part in (("high", pipe.transformer), ("low", pipe.transformer_2)) if has_lora(part)]
    assert in_use == [expert or "high" for expert in experts]


def has_lora(transformer) -> bool:
    return bool(getattr(transformer, "peft_config", {}))


def test_the_card_of_both_experts(tmp_path):
    """Each has a column; the high-noise one stands first, whichever was trained last."""
    low = trained(expert="low", method="otherwise", settings={**trained().settings, "p_vid": None, "seed": 3})
    card = write_card(tmp_path, low, trained(expert="high"))
    names = [f"pytorch_lora_weights_{expert}_noise.safetensors" for expert in ("high", "low")]
    assert f'    weight_name="{names[0]}",\n    weight_name_2="{names[1]}",\n)' in code_of(card)
    assert "| setting | high-noise expert | low-noise expert |\n|---|---|---|\n| preset | pro | pro |" in card.text
    assert "| p_vid | 0.9 |  |" in card.text and "| seed |  | 3 |" in card.text
    assert "trained by hand and otherwise" in card.text
    other = trained(expert="high", scheme=PixelMotion(1))
    with pytest.raises(
        ValueError, match=r"the high-noise one is for PixelMotion.* the low-noise one for LatentMotion"
    ):
        make_model_card("me/my-lora", [other, low])
    with pytest.raises(ValueError, match="`settings` lacks width, fps, which"):
        trained(settings={"height": 64, "num_frames": 17, "flow_shift": 5.0})
