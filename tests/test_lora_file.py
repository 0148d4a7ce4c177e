"""Layouts and damage of LoRA files: what is read is the update that the file means, or an error says what is wrong."""

import json
import logging
import re

import pytest
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from conftest import CLIP, make_components, make_transformer, quiet, seeded
from diffusers_svi import SVIPipeline
from diffusers_svi.lora_file import read_lora


RANK, DIM = 4, 24
# Layers by their original names, in diffusers, and rows x columns.
LAYERS = {
    "blocks.1.self_attn.q": ("blocks.1.attn1.to_q", (24, 24)),
    "blocks.0.cross_attn.o": ("blocks.0.attn2.to_out.0", (24, 24)),
    "blocks.0.ffn.0": ("blocks.0.ffn.net.0.proj", (32, 24)),
    "blocks.1.ffn.2": ("blocks.1.ffn.net.2", (24, 32)),
    "time_projection.1": ("condition_embedder.time_proj", (144, 24)),
    "text_embedding.2": ("condition_embedder.text_embedder.linear_2", (24, 24)),
    "head.head": ("proj_out", (64, 24)),
}
Q = "diffusion_model.blocks.0.self_attn.q"


def random(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def pair(name=Q, rows=DIM, columns=DIM, rank=RANK):
    return {f"{name}.lora_A.weight": random(rank, columns), f"{name}.lora_B.weight": random(rows, rank, seed=1)}


def update(state_dict, layer="blocks.0.attn1.to_q"):
    lora = f"transformer.{layer}.lora_"
    return state_dict[f"{lora}B.weight"].float() @ state_dict[f"{lora}A.weight"].float()


@pytest.fixture
def told(caplog, monkeypatch):
    """The warnings of the library."""
    monkeypatch.setattr(logging.getLogger("diffusers_svi"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("diffusers_svi")]


# Layouts


PREFIXES = [
    "",
    "pipe.dit.",
    "dit.",
    "diffusion_model.",
    "model.diffusion_model.",
    "base_model.model.",
    "base_model.model.diffusion_model.",
    "transformer.",
    "module.",
    "lora_unet_",
    "lora_unet__",
    "lora_transformer_",
    "lora_transformer__",
    "lycoris_",
]


@pytest.mark.parametrize(
    "sides",
    [
        "lora_A.weight lora_B.weight",
        "lora_A.default.weight lora_B.default.weight",
        "lora_A lora_B",
        "lora_down.weight lora_up.weight",
        "lora.down.weight lora.up.weight",
    ],
)
@pytest.mark.parametrize("names", ["original", "diffusers"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_layout_is_the_same_update(prefix, names, sides, told):
    down, up = sides.split()
    lora = {}
    for original, (ours, (rows, columns)) in LAYERS.items():
        module = original if names == "original" else ours
        module = prefix + (module.replace(".", "_") if prefix.endswith("_") else module)
        lora[f"{module}.{down}"] = random(RANK, columns)
        lora[f"{module}.{up}"] = random(rows, RANK, seed=1)
        lora[f"{module}.alpha"] = torch.tensor(3.0)
    given = {key: value.clone() for key, value in lora.items()}
    state_dict = read_lora(lora).state_dict
    assert len(state_dict) == 2 * len(LAYERS) and not told()
    for ours, (rows, columns) in LAYERS.values():
        torch.testing.assert_close(
            update(state_dict, ours), 3 / RANK * random(rows, RANK, seed=1) @ random(RANK, columns)
        )
    assert all(torch.equal(lora[key], given[key]) for key in given)


@pytest.mark.parametrize(
    "key",
    [
        "transformer.transformer_blocks.0.attn1.to_q",
        "transformer_2.blocks.0.attn1.to_q",
        "vace_blocks.0.self_attn.q",
        "diffusion_model.vace_blocks.0.self_attn.q",
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "blocks.0.head.head",
        "self_attn.q",
        "double_blocks.0.img_attn.qkv",
    ],
)
def test_layers_that_are_not_known(key):
    with pytest.raises(ValueError, match=f"layout that is not known: '{re.escape(key)}"):
        read_lora(pair(key))


@pytest.mark.parametrize(
    "part", ["dora_scale", "lora_magnitude_vector.weight", "lora_mid.weight", "oft_blocks", "hada_t1", "lora_A.bias"]
)
def test_other_kinds_of_adapters_are_named(part):
    with pytest.raises(ValueError, match=f"not known: '{Q}.{part}'. Supported are LoRA, LoHa and LoKr"):
        read_lora({**pair(), f"{Q}.{part}": random(DIM)})


@pytest.mark.parametrize("alpha", [None, 1.0])
@pytest.mark.parametrize("prefix", ["lycoris_blocks_0_self_attn_q", Q, "transformer.blocks.0.attn1.to_q"])
def test_loha_is_the_same_update(prefix, alpha):
    up, down, up_2, down_2 = random(24, 2), random(2, 24, seed=1), random(24, 3, seed=2), random(3, 24, seed=3)
    lora = {
        f"{prefix}.hada_w1_a": up,
        f"{prefix}.hada_w1_b": down,
        f"{prefix}.hada_w2_a": up_2,
        f"{prefix}.hada_w2_b": down_2,
        **({} if alpha is None else {f"{prefix}.alpha": torch.tensor(alpha)}),
    }
    expected = (up @ down) * (up_2 @ down_2) * (1 if alpha is None else alpha / 2)
    torch.testing.assert_close(update(read_lora(lora).state_dict), expected)
    with pytest.raises(ValueError, match="has no `hada_w2_b`"):
        read_lora({key: value for key, value in lora.items() if "w2_b" not in key})
    with pytest.raises(ValueError, match="do not go together"):
        read_lora({**lora, f"{prefix}.hada_w2_b": random(3, 20)})


@pytest.mark.parametrize("first", ["whole", "product"])
@pytest.mark.parametrize("alpha", [None, 1.0])
def test_lokr_is_the_same_update(first, alpha):
    w1 = {"lokr_w1": random(4, 3)} if first == "whole" else {"lokr_w1_a": random(4, 2), "lokr_w1_b": random(2, 3)}
    w2 = {"lokr_w2_a": random(8, 2, seed=1), "lokr_w2_b": random(2, 8, seed=2)}
    lora = {f"{Q}.{part}": value for part, value in {**w1, **w2}.items()}
    if alpha is not None:
        lora[f"{Q}.alpha"] = torch.tensor(alpha)
    left = w1["lokr_w1"] if first == "whole" else w1["lokr_w1_a"] @ w1["lokr_w1_b"]
    expected = torch.kron(left, w2["lokr_w2_a"] @ w2["lokr_w2_b"]) * (1 if alpha is None else alpha / 2)
    torch.testing.assert_close(update(read_lora(lora).state_dict), expected)


def test_lokr_of_full_rank():
    with pytest.raises(
        ValueError, match=r"`blocks.0.attn1.to_q` in the LoRA .* is a LoKr of full rank.*convert_to_lora"
    ):
        read_lora({f"{Q}.lokr_w1": random(4, 4), f"{Q}.lokr_w2": random(6, 6)})


def test_a_whole_matrix_is_the_same_update():
    """As the head of few-step LoRAs is trained, which has more columns than rows; and the other way round."""
    for name, (ours, (rows, columns)) in LAYERS.items():
        whole, bias = random(rows, columns), random(rows, seed=1)
        state_dict = read_lora(
            {f"diffusion_model.{name}.diff": whole, f"diffusion_model.{name}.diff_b": bias}
        ).state_dict
        torch.testing.assert_close(update(state_dict, ours), whole)
        assert state_dict[f"transformer.{ours}.lora_A.weight"].shape[0] == min(rows, columns)
        assert torch.equal(state_dict[f"transformer.{ours}.lora_B.bias"], bias)
    with pytest.raises(ValueError, match="changed in two ways, LoRA and diff"):
        read_lora({**pair(), f"{Q}.diff": random(DIM, DIM)})


def test_layers_of_different_ranks_and_alphas_load_at_their_scale(i2v):
    lora = {}
    for number, (name, (_, (rows, columns))) in enumerate(LAYERS.items(), 1):
        lora |= pair(name, rows, columns, rank=number)
        lora[f"{name}.alpha"] = torch.tensor(2.0)
    i2v.load_lora_weights(lora, adapter_name="x")
    for number, (ours, (rows, columns)) in enumerate(LAYERS.values(), 1):
        layer = i2v.transformer.get_submodule(ours)
        expected = 2 / number * random(rows, number, seed=1) @ random(number, columns)
        torch.testing.assert_close(layer.get_delta_weight("x"), expected)


# Alpha and types


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_an_alpha_that_is_no_scale(alpha):
    with pytest.raises(ValueError, match=r"alpha of 0|alpha of -1|alpha' in the LoRA .* is not finite"):
        read_lora({**pair(), f"{Q}.alpha": torch.tensor(alpha)})


def test_an_alpha_without_weights_and_of_two_numbers():
    with pytest.raises(ValueError, match=r"`blocks\.1\.attn1\.to_q` in the LoRA 'state dict' has no `lora_A`"):
        read_lora({**pair(), "blocks.1.self_attn.q.alpha": torch.tensor(1.0)})
    with pytest.raises(ValueError, match=r"an alpha of \[1.0, 2.0\]: it must be one number"):
        read_lora({**pair(), f"{Q}.alpha": torch.tensor([1.0, 2.0])})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_half_precision_and_less(dtype, alpha):
    lora = {key: (value / 100).to(dtype) for key, value in pair().items()}
    expected = lora[f"{Q}.lora_B.weight"].float() @ lora[f"{Q}.lora_A.weight"].float()
    if alpha is not None:
        lora[f"{Q}.alpha"] = torch.tensor(alpha).to(dtype)
        expected *= alpha / RANK
    state_dict = read_lora(lora).state_dict
    error = (update(state_dict) - expected).norm() / expected.norm()
    assert error < {torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(dtype, 1e-6)
    assert {value.dtype for value in state_dict.values()} == {dtype if dtype.itemsize == 2 else torch.float32}


def test_a_small_alpha_keeps_its_digits_in_half_precision():
    lora = {key: (value / 1000).half() for key, value in pair().items()}
    expected = lora[f"{Q}.lora_B.weight"].float() @ lora[f"{Q}.lora_A.weight"].float() / 256
    found = update(read_lora({**lora, f"{Q}.alpha": torch.tensor(RANK / 256)}).state_dict)
    assert (found - expected).norm() / expected.norm() < 2e-3


def test_weights_that_are_no_numbers_to_compute_with():
    for value in (float("nan"), float("-inf")):
        lora = pair()
        lora[f"{Q}.lora_B.weight"][3, 2] = value
        with pytest.raises(ValueError, match=rf"'{Q}\.lora_B\.weight' in the LoRA 'state dict' is not finite"):
            read_lora(lora)
    with pytest.raises(
        ValueError, match=r"lora_A.weight' in the LoRA .* is torch.int8: weights must be floating-point"
    ):
        read_lora({**pair(), f"{Q}.lora_A.weight": torch.ones(RANK, DIM, dtype=torch.int8)})
    with pytest.raises(ValueError, match=r"alpha' in the LoRA .* must be a tensor, got 4"):
        read_lora({**pair(), f"{Q}.alpha": 4})


# What is missing


@pytest.mark.parametrize("sides", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
@pytest.mark.parametrize("missing", [0, 1])
def test_half_of_a_pair(i2v, sides, missing):
    lora = {key.replace("lora_A", sides[0]).replace("lora_B", sides[1]): value for key, value in pair().items()}
    lora |= {key.replace("blocks.0", "blocks.1"): value for key, value in lora.items()}
    del lora[f"{Q}.{sides[missing]}.weight"]
    with pytest.raises(
        ValueError, match=rf"`blocks\.0\.attn1\.to_q` .* has no `lora_{'AB'[missing]}`.*Download it again"
    ):
        i2v.load_lora_weights(lora)
    assert i2v.get_list_adapters() == {}


@pytest.mark.parametrize("shapes", [((4, 24), (24, 3)), ((0, 24), (24, 0)), ((24,), (24, 4)), ((4, 24), ())])
def test_matrices_that_do_not_go_together(shapes):
    lora = {f"{Q}.lora_{side}.weight": torch.zeros(shape) for side, shape in zip("AB", shapes, strict=True)}
    with pytest.raises(ValueError, match=rf"do not go together \(A: {re.escape(str(shapes[0]))}, B: "):
        read_lora(lora)


def test_one_thing_twice():
    with pytest.raises(
        ValueError, match=rf"two values for one thing: '{Q}.lora_A.weight' and 'blocks.0.attn1.to_q.lora_d"
    ):
        read_lora({**pair(), "blocks.0.attn1.to_q.lora_down.weight": random(RANK, DIM)})


@pytest.mark.parametrize("bias", ["diff_b", "lora_B.bias", "lora_up.bias", "lora_B.default.bias"])
def test_a_bias_of_some_layers_only(bias, image):
    """The others have none, which is zeros; on Wan 2.1 too, whose image projections are filled in."""
    pipe = quiet(SVIPipeline(**make_components("wan2.1")))
    reference = quiet(SVIPipeline(**make_components("wan2.1")))
    lora, weights = {}, reference.transformer.state_dict()
    for name, ours in (("self_attn.q", "attn1.to_q"), ("cross_attn.k", "attn2.to_k")):
        lora |= pair(f"blocks.0.{name}")
        weights[f"blocks.0.{ours}.weight"] += random(DIM, RANK, seed=1) @ random(RANK, DIM)
    lora[f"blocks.0.self_attn.q.{bias}"] = random(DIM, seed=5)
    weights["blocks.0.attn1.to_q.bias"] += random(DIM, seed=5)
    reference.transformer.load_state_dict(weights)
    pipe.load_lora_weights(lora)
    film = {"prompts": "a cat", "output_type": "latent", **CLIP}
    found, expected = (p(image=image, generator=seeded(), **film).frames[0] for p in (pipe, reference))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def test_alpha_scales_a_bias_of_the_second_matrix_but_not_of_the_layer():
    alpha = {f"{Q}.alpha": torch.tensor(1.0)}
    for part, scale in (("lora_B.bias", 1 / RANK), ("diff_b", 1)):
        state_dict = read_lora({**pair(), **alpha, f"{Q}.{part}": random(DIM)}).state_dict
        torch.testing.assert_close(state_dict["transformer.blocks.0.attn1.to_q.lora_B.bias"], scale * random(DIM))
    with pytest.raises(ValueError, match="a bias of another size than its matrices, which have 24 rows"):
        read_lora({**pair(), f"{Q}.diff_b": random(DIM + 1)})


# What is beyond


BEYOND = {
    "blocks.0.self_attn.norm_q.diff": (24,),
    "blocks.1.norm3.diff_b": (24,),
    "blocks.0.diff_m": (1, 6, 24),
    "head.diff_m": (1, 2, 24),
    "patch_embedding.diff": (24, 36, 1, 2, 2),
    "patch_embedding.diff_b": (24,),
    "time_projection.1.diff_b": (144,),
    "img_emb.proj.0.diff": (16,),
    "patch_embedding.weight": (24, 36, 1, 2, 2),
    "blocks_0_norm3.w_norm": (24,),
}


@pytest.mark.parametrize("key", BEYOND)
@pytest.mark.parametrize("prefix", ["diffusion_model.", "", "transformer."])
def test_what_is_left_out_is_named(prefix, key, told):
    state_dict = read_lora({**pair(), f"{prefix}{key}": random(*BEYOND[key])}).state_dict
    assert state_dict.keys() == read_lora(pair()).state_dict.keys()
    (message,) = told()
    assert f"'{prefix}{key}'" in message and "Of the LoRA 'state dict', this is left out" in message


def test_changes_of_many_blocks_are_counted_and_those_of_zero_are_none(told):
    norms = {f"blocks.{block}.self_attn.norm_{of}.diff": random(DIM) for block in range(40) for of in "qk"}
    read_lora({**pair(), **norms, "blocks.0.diff_m": torch.zeros(1, 6, DIM)})
    (message,) = told()
    assert message.endswith(
        ": 'blocks.0.self_attn.norm_q.diff' and 39 more of its kind, "
        "'blocks.0.self_attn.norm_k.diff' and 39 more of its kind."
    )


@pytest.mark.parametrize("config", [{}, {"image_dim": 16}])
def test_what_a_model_has_no_layers_for_is_named(config, told):
    """Few-step LoRAs of Wan 2.1 in A14B: the image projections are left out, and the rest is loaded."""
    pipe = quiet(SVIPipeline(**{**make_components("a14b"), "transformer": make_transformer(**config)}))
    key, k_img, v_img = (f"blocks.0.cross_attn.{layer}" for layer in ("k", "k_img", "v_img"))
    pipe.load_lora_weights({**pair(key), **pair(k_img), **pair(v_img)}, adapter_name="fast")
    (message,) = told()
    assert "as `transformer` has no such layers: 'transformer.blocks.0.attn2.add_k_proj.lora_A.weight'" in message
    assert all(name in message for name in ("add_k_proj.lora_B", "add_v_proj.lora_A", "add_v_proj.lora_B"))
    weights = get_peft_model_state_dict(pipe.transformer, adapter_name="fast")
    assert len(weights) == 2
    assert torch.equal(weights["blocks.0.attn2.to_k.lora_A.weight"], random(RANK, DIM))
    with pytest.raises(
        ValueError, match=r"weights for `blocks\.0\.attn2\.add_k_proj`, which this transformer does not"
    ):
        pipe.load_lora_weights(pair(k_img))


def test_a_model_of_images_without_image_projections(told):
    pipe = quiet(SVIPipeline(**{**make_components("i2v"), "transformer": make_transformer(image_dim=16)}))
    lora = {**pair("blocks.0.cross_attn.k"), **pair("img_emb.proj.1", 16, 16)}
    pipe.load_lora_weights(lora, adapter_name="svi")
    assert not told() and len(get_peft_model_state_dict(pipe.transformer, adapter_name="svi")) == 4


# Metadata


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{", "[]", "null", '"shot"', "7", '{"scheme": []}', '{"scheme": "PixelMotion", "a": 1}']
)
def test_a_scheme_that_is_none(tmp_path, text):
    save_file(pair(), tmp_path / "lora.safetensors", metadata={"svi_conditioning": text})
    with pytest.raises(ValueError, match="lora.safetensors.* has a `svi_conditioning` that describes no scheme"):
        read_lora(tmp_path / "lora.safetensors")


def test_an_expert_that_is_none(tmp_path):
    save_file(pair(), tmp_path / "lora.safetensors", metadata={"svi_expert": "middle"})
    with pytest.raises(ValueError, match=r"`svi_expert` must be one of \('high', 'low'\), got 'middle'"):
        read_lora(tmp_path / "lora.safetensors")


CONFIG = {"r": RANK, "lora_alpha": 2, "target_modules": ["to_q"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "No LoRA could be read"),
        ("{", "No LoRA could be read"),
        ("[]", "is no LoRA configuration"),
        ('"text"', "is no LoRA configuration"),
        (json.dumps({"transformer.unknown": 1}), "is no LoRA configuration"),
        (json.dumps({"transformer.r": 0}), "is not that of the weights"),
        (json.dumps({"transformer.r": RANK, "transformer.lora_alpha": "two"}), "is no LoRA configuration"),
        (json.dumps({"transformer.r": RANK, "transformer.rank_pattern": []}), "is no LoRA configuration"),
        (json.dumps({"transformer.r": RANK + 1}), "is not that of the weights"),
        (json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 0}), "is not that of the weights"),
        (json.dumps({"transformer.r": RANK, "transformer.use_dora": True}), "is not that of the weights"),
        (json.dumps(CONFIG), "is not that of the weights"),  # without a prefix: diffusers reads none of it
    ],
)
def test_a_configuration_that_is_none(tmp_path, text, message):
    save_file(pair(), tmp_path / "lora.safetensors", metadata={LORA_ADAPTER_METADATA_KEY: text})
    with pytest.raises(ValueError, match=message):
        read_lora(tmp_path / "lora.safetensors")


def test_two_alphas(tmp_path):
    config = {LORA_ADAPTER_METADATA_KEY: json.dumps({f"transformer.{key}": value for key, value in CONFIG.items()})}
    save_file({**pair(), f"{Q}.alpha": torch.tensor(1.0)}, tmp_path / "lora.safetensors", metadata=config)
    with pytest.raises(ValueError, match="gives its alpha twice"):
        read_lora(tmp_path / "lora.safetensors")


# Where from


def test_a_file_in_a_file(tmp_path):
    """The one would be taken for both experts."""
    pipe = quiet(SVIPipeline(**make_components("a14b")))
    save_file(pair(), tmp_path / "high.safetensors")
    for source, what in ((pair(), "a state dict"), (tmp_path / "high.safetensors", "the file '.*high.safetensors'")):
        with pytest.raises(
            ValueError, match=rf"`weight_name`='low.safetensors' is a file in a folder.* is {what}: leave"
        ):
            pipe.load_lora_weights(source, weight_name_2="low.safetensors")
    assert pipe.get_list_adapters() == {}


# The caller's tensors


def test_the_callers_tensors_stay_as_they_are():
    """One state dict in both experts: each has the update, and what one does to it is not seen elsewhere."""
    pipe = quiet(SVIPipeline(**make_components("a14b")))
    lora = {f"{Q}.{name}": value for name, value in (("alpha", torch.tensor(2.0)),)}
    lora |= {key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): value for key, value in pair().items()}
    given = {key: value.clone() for key, value in lora.items()}
    for second in (False, True):
        pipe.load_lora_weights(lora, adapter_name="x", load_into_transformer_2=second)
    expected = 2 / RANK * random(DIM, RANK, seed=1) @ random(RANK, DIM)
    layers = [expert.blocks[0].attn1.to_q for expert in (pipe.transformer, pipe.transformer_2)]
    for layer in layers:
        torch.testing.assert_close(layer.get_delta_weight("x"), expected)
    with torch.no_grad():
        layers[0].lora_A["x"].weight.zero_()
        layers[0].lora_B["x"].weight.zero_()
    torch.testing.assert_close(layers[1].get_delta_weight("x"), expected)
    assert lora.keys() == given.keys() and all(torch.equal(lora[key], given[key]) for key in given)
