"""What goes with DeepSpeed, and a transformer that is dealt out."""

import os
from multiprocessing import get_context

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from conftest import make_transformer
from diffusers_svi.training.zero import check_beside_zero, deal_out, zero_stage


PLAIN = {"group_offload": False, "quantize_base": None, "use_ema": False, "compile": False, "condition": None}


@pytest.mark.parametrize(
    ("given", "stages", "message"),
    [
        ({"group_offload": True}, (2, 3), r"`--group_offload` and DeepSpeed \(ZeRO-.\) would both place the weights"),
        ({"quantize_base": "int8"}, (2, 3), r"`--quantize_base=int8`: DeepSpeed \(ZeRO-.\) cannot move weights"),
        ({"quantize_base": "4bit"}, (3,), "`--quantize_base=4bit`: ZeRO-3 cannot deal quantized weights out"),
        ({"compile": True}, (3,), "`--compile`: under ZeRO-3 weights come and go inside"),
        ({"condition": "pose"}, (3,), "`--condition pose`: ZeRO-3 cannot deal its modules out"),
        ({"use_ema": True}, (3,), "`--use_ema`: under ZeRO-3 every process has a share"),
    ],
)
def test_what_does_not_go_with_deepspeed_is_refused(given, stages, message):
    for stage in (None, 2, 3):
        check_beside_zero(PLAIN, stage)
        if stage not in stages:
            check_beside_zero({**PLAIN, **given}, stage)
            continue
        with pytest.raises(ValueError, match=message):
            check_beside_zero({**PLAIN, **given}, stage)


def in_a_process_of_its_own(function, *arguments: object) -> None:
    process = get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def deal_out_and_look() -> None:
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator()
    os.environ["LOCAL_RANK"] = "0"
    transformer, plain = make_transformer(), make_transformer().bfloat16()
    assert zero_stage(accelerator) == 3
    deal_out(transformer, accelerator, torch.bfloat16)
    for (name, dealt), whole in zip(transformer.named_parameters(), plain.parameters(), strict=True):
        # Of the parameter itself nothing is left; the only process has all of it as its share.
        assert dealt.numel() == 0 and dealt.ds_shape == whole.shape, name
        assert torch.equal(dealt.ds_tensor[: whole.numel()].view(whole.shape), whole), name
        assert dealt.ds_tensor.dtype == torch.bfloat16, name


def test_a_transformer_is_dealt_out_before_deepspeed_gets_it():
    in_a_process_of_its_own(deal_out_and_look)
