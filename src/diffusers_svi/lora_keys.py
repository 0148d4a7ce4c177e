"""Weights of LoRAs under diffusers' names, out of every layout they come in, as two matrices for each layer."""

import math
import re
from collections.abc import Iterable

import torch


_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
# What the layers are called in diffusers, by their names in the original code: those of a block, and those beside.
_BLOCK_LAYERS = {
    **{f"self_attn.{original}": f"attn1.{name}" for original, name in _ATTENTION.items()},
    **{f"cross_attn.{original}": f"attn2.{name}" for original, name in _ATTENTION.items()},
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_OTHER_LAYERS = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "head.head": "proj_out",
    "patch_embedding": "patch_embedding",
}
# Some layouts write underscores for all dots; without dots, the names are still told apart.
_LAYERS = {
    spelled.replace(".", "_"): name
    for original, name in {**_BLOCK_LAYERS, **_OTHER_LAYERS}.items()
    for spelled in (original, name)
}
_PREFIX = re.compile(
    r"(?:(?:pipe|dit|base_model|model|diffusion_model|transformer|module|_orig_mod)\.)*"
    r"(?:lora_+(?:(?:unet|transformer|dit)_+)?|lycoris_+)?"
)
_MATRIX = re.compile(r"(.+?)\.lora(?:_|\.|_linear_layer\.)(A|B|down|up)(?:(?:\..+)?\.(weight|bias))?")

# The parts that make up the update of a layer, by kind; a "diff" is the update itself.
_KINDS = {
    "LoRA": ("A", "B", "B.bias"),
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "LoKr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    "diff": ("diff",),
}
_OF_ANY_KIND = ("alpha", "diff_b")
# What files hold beyond, for layers without matrices.
_BEYOND = ("diff", "diff_b", "diff_m", "weight", "bias", "w_norm", "b_norm")


class _Parts(dict[str, torch.Tensor]):
    """What a file holds for one layer; asked for what it lacks, it says so."""

    def __init__(self, name: str, layer: str, parts: dict[str, torch.Tensor]) -> None:
        super().__init__(parts)
        self.whose = f"`{layer}` in the LoRA {name!r}"

    def __missing__(self, part: str) -> torch.Tensor:
        part = {"A": "lora_A` or `lora_down", "B": "lora_B` or `lora_up"}.get(part, part)
        raise ValueError(
            f"{self.whose} has no `{part}`: the file is not complete. Download it again, or ask whoever made it."
        )


def to_diffusers(name: str, state_dict: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The matrices of a LoRA under diffusers' names, such as `transformer.blocks.0.attn1.to_q.lora_A.weight`.

    Alphas are multiplied in. What changes a linear layer in another way, as LoHa, LoKr or a whole matrix, becomes the
    two matrices of the same update. Where some layers have a bias, those without one get zeros.

    Args:
        name (`str`): What to call the file in messages.
        state_dict (`dict[str, torch.Tensor]`): What it holds, in any layout. It is not changed.

    Returns:
        The weights, and the keys of what is not in them: changes of norms, of modulations and of convolutions, and
        biases of layers without matrices. Changes that are zero everywhere are in neither.

    Raises:
        ValueError: if it holds no LoRA, a layer or kind of weights that is not known, two values for one thing, or
            half of a pair; if shapes do not go together; for an alpha that is not positive, or weights that are not
            finite.
    """
    layers: dict[str, dict[str, str]] = {}
    left_out = []
    for key, value in state_dict.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{key!r} in the LoRA {name!r} must be a tensor, got {value!r}.")
        module, part = _split(key)
        layer = _layer(module)
        if part.startswith("diff") and not value.is_meta and not value.float().any():
            continue
        if layer is not None and _is_used(part, value):
            known = layers.setdefault(layer, {}).setdefault(part, key)
            if known != key:
                raise ValueError(f"The LoRA {name!r} holds two values for one thing: {known!r} and {key!r}.")
        elif part in _BEYOND and ".lora_" not in module:
            left_out.append(key)
        else:
            raise ValueError(
                f"The LoRA {name!r} has keys of a layout that is not known: {key!r}. Supported are LoRA, LoHa and "
                "LoKr of the linear layers of Wan transformers, under the original or diffusers' names."
            )

    weights = {}
    for layer, keys in layers.items():
        if keys.keys() == {"diff_b"}:
            left_out.append(keys["diff_b"])
            continue
        parts = {part: _sound(name, key, state_dict[key]) for part, key in keys.items()}
        for suffix, value in _update(_Parts(name, layer, parts)).items():
            weights[f"transformer.{layer}.lora_{suffix}"] = value
    if not weights:
        some = f", such as {next(iter(state_dict))!r}" if state_dict else ""
        raise ValueError(
            f"{name!r} holds no LoRA: none of its {len(state_dict)} keys has `lora_A` or `lora_down`{some}."
        )
    if any(key.endswith(".bias") for key in weights):
        for key, value in list(weights.items()):
            if key.endswith(".lora_B.weight"):
                weights.setdefault(key.removesuffix("weight") + "bias", value.new_zeros(value.shape[0]))
    return weights, left_out


def original_name(key: str) -> str:
    """What a key such as `blocks.0.attn1.to_q.lora_A.weight` is called in the original code."""
    for original, name in {**_BLOCK_LAYERS, **_OTHER_LAYERS}.items():
        if f".{name}.lora_" in f".{key}":
            return key.replace(f"{name}.lora_", f"{original}.lora_")
    return key


def some_of(keys: Iterable[str]) -> str:
    """The first of the keys of each kind, and how many more blocks have it."""
    kinds: dict[str, list[str]] = {}
    for key in keys:
        kinds.setdefault(re.sub(r"\d+", "", key, count=1), []).append(key)
    return ", ".join(
        f"{first!r}" + (f" and {len(more)} more of its kind" if more else "") for first, *more in kinds.values()
    )


def _split(key: str) -> tuple[str, str]:
    matrix = _MATRIX.fullmatch(key)
    if matrix is None:
        module, _, part = key.rpartition(".")
        return module, part
    module, side, what = matrix.groups()
    side = {"down": "A", "up": "B"}.get(side, side)
    return module, f"{side}.bias" if what == "bias" else side


def _layer(module: str) -> str | None:
    """diffusers' name of the layer that is called `module` in whatever layout; `None` if there is no such layer."""
    flat = _PREFIX.sub("", module, count=1).replace(".", "_")
    block = re.match(r"blocks_(\d+)_", flat)
    layer = _LAYERS.get(flat[block.end() :] if block else flat)
    if layer is None or (block is not None) != (layer in _BLOCK_LAYERS.values()):
        return None
    return f"blocks.{block[1]}.{layer}" if block else layer


def _is_used(part: str, value: torch.Tensor) -> bool:
    return part in _OF_ANY_KIND or (
        any(part in parts for parts in _KINDS.values()) and (part != "diff" or value.ndim == 2)
    )


def _sound(name: str, key: str, value: torch.Tensor) -> torch.Tensor:
    """`value` in a type that can be computed with, once it is sure that it is finite."""
    is_alpha = key.endswith(".alpha")
    if not value.is_floating_point() and not is_alpha:
        raise ValueError(
            f"{key!r} in the LoRA {name!r} is {value.dtype}: weights must be floating-point numbers. Save it again in "
            "half or full precision."
        )
    if value.itemsize == 1:  # fp8, in which nothing can be computed
        value = value.float()
    if not value.is_meta and not value.isfinite().all():
        raise ValueError(f"{key!r} in the LoRA {name!r} is not finite: the file is damaged. Download it again.")
    return value


def _update(parts: _Parts) -> dict[str, torch.Tensor]:
    """The matrices of a layer, with its alpha multiplied in, and its bias if there is one."""
    kinds = [kind for kind, of_kind in _KINDS.items() if any(part in parts for part in of_kind)]
    if len(kinds) > 1:
        raise ValueError(f"{parts.whose} is changed in two ways, {' and '.join(kinds)}: only one is supported.")
    matrices = {"LoHa": _loha, "LoKr": _lokr, "diff": _whole}.get("".join(kinds), _lora)
    try:
        down, up, rank = matrices(parts)
        if min(down.ndim, up.ndim) < 2 or down.shape[0] != up.shape[1] or down.shape[0] == 0:
            raise IndexError
    except (RuntimeError, IndexError) as error:
        shapes = ", ".join(f"{part}: {tuple(value.shape)}" for part, value in parts.items())
        raise ValueError(
            f"{parts.whose} has matrices of shapes that do not go together ({shapes}): the first of a pair has as "
            "many rows, its rank, as the second has columns. The file is damaged or not a LoRA; download it again."
        ) from error
    scale = 1.0 if rank is None or "alpha" not in parts else _alpha(parts) / rank
    if scale != 1:
        # Half precision has few digits below 1e-4: a power of two goes to the one, what is left to the other.
        half = 2.0 ** round(math.log2(scale) / 2)
        down, up = down * half, up * (scale / half)
    # The one belongs to the second matrix, so alpha counts; the other is added to the layer's own as it is.
    biases = [
        value * factor for part, factor in (("B.bias", scale), ("diff_b", 1)) if (value := parts.get(part)) is not None
    ]
    if any(bias.shape != up.shape[:1] for bias in biases):
        raise ValueError(f"{parts.whose} has a bias of another size than its matrices, which have {up.shape[0]} rows.")
    return {"A.weight": down, "B.weight": up, **({"B.bias": sum(biases[1:], biases[0])} if biases else {})}


def _alpha(parts: _Parts) -> float:
    alpha = parts["alpha"]
    if alpha.numel() != 1 or not alpha.item() > 0:
        raise ValueError(f"{parts.whose} has an alpha of {alpha.tolist()}: it must be one number above 0.")
    return float(alpha.item())


# Two matrices whose product, second times first, is the update; and the rank that divides alpha, where alpha counts.
_Matrices = tuple[torch.Tensor, torch.Tensor, int | None]


def _lora(parts: _Parts) -> _Matrices:
    return parts["A"], parts["B"], parts["A"].shape[0]


def _whole(parts: _Parts) -> _Matrices:
    whole = parts["diff"]
    return (whole, _one(whole, 0), None) if whole.shape[0] <= whole.shape[1] else (_one(whole, 1), whole, None)


def _loha(parts: _Parts) -> _Matrices:
    """An element-wise product of two products: every pair of their ranks is a rank of it."""
    up, up_2, down, down_2 = (parts[f"hada_w{i}_{side}"] for side in "ab" for i in (1, 2))
    pairs_up, pairs_down = up[:, :, None] * up_2[:, None], down[:, None] * down_2[None]
    return pairs_down.flatten(0, 1), pairs_up.flatten(1), down.shape[0]


def _lokr(parts: _Parts) -> _Matrices:
    """A Kronecker product of two matrices, each whole or a product: the product of two Kronecker products."""
    ups, downs, rank = [], [], None
    for factor in ("lokr_w1", "lokr_w2"):
        if factor in parts:
            ups.append(parts[factor])
            downs.append(_one(parts[factor], 1))
        else:
            ups.append(parts[f"{factor}_a"])
            downs.append(parts[f"{factor}_b"])
            rank = parts[f"{factor}_b"].shape[0]
    down, up = torch.kron(*downs), torch.kron(*ups)
    if down.shape[0] >= min(down.shape[1], up.shape[0]):
        raise ValueError(
            f"{parts.whose} is a LoKr of full rank: as a LoRA it would be as large as the model. Merge it into the "
            "model, or reduce it to a LoRA with `peft.convert_to_lora`."
        )
    return down, up, rank


def _one(like: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.eye(like.shape[axis], dtype=like.dtype, device=like.device)
