"""Blocks that stay on the CPU and come when they compute: the same gradients, and never more than two of them."""

import pytest
import torch
from peft import LoraConfig

from conftest import make_transformer
from diffusers_svi.training.block_offload import BlockOffload
from diffusers_svi.training.turns import put_by


CPU = torch.device("cpu")
INPUTS = {
    "hidden_states": torch.randn(1, 36, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    "timestep": torch.tensor([500.0]),
    "encoder_hidden_states": torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(1)),
    "return_dict": False,
}


def make_trained(num_layers: int = 5):
    """A transformer with a LoRA whose output matters, as it is trained."""
    transformer = make_transformer(num_layers=num_layers)
    transformer.requires_grad_(False)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["to_q", "to_out.0", "ffn.net.0.proj"], init_lora_weights="gaussian")
    transformer.add_adapter(config)
    for name, parameter in transformer.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    transformer.enable_gradient_checkpointing()
    return transformer.train()


def step(transformer) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Prediction and gradients of one step."""
    transformer.zero_grad()
    prediction = transformer(**INPUTS)[0]
    prediction.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in transformer.named_parameters() if p.requires_grad}
    return prediction.detach(), gradients


@pytest.fixture
def offloaded():
    transformer = make_trained()
    return transformer, BlockOffload(transformer, CPU)


def test_gradients_are_the_same(offloaded):
    """Bit for bit, in every step; and so is what is predicted without gradients in between."""
    transformer, _ = offloaded
    prediction, gradients = step(make_trained())
    assert len(gradients) == 5 * 2 * 5 and all(gradient.abs().max() > 0 for gradient in gradients.values())
    for _ in range(2):
        again, of_offloaded = step(transformer)
        assert torch.equal(again, prediction) and of_offloaded.keys() == gradients.keys()
        assert all(torch.equal(of_offloaded[name], gradient) for name, gradient in gradients.items())
        with torch.no_grad():
            assert torch.equal(transformer(**INPUTS)[0], prediction)


def test_at_most_two_blocks_are_there_the_next_one_always(offloaded):
    """Forward, backward, and forward again: every block but the very first is there before it computes."""
    transformer, offload = offloaded
    seen, enter = [], BlockOffload._enter
    for index, block in enumerate(transformer.blocks):
        weights = [p for p in block.parameters() if not p.requires_grad]
        (hook,) = block._forward_pre_hooks.values()
        assert hook.func.__func__ is enter

        def before(module, args, index=index):
            seen.append((index, sorted(offload.on_device)))

        def after(module, args, weights=weights):
            assert all(p.isfinite().all() for p in weights)
            absent = [block for i, block in enumerate(transformer.blocks) if i not in offload.on_device]
            frozen = [p for block in absent for p in block.parameters() if not p.requires_grad]
            assert frozen and all(p.isnan().all() and p.untyped_storage().nbytes() == 4 for p in frozen)

        block.register_forward_pre_hook(before, prepend=True)
        block.register_forward_pre_hook(after)
    step(transformer)
    step(transformer)
    one_step = [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]
    assert [index for index, _ in seen] == 2 * one_step
    assert all(index in there and len(there) <= 2 for index, there in seen[1:])


def test_weights_that_are_away_keep_shape_type_and_device(offloaded):
    transformer, offload = offloaded
    plain = make_trained()
    for (name, one), (_, other) in zip(transformer.named_parameters(), plain.named_parameters(), strict=True):
        assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        is_away = name.startswith("blocks.") and not one.requires_grad
        assert is_away == bool(one.isnan().all())
    assert offload.on_device == set()


def test_blocks_of_a_training_that_waits_are_away(offloaded):
    transformer, offload = offloaded
    prediction, _ = step(transformer)
    assert offload.on_device == {0, 1}
    put_by(None, torch.optim.AdamW(p for p in transformer.parameters() if p.requires_grad), offload)
    weights = [p for block in transformer.blocks for p in block.parameters() if not p.requires_grad]
    assert offload.on_device == set() and all(weight.isnan().all() for weight in weights)
    assert torch.equal(step(transformer)[0], prediction)


def test_one_block(offloaded):
    transformer = make_trained(num_layers=1)
    BlockOffload(transformer, CPU)
    prediction, gradients = step(make_trained(num_layers=1))
    again, of_offloaded = step(transformer)
    assert torch.equal(again, prediction) and all(
        torch.equal(of_offloaded[name], gradients[name]) for name in gradients
    )
