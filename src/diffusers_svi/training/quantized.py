"""Forms with fewer bits that the frozen base can be kept in, for QLoRA; the LoRA itself stays in float32."""

import importlib.util
from typing import Any

import torch
from diffusers import BitsAndBytesConfig, TorchAoConfig

from ..checks import check_choice


# Of bitsandbytes (its 4 bits are NF4), and of torchao, which quantizes weights alone.
BITSANDBYTES, TORCHAO = ("4bit", "8bit"), ("int8", "fp8")
QUANTIZATIONS = (*BITSANDBYTES, *TORCHAO)


def check_quantization(form: str) -> None:
    """Raise a `ValueError` if there is no such form, or what it needs is missing."""
    check_choice("quantize_base", form, QUANTIZATIONS)
    if form in BITSANDBYTES and not torch.cuda.is_available():
        raise ValueError(
            f"`--quantize_base={form}` needs a GPU: bitsandbytes quantizes nowhere else. int8 and fp8 do without."
        )
    if form in TORCHAO and importlib.util.find_spec("torchao") is None:
        raise ValueError(f"`--quantize_base={form}` needs torchao: `pip install torchao`.")


def quantization_config(form: str, dtype: torch.dtype) -> Any:
    """What `from_pretrained` is to be given for a base that computes in `dtype`.

    Raises:
        ValueError: as [`check_quantization`].
    """
    check_quantization(form)
    if form == "4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    if form == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if form == "int8" else Float8WeightOnlyConfig())
