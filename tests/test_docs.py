"""The documentation: its Python blocks run, those of one page one after the other; its links lead somewhere."""

import os
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from conftest import make_components
from diffusers_svi import PixelMotion, SVIPipeline, save_video
from diffusers_svi.conditions.talk_pipeline import MULTITALK, MULTITALK_FILE
from diffusers_svi.lora_file import lora_metadata
from test_dance import make_dwpose
from test_lora import make_lora
from test_quantized import make_expert, write_gguf
from test_sound import make_sound
from test_talk import make_encoder, make_multitalk


ROOT = Path(__file__).parents[1]
FOLDERS = (ROOT, ROOT / "docs", ROOT / "examples" / "svi_tiny", ROOT / "examples" / "svi_tiny" / "loras")
PAGES = sorted(str(page.relative_to(ROOT)) for folder in FOLDERS for page in folder.glob("*.md"))


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)


def links(page: str) -> list[str]:
    """Without those to the web."""
    return [link for link in re.findall(r"\]\(([^)]+)\)", text_of(page)) if not link.startswith("http")]


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def put_a14b(folder: Path) -> None:
    """What docs/ecosystem.md loads."""
    name = "Wan2.2-I2V-A14B"
    experts = {expert: make_expert(seed) for seed, expert in enumerate(("transformer", "transformer_2"))}
    SVIPipeline(**make_components("a14b") | experts).save_pretrained(folder / f"Wan-AI/{name}-Diffusers")
    for noise, model in zip(("High", "Low"), experts.values(), strict=True):
        gguf = folder / f"QuantStack/{name}-GGUF/{noise}Noise/{name}-{noise}Noise-Q8_0.gguf"
        pro = f"vita-video-gen/svi-model/version-2.0/SVI_{name}_{noise.lower()}_noise_lora_v2.0_pro.safetensors"
        seko = f"lightx2v/Wan2.2-Lightning/{name}-4steps-lora-rank64-Seko-V1/{noise.lower()}_noise_model.safetensors"
        for path in (gguf, folder / pro, folder / seko):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(model, gguf)
        save_file(make_lora(model), folder / pro)
        save_file(make_lora(model, seed=1, layout="kohya", alpha=2), folder / seko)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder in which the names of the documentation mean something: what the Hub has is here, but tiny."""
    for name in ("examples", "docs"):
        os.symlink(ROOT / name, tmp_path / name)
    wan = SVIPipeline(**make_components("wan2.1"))
    wan.save_pretrained(tmp_path / "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers")
    lora = tmp_path / "vita-video-gen/svi-model/version-1.0/svi-film-opt-10212025.safetensors"
    lora.parent.mkdir(parents=True)
    save_file(make_lora(wan.transformer), lora)
    # Talk and Dance: audio and poses of a film of two clips.
    save_file(make_lora(wan.transformer), lora.with_name("svi-talk.safetensors"))
    save_file({**make_lora(wan.transformer), **make_dwpose()}, lora.with_name("svi-dance.safetensors"))
    (tmp_path / MULTITALK).mkdir(parents=True)
    save_file(make_multitalk(), tmp_path / MULTITALK / MULTITALK_FILE)
    make_encoder().save_pretrained(tmp_path / "TencentGameMate/chinese-wav2vec2-base")
    make_sound(tmp_path / "speech.wav", 0.68)
    save_video(tmp_path / "dance.mp4", np.zeros((17, 32, 32, 3), np.uint8))
    # What the command of docs/training.md leaves behind.
    tiny = WanTransformer3DModel.from_pretrained(ROOT / "examples" / "svi_tiny" / "model" / "transformer")
    (tmp_path / "outputs" / "svi-shot").mkdir(parents=True)
    trained = tmp_path / "outputs" / "svi-shot" / "pytorch_lora_weights.safetensors"
    save_file(make_lora(tiny), trained, metadata=lora_metadata(PixelMotion(1, "reference")))
    PIL.Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(tmp_path / "kitten.png")
    # Where diffusers puts code that comes with a model.
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def at_hand(block: str) -> str:
    """The block for this machine: without a GPU, and small where it asks for the size of real models."""
    block = block.replace('.to("cuda")', "")
    block = block.replace('torch.device("cuda")', 'torch.device("cpu")').replace("use_stream=True", "use_stream=False")
    block = block.replace("enable_model_cpu_offload()", 'enable_model_cpu_offload(device="cpu")')
    block = block.replace("fullgraph=True", 'fullgraph=True, backend="eager"')
    block = block.replace("num_inference_steps=50", "num_inference_steps=6")
    block = block.replace('"num_inference_steps": 8', '"num_inference_steps": 2')
    block = block.replace("https://huggingface.co/", "").replace("/blob/main", "")
    block = block.replace(
        '{"height": 480, "width": 832, "num_frames": 81}', '{"height": 32, "width": 32, "num_frames": 9}'
    )
    small = "height=32, width=32, num_frames=9, num_inference_steps=2, "
    return block.replace('image=load_image("kitten.png")', f'{small}image=load_image("kitten.png")')


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_the_blocks_of_a_page_run(page, folder):
    if page == "docs/ecosystem.md":
        put_a14b(folder)
    names = {}
    for block in blocks(page):
        exec(compile(at_hand(block), page, "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_what_works_with_what_is_held_by_tests():
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", text_of("docs/ecosystem.md"))
    assert len(named) > 15 and [name for name in named if f"def {name}(" not in tests] == []


def test_every_picture_is_on_a_page():
    """Shown, or what a block begins with."""
    shown = {((ROOT / page).parent / link).resolve() for page in PAGES for link in links(page)}
    named = {ROOT / name for page in PAGES for name in re.findall(r'"(docs/[^"]+\.png)"', text_of(page))}
    pictures = {path for folder in ("images", "results") for path in (ROOT / "docs" / folder).rglob("*.png")}
    assert pictures and pictures <= shown | named


def test_the_measurement_is_told_on_one_page():
    text = text_of("docs/does_it_work.md")
    assert len(text.split()) <= 800 and text.count("![") == 2
