"""Bases in 4 or 8 bits through bitsandbytes: which machines support them, and how to load them.

Only the frozen base is quantised. Trained and sent tensors stay float32, so clients of the same run
may hold their bases in different formats. This file knows neither adapters nor clients.
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
"""Short forms that other tools use."""


def _long(given: Any) -> Any:
    return SHORT.get(given, given) if type(given) is int else given


Quantization = Annotated[Literal["none", "nf4", "fp4", "int8"], BeforeValidator(_long)]


BLOCK = 64
"""Number of weights that share a scale in 4 bits."""


def check_quantization(kind: Quantization, device: torch.device, key: str) -> None:
    """Refuse a quantisation that this machine does not support, before anything is fetched.

    Args:
        kind: Which quantisation.
        device: Where the base will run.
        key: The setting, for messages.

    Raises:
        ConfigError: bitsandbytes is missing, or does not work on this device.
    """
    if kind == "none":
        return
    if device.type == "mps":  # there, it downloads its kernels from the hub and runs them
        raise ConfigError(
            f"{key} = '{kind}': bitsandbytes cannot quantise on Apple's GPU.\n"
            "  Set runtime.device = 'cpu', or remove the key and use a smaller model."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{key} = '{kind}' needs bitsandbytes, which is not installed.\n"
            "  Install it: make env EXTRAS=quantization"
        )


def tame_bitsandbytes() -> None:
    """Import bitsandbytes, if it is installed, so that it downloads no code. PEFT imports it too.

    On some processors, the import requests compiled kernels from the hub if the package `kernels`
    is installed. No downloaded code may run here. It also logs a line for every layer that it
    casts.
    """
    if "peft" in sys.modules:  # a plain base may have been loaded before, see below
        for is_there in _answers_of_peft():
            is_there.cache_clear()
    if "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is None:
        return
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    absent = object()
    before: Any = sys.modules.get("kernels", absent)
    sys.modules["kernels"] = None  # type: ignore[assignment]  # makes its import fail
    try:
        importlib.import_module("bitsandbytes")
    finally:
        if before is absent:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = before


def spare_bitsandbytes() -> None:
    """Keep PEFT from importing bitsandbytes for a plain base: that takes seconds.

    PEFT imports it with itself if it can. It also asks whether it is installed, and remembers the
    answer, which is "no" from here until `tame_bitsandbytes` is called for a base or an optimizer
    that needs it. What other libraries are told does not change.
    """
    if "bitsandbytes" in sys.modules:
        return
    from transformers.utils.import_utils import is_bitsandbytes_available

    is_bitsandbytes_available()  # remembered too, so it has to be asked before
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # makes its import fail
    try:
        for is_there in _answers_of_peft():
            is_there()
    finally:
        del sys.modules["bitsandbytes"]


def _answers_of_peft() -> list[Any]:
    """PEFT's remembered answers to whether bitsandbytes is installed."""
    import peft.import_utils as peft_utils

    return [peft_utils.is_bnb_available, peft_utils.is_bnb_4bit_available]


def loading_options(
    kind: Quantization, *, double: bool, dtype: torch.dtype, device: torch.device, skip: list[str]
) -> dict[str, Any]:
    """The arguments of `from_pretrained` for a quantised base.

    Args:
        kind: Which quantisation; "none" gives no arguments.
        double: Also quantise the scales of the blocks.
        dtype: The type in which 4-bit weights are multiplied.
        device: Where the base will run; it is quantised while it is moved there.
        skip: Names of modules that are not quantised. Output embeddings never are.

    Reference:
        Dettmers et al. 2023, "QLoRA", section 3. arXiv:2305.14314 (nf4, double quantisation).
        Dettmers et al. 2022, "LLM.int8()", section 3. arXiv:2208.07339 (int8).
    """
    if kind == "none":
        return {}
    tame_bitsandbytes()
    from transformers import BitsAndBytesConfig

    skipped = ["lm_head", *skip] if skip else None  # None: transformers' default
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
    """Freeze a quantised base, and convert the rest of it (norms, embeddings) to float32.

    Raises:
        ModelError: On a CPU, the row length of a 4-bit layer is not a multiple of the block size.
    """
    tame_bitsandbytes()
    from peft import prepare_model_for_kbit_training

    for name, module in base.named_modules():
        packed = type(module).__name__ == "Linear4bit" and base.device.type == "cpu"
        if packed and module.in_features % BLOCK:
            # bitsandbytes 0.50 then uses another block's scale on processors with AVX-512
            raise ModelError(
                f"model.quantization: layer '{name}' has rows of {module.in_features} weights, but "
                f"4 bits on a CPU require a multiple of {BLOCK}.\n"
                "  Set model.quantization = 'int8', or use another model."
            )
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # on such processors, bitsandbytes 0.50 rounds the scales to bfloat16 in the first
            # forward pass in evaluation mode, and keeps them so: scoring would change the base
            module.support_avx512bf16_for_cpu = False
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
