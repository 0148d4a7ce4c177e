"""Tiny real components of the four kinds of model that can be chained."""

import importlib.util
import os
import signal
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from diffusers_svi import SVIPipeline
from diffusers_svi.cli import main


# Workers share the cores, and so do the processes they start: with one thread each they do not wait for one another.
# What is computed here is small, and a process that has one thread can be forked.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# In a forked process torch gives up its pool of threads and makes another when it is first asked for: a thread that
# asks for it just then finds none ("Invalid thread pool!"). Here it is asked for while there is one thread.
os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))
# Where the tests are run in the background Ctrl-C is ignored, and so it would be by the processes that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

WORDS = ["a", "the", "cat", "dog", "sits", "jumps", "sleeps", "on", "mat", "red", "blue", "bad", "blurry"]
TEXT_DIM = 16
KINDS = ("wan2.1", "a14b", "ti2v-5b", "i2v")

# A clip small enough for a laptop: 3 latent frames.
CLIP = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2}


def load_script(path: Path) -> ModuleType:
    """A script as a module; it finds what lies beside it, as when it is run."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module  # where its dataclasses look for themselves
    specification.loader.exec_module(module)
    return module


def make_vae(seed: int = 0, z_dim: int = 16, **config) -> AutoencoderKLWan:
    torch.manual_seed(seed)
    patches = {"patch_size": 2, "in_channels": 12, "out_channels": 12}
    wan22 = {"is_residual": True, "scale_factor_spatial": 16, **patches} if z_dim == 48 else {}
    layers = {"dim_mult": [1, 1, 1, 1], "temperal_downsample": [False, True, True]}
    return AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=z_dim,
        num_res_blocks=1,
        latents_mean=np.linspace(-0.2, 0.2, z_dim).tolist(),
        latents_std=np.linspace(0.5, 1.5, z_dim).tolist(),
        **{**layers, **wan22, **config},
    ).eval()


def make_transformer(
    seed: int = 0, in_channels: int = 36, out_channels: int = 16, num_layers: int = 2, **config
) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=out_channels,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=32,
        num_layers=num_layers,
        rope_max_seq_len=64,
        **config,
    ).eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}, "<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_text_encoder() -> UMT5EncoderModel:
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=32, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return UMT5EncoderModel(config).eval()


def make_components(kind: str) -> dict:
    """The components of one of `KINDS`, for `SVIPipeline` or its parent."""
    components = {
        "tokenizer": make_tokenizer(),
        "text_encoder": make_text_encoder(),
        "vae": make_vae(z_dim=48 if kind == "ti2v-5b" else 16),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
        "image_encoder": None,
        "image_processor": None,
        "transformer": make_transformer(),
        "transformer_2": None,
        "boundary_ratio": None,
        "expand_timesteps": False,
    }
    if kind == "wan2.1":
        torch.manual_seed(0)
        config = CLIPVisionConfig(
            hidden_size=16,
            projection_dim=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            intermediate_size=16,
            patch_size=16,
        )
        components["image_encoder"] = CLIPVisionModel(config).eval()
        components["image_processor"] = CLIPImageProcessor(crop_size=32, size=32)
        components["transformer"] = make_transformer(image_dim=16, added_kv_proj_dim=24)
    elif kind == "a14b":
        components["transformer_2"] = make_transformer(seed=1)
        components["boundary_ratio"] = 0.9
    elif kind == "ti2v-5b":
        components["transformer"] = make_transformer(in_channels=48, out_channels=48)
        components["expand_timesteps"] = True
    return components


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no worker is left alone with them at the end."""
    longest = (
        *("test_train_erft", "test_app", "test_push", "test_docs", "test_svi_tiny", "test_crash", "test_drift"),
        *("test_distributed_bank", "test_on_a_card", "test_benchmarks", "test_train_conditions"),
    )
    items.sort(key=lambda item: item.path.stem not in longest)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def pipe(kind) -> SVIPipeline:
    return quiet(SVIPipeline(**make_components(kind)))


@pytest.fixture
def i2v() -> SVIPipeline:
    """A pipeline of the plainest kind, for what does not depend on the kind."""
    return quiet(SVIPipeline(**make_components("i2v")))


@pytest.fixture
def image() -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(256, size=(4, 4, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels).resize((32, 32), PIL.Image.Resampling.BICUBIC)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


@pytest.fixture
def run_command(tmp_path, monkeypatch, capfd):
    """`diffusers-svi` in this process, which need not import everything once more: exit status, output, errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["diffusers-svi", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as error:
            status = error.code
        return status, *capfd.readouterr()

    return run
