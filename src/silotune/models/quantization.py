"""Bases in 4 or 8 bits through bitsandbytes: who can hold them, and how they are loaded.

Only the frozen base is quantised. What is trained and sent stays float32, so clients of one run may
hold their bases in different numbers. This file knows neither adapters nor clients.
"""

import importlib
import importlib.util
import logging
import sys
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator

from silotune.core.errors import ConfigError, ModelError

SHORT = {4: "nf4", 8: "int8"}
"""How people write it elsewhere."""


def _long(given: Any) -> Any:
    return SHORT.get(given, given) if type(given) is int else given


Quantization = Annotated[Literal["none", "nf4", "fp4", "int8"], BeforeValidator(_long)]


BLOCK = 64
"""Weights that share a scale in 4 bits."""


def check_quantization(kind: Quantization, device: torch.device, key: str) -> None:
    """Refuse a quantisation that this machine cannot do, before anything is fetched.

    Args:
        kind: Which one.
        device: Where the base would run.
        key: The setting, for messages.

    Raises:
        ConfigError: bitsandbytes is missing, or does not work on this device.
    """
    if kind == "none":
        return
    if device.type == "mps":  # there it fetches its kernels from the hub, which would run here
        raise ConfigError(
            f"{key} = '{kind}': bitsandbytes cannot quantise on Apple's GPU.\n"
            "  Set runtime.device = 'cpu', or take the key out and use a smaller model."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{key} = '{kind}' needs bitsandbytes, which is not installed.\n"
            "  make env EXTRAS=quantization"
        )


def tame_bitsandbytes() -> None:
    """Import bitsandbytes, where it is installed, such that it fetches no code; PEFT imports it.

    On some processors it asks the hub for compiled kernels as soon as it is imported, when the
    package `kernels` is there. No code from elsewhere runs here. It also logs a line for every
    layer that it casts.
    """
    if "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is None:
        return
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    absent = object()
    before: Any = sys.modules.get("kernels", absent)
    sys.modules["kernels"] = None  # type: ignore[assignment]  # an import of it fails
    try:
        importlib.import_module("bitsandbytes")
    finally:
        if before is absent:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = before


def loading_options(
    kind: Quantization, *, double: bool, dtype: torch.dtype, device: torch.device, skip: list[str]
) -> dict[str, Any]:
    """What `from_pretrained` has to be told.

    Args:
        kind: Which one; "none" gives no options.
        double: Quantise the scales of the blocks too.
        dtype: In which 4-bit weights are multiplied.
        device: Where the base will run; it is quantised on its way there.
        skip: Modules that keep their numbers, by name. Output embeddings always do.

    Reference:
        Dettmers et al. 2023, "QLoRA", section 3. arXiv:2305.14314 (nf4, double quantisation).
        Dettmers et al. 2022, "LLM.int8()", section 3. arXiv:2208.07339 (int8).
    """
    if kind == "none":
        return {}
    tame_bitsandbytes()
    from transformers import BitsAndBytesConfig

    skipped = ["lm_head", *skip] if skip else None  # None: transformers' own choice
    if kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skipped,
        )
    return {"quantization_config": config, "device_map": {"": device}}


def prepare_for_training(base: Any) -> Any:
    """Freeze a quantised base, and put what is not quantised (norms, embeddings) in float32.

    Raises:
        ModelError: On a processor, a layer of 4 bits whose rows are no whole number of blocks.
    """
    tame_bitsandbytes()
    from peft import prepare_model_for_kbit_training

    for name, module in base.named_modules():
        packed = type(module).__name__ == "Linear4bit" and base.device.type == "cpu"
        if packed and module.in_features % BLOCK:
            # bitsandbytes 0.50 then takes another block's scale on processors with AVX-512
            raise ModelError(
                f"model.quantization: layer '{name}' has rows of {module.in_features} weights, and "
                f"on a processor 4 bits need a multiple of {BLOCK}.\n"
                "  Set model.quantization = 'int8', or take another model."
            )
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # there, bitsandbytes 0.50 rounds the scales to bfloat16 at the first forward pass in
            # evaluation mode, and keeps them so: scoring would change the base
            module.support_avx512bf16_for_cpu = False
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
