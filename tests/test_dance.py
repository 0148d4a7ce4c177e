"""SVI-Dance: the transformer that sees poses, the published pose encoder on it, and films that follow poses."""

import logging

import pytest
import torch
from diffusers import WanTransformer3DModel

from conftest import make_transformer, seeded
from diffusers_svi.conditions.converters import convert_pose, with_modules
from diffusers_svi.conditions.dance_transformer import PoseEmbedder, SVIDanceTransformer3DModel
from diffusers_svi.memory.model import build
from diffusers_svi.published import PUBLISHED
from test_talk import inputs


def make_dwpose(dim: int = 24, pose_dim: int = 4, device: str = "cpu") -> dict[str, torch.Tensor]:
    """What `svi-dance.safetensors` holds beside its LoRA, at any size."""
    shapes = {0: (pose_dim, 3, 3, 3, 3), 12: (dim, pose_dim, 1, 2, 2)}
    shapes |= {2 * index: (pose_dim, pose_dim, 3, 3, 3) for index in range(1, 6)}
    generator, weights = seeded(5), {}
    for index, shape in shapes.items():
        for part, of_part in {"weight": shape, "bias": shape[:1]}.items():
            value = torch.empty(of_part, device="meta")
            weights[f"dwpose_embedding.{index}.{part}"] = (
                value if device == "meta" else torch.randn(of_part, generator=generator) / 4
            )
    return weights


def make_dance(**config) -> SVIDanceTransformer3DModel:
    return with_modules(SVIDanceTransformer3DModel, make_transformer(**config), make_dwpose()).eval()


def pictures(seed: int = 1) -> torch.Tensor:
    return torch.rand(1, 3, 9, 32, 32, generator=seeded(seed))


@torch.no_grad()
def predict(model, pose=None) -> torch.Tensor:
    attention_kwargs = None if pose is None else {"pose": pose}
    return model(**inputs(), attention_kwargs=attention_kwargs, return_dict=False)[0]


# The transformer


def test_the_encoder_equals_the_published_layers():
    """Those that the names of the file count, one after the other, on 84 frames for 81: here 12 for 9."""
    published, pose = make_dwpose(), pictures()
    hidden = torch.cat([pose[:, :, :1], pose[:, :, :1], pose[:, :, :1], pose], dim=2)
    assert hidden.shape[2] == 12
    strides = [(1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 2, 2), 2, 2, (1, 2, 2)]
    for index, stride in enumerate(strides):
        weight, bias = (published[f"dwpose_embedding.{2 * index}.{part}"] for part in ("weight", "bias"))
        hidden = torch.nn.functional.conv3d(hidden, weight, bias, stride, padding=0 if index == 6 else 1)
        hidden = hidden if index == 6 else hidden * torch.sigmoid(hidden)
    with torch.no_grad():
        tokens = make_dance().pose_embedder(pose)
    assert tokens.shape == (1, 24, 3, 2, 2) and torch.allclose(tokens, hidden, atol=1e-5)


def test_its_tokens_are_added_to_the_patches():
    dance, base, pose = make_dance(), make_transformer(), pictures()
    base.patch_embedding.register_forward_hook(lambda *args: args[2] + dance.pose_embedder(pose))
    assert torch.equal(predict(dance, pose), predict(base))
    assert not torch.allclose(predict(dance, pose), predict(dance), atol=1e-2)


@pytest.mark.parametrize("image_dim", [None, 16])
def test_without_poses_it_is_the_parent_bit_for_bit(image_dim):
    config = {} if image_dim is None else {"image_dim": 16, "added_kv_proj_dim": 24}
    more = {} if image_dim is None else {"encoder_hidden_states_image": torch.randn(1, 5, 16, generator=seeded(3))}
    with torch.no_grad():
        expected = make_transformer(**config)(**inputs(), **more).sample
        assert torch.equal(make_dance(**config)(**inputs(), **more).sample, expected)


def test_with_an_encoder_that_gives_zeros_it_is_the_parent_bit_for_bit():
    dance = make_dance()
    for parameter in dance.pose_embedder.layers[-1].parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(predict(dance, pictures()), predict(make_transformer()))


def test_gradients_with_checkpointing_are_those_without():
    dance, gradients = make_dance().train(), []
    for checkpointing in (False, True):
        (dance.enable_gradient_checkpointing if checkpointing else dance.disable_gradient_checkpointing)()
        dance.zero_grad()
        dance(**inputs(), attention_kwargs={"pose": pictures()}).sample.square().sum().backward()
        gradients.append({name: value.grad.clone() for name, value in dance.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(value.abs().max() > 0 for name, value in gradients[0].items() if "pose" in name)


def test_compiled_as_a_whole_it_sees_what_each_call_has():
    dance = make_dance()
    compiled = torch.compile(dance, backend="eager", fullgraph=True)
    for pose in (pictures(1), pictures(2), None):
        assert torch.equal(predict(compiled, pose), predict(dance, pose))


def test_it_is_saved_and_loaded_with_its_sizes(tmp_path):
    dance = make_dance()
    dance.save_pretrained(tmp_path)
    loaded = SVIDanceTransformer3DModel.from_pretrained(tmp_path)
    assert loaded.config.pose_dim == 4
    assert torch.equal(predict(loaded, pictures()), predict(dance, pictures()))


def test_group_offloading_changes_nothing():
    dance = make_dance()
    expected = predict(dance, pictures())
    dance.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(predict(dance, pictures()), expected)


def test_poses_of_another_shape_are_refused():
    for shape in ((1, 3, 8, 32, 32), (1, 3, 9, 32, 16), (2, 3, 9, 32, 32), (3, 9, 32, 32)):
        with pytest.raises(ValueError, match=r"`pose` must be .* = \(1, 3, 9, 32, 32\), got"):
            predict(make_dance(), torch.zeros(shape))


def test_nothing_is_left_of_a_call_that_failed():
    dance = make_dance()
    expected = predict(dance)
    with pytest.raises(RuntimeError):
        dance(**{**inputs(), "hidden_states": torch.zeros(1, 3, 3, 4, 4)}, attention_kwargs={"pose": pictures()})
    assert torch.equal(predict(dance), expected)


# The published encoder


def test_every_published_tensor_finds_its_place_at_the_true_shapes():
    published = make_dwpose(5120, 16, device="meta")
    base = build(PUBLISHED["wan2.1-i2v-14b-480p"], "transformer")
    dance = with_modules(SVIDanceTransformer3DModel, base, published)
    of_base = base.state_dict()
    own = {name: value.shape for name, value in dance.state_dict().items() if name not in of_base}
    assert len(own) == len(published) == 14
    assert sorted(own.values()) == sorted(value.shape for value in published.values())
    with torch.device("meta"):
        default = SVIDanceTransformer3DModel(image_dim=1280, added_kv_proj_dim=5120)
        tokens = PoseEmbedder(16, 5120, (1, 2, 2))(torch.empty(1, 3, 81, 480, 832))
    assert tokens.shape == (1, 5120, 21, 30, 52)
    assert {name: value.shape for name, value in default.state_dict().items()} == {
        name: value.shape for name, value in dance.state_dict().items()
    }


def test_the_base_keeps_its_layers_and_shares_them():
    base = make_transformer()
    expected = predict(base)
    dance = with_modules(SVIDanceTransformer3DModel, base, make_dwpose())
    seen = predict(dance, pictures())
    assert type(base) is WanTransformer3DModel and torch.equal(predict(base), expected)
    assert dance.patch_embedding is base.patch_embedding
    again = with_modules(SVIDanceTransformer3DModel, dance, make_dwpose())
    assert torch.equal(predict(again, pictures()), seen)


def test_what_svi_dance_does_not_use_is_named(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers_svi"), "propagate", True)
    weights = convert_pose({**make_dwpose(), "randomref_embedding_pose.0.weight": torch.zeros(2)})
    assert weights.keys() == convert_pose(make_dwpose()).keys()
    assert "is left out, as SVI-Dance does not use it: 'randomref_embedding_pose.0.weight'" in caplog.text


@pytest.mark.parametrize("name", ["dwpose_embedding.1.weight", "dwpose_embedding.14.weight", "dwpose.0.weight"])
def test_a_weight_that_is_none_of_the_encoder_is_refused(name):
    with pytest.raises(ValueError, match=f"'{name}' is no weight of the pose encoder"):
        convert_pose({**make_dwpose(), name: torch.zeros(2)})
