"""Modules for audio and poses that a run begins with, trains and hands over."""

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from conftest import make_transformer, seeded
from diffusers_svi import PixelMotion
from diffusers_svi.conditions.converters import convert_audio, convert_pose, modules_of, published_modules
from diffusers_svi.conditions.dance_transformer import SVIDanceTransformer3DModel
from diffusers_svi.conditions.talk_transformer import SVITalkTransformer3DModel
from diffusers_svi.conditions.trained_modules import TrainedModules, load_modules, modules_to_save
from diffusers_svi.lora_file import read_lora, save_lora
from diffusers_svi.training.layers import without_modules
from diffusers_svi.training.lora_model import load_transformer
from test_dance import make_dance, make_dwpose
from test_dance import pictures as poses
from test_dance import predict as predict_dance
from test_talk import make_multitalk, make_talk, windows
from test_talk import make_pipe as make_talk_pipe
from test_talk import predict as predict_talk


BASE = {"_class_name": "WanTransformer3DModel"}
SMALL = {"audio_hidden_dim": 8, "audio_tokens": 4, "audio_token_dim": 6}


def test_published_names_there_and_back():
    """Of a model, and of what a file holds."""
    multitalk, dwpose = make_multitalk(), make_dwpose()
    for convert, given in ((convert_audio, multitalk), (convert_pose, dwpose)):
        back = published_modules(convert(given))
        assert set(back) == set(given)
        assert all(torch.equal(back[name], value) for name, value in given.items())
    saved = modules_to_save(make_talk())
    assert all(torch.equal(saved[name], value) for name, value in multitalk.items())
    assert not modules_of(make_transformer())


def test_fresh_modules_change_nothing_and_can_be_learnt():
    base = make_transformer()
    talk = TrainedModules("audio", BASE, "init", SMALL).put_on(base, 6)
    assert isinstance(talk, SVITalkTransformer3DModel) and talk.config.audio_dim == 6
    assert (talk.config.audio_tokens, talk.config.audio_token_dim, talk.config.audio_window) == (4, 6, 5)
    assert torch.equal(predict_talk(talk, windows()), predict_talk(base))
    dance = TrainedModules("pose", BASE, "init", {"pose_dim": 3}).put_on(base)
    assert isinstance(dance, SVIDanceTransformer3DModel) and dance.config.pose_dim == 3
    assert torch.equal(predict_dance(dance, poses()), predict_dance(base))
    for model, last in ((talk, "audio_attn.to_out"), (dance, "layers.6")):
        for name, weight in modules_of(model).items():
            assert weight.isfinite().all()
            assert bool(weight.any()) == (last not in name and not name.endswith("norm.bias")), name


def test_fresh_modules_are_those_of_the_seed():
    base = make_transformer()
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(modules_to_save(TrainedModules("pose", BASE, "init").put_on(base))["dwpose_embedding.0.weight"])
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_modules_come_from_a_file_a_lora_or_the_base(tmp_path):
    save_file({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 24), **make_dwpose()}, tmp_path / "a.safetensors")
    base = make_transformer()
    for modules in (
        TrainedModules("pose", BASE, str(tmp_path / "a.safetensors")),
        TrainedModules("pose", BASE, in_lora=make_dwpose()),
    ):
        torch.testing.assert_close(predict_dance(modules.put_on(base), poses()), predict_dance(make_dance(), poses()))
    own = TrainedModules("pose", {"_class_name": "SVIDanceTransformer3DModel"})
    dance = make_dance()
    assert own.base_kind is SVIDanceTransformer3DModel and own.put_on(dance) is dance
    talk = TrainedModules("audio", BASE, in_lora=make_multitalk())
    assert (talk.window, talk.row_values) == (5, 6)
    assert TrainedModules("audio", {**make_talk().config, "_class_name": "SVITalkTransformer3DModel"}).row_values == 6


@pytest.mark.parametrize(
    ("condition", "base", "given", "message"),
    [
        (
            "audio",
            BASE,
            {},
            "has no modules for it. Give `--condition_modules`: .* such as MeiGen-AI/MeiGen-MultiTalk",
        ),
        ("pose", BASE, {}, "has no modules for it"),
        ("pose", {"_class_name": "SVITalkTransformer3DModel"}, {}, "has modules for another, SVITalkTransformer3DMod"),
        ("pose", BASE, {"sizes": {"pose_dim": 3}, "in_lora": {"a": 0}}, "are for `--condition_modules init`"),
        ("pose", BASE, {"source": "init", "sizes": {"audio_tokens": 3}}, "'audio_tokens' is none of pose_dim"),
        ("pose", BASE, {"source": "init", "sizes": {"pose_dim": 0}}, "'pose_dim' must be at least 1, got 0"),
        ("audio", BASE, {"source": "init", "sizes": {"audio_window": 4}}, "must be an odd number, got 4"),
        ("pose", BASE, {"source": "none.safetensors"}, "No condition module could be read"),
    ],
)
def test_modules_that_cannot_be_had_are_told(monkeypatch, condition, base, given, message):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # nothing is waited for
    with pytest.raises(ValueError, match=message):
        TrainedModules(condition, base, **given)


def test_a_file_without_modules_is_told(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="holds no modules for audio or poses"):
        TrainedModules("pose", BASE, str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("layers", [["to_q", "to_v"], ["attn1.to_q"]])
def test_a_lora_leaves_the_layers_of_the_modules_alone(tmp_path, layers):
    """What is trained are the LoRA on the film's own layers, and, if wanted, all of the modules."""
    make_transformer().save_pretrained(tmp_path / "transformer")
    config, modules = LoraConfig(r=2, target_modules=without_modules(layers)), TrainedModules
    for trains in (False, True):
        model = load_transformer(
            tmp_path,
            "transformer",
            torch.bfloat16,
            config,
            with_modules=lambda base: modules("audio", BASE, "init", SMALL).put_on(base, 6),
            trained=(lambda model: modules_of(model).values()) if trains else None,
        )
        names = {name for name, weight in model.named_parameters() if weight.requires_grad}
        assert not any("audio" in name and "lora" in name for name in names)
        assert {name for name in names if "lora" not in name} == (set(modules_of(model)) if trains else set())
        assert len([name for name in names if "lora" in name]) == (4 * 2 * 2 if len(layers) == 2 else 2 * 2)
        assert all(weight.dtype == torch.float32 for weight in model.parameters() if weight.requires_grad)


def test_saved_modules_are_taken_over():
    for make in (make_talk, make_dance):
        model = make()
        saved = modules_to_save(model)
        with torch.no_grad():
            for weight in modules_of(model).values():
                weight.zero_()
        load_modules(model, saved)
        assert all(torch.equal(value, saved[name]) for name, value in modules_to_save(model).items())


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_a_file_has_lora_modules_and_what_films_follow(tmp_path, layout):
    lora = {
        f"blocks.0.attn1.to_q.lora_{side}.weight": torch.randn(shape, generator=seeded())
        for side, shape in (("A", (2, 24)), ("B", (24, 2)))
    }
    config, file = LoraConfig(r=2, lora_alpha=2), tmp_path / "lora.safetensors"
    save_lora(
        file, lora, config, PixelMotion(1, "reference"), layout=layout, condition="audio", modules=make_multitalk()
    )
    read = read_lora(file)
    assert read.condition == "audio" and read.conditioning == PixelMotion(1, "reference")
    assert len(read.state_dict) == 2 and len(read.modules) == len(make_multitalk())
    modules = convert_audio(read.modules)
    assert all(torch.equal(modules[name], value) for name, value in convert_audio(make_multitalk()).items())
    # Without modules the file tells it too.
    save_lora(file, lora, config, PixelMotion(1, "reference"), layout=layout, condition="pose")
    assert read_lora(file).condition == "pose" and len(load_file(file)) == 2
    with pytest.raises(ValueError, match="condition"):
        save_lora(file, lora, config, PixelMotion(1), condition="smell")


def test_modules_of_a_lora_replace_those_that_are_there_unless_others_are_chosen():
    pipe = make_talk_pipe()
    own = {f"transformer.{name}": value for name, value in _lora().items()}
    trained = {name: value + 1 for name, value in make_multitalk().items()}
    pipe.load_audio_modules(make_multitalk())
    pipe.load_lora_weights({**own, **trained})
    assert torch.equal(_norm(pipe), trained[_NORM])
    pipe.load_lora_weights({**own, **trained}, audio_modules=make_multitalk())
    assert torch.equal(_norm(pipe), make_multitalk()[_NORM])


_NORM = "audio_proj.norm.weight"


def _norm(pipe) -> torch.Tensor:
    return modules_to_save(pipe.transformer)[_NORM]


def _lora() -> dict[str, torch.Tensor]:
    return {
        "blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 24),
        "blocks.0.attn1.to_q.lora_B.weight": torch.ones(24, 2),
    }


def test_poses_of_a_sample_may_count_for_nothing():
    model = make_dance()
    both = torch.cat([poses(), poses(2)])
    generator = seeded()
    given = {
        "hidden_states": torch.randn(2, 36, 3, 4, 4, generator=generator),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": torch.randn(2, 512, 16, generator=generator),
        "return_dict": False,
    }
    with torch.no_grad():
        seen, weighted, unseen = (
            model(**given, attention_kwargs=kwargs)[0]
            for kwargs in (
                {"pose": both},
                {"pose": both, "pose_weight": torch.tensor([1.0, 0.0])},
                None,
            )
        )
    torch.testing.assert_close(weighted, torch.stack([seen[0], unseen[1]]))
    assert not torch.equal(seen[1], unseen[1])
