"""What a base in fewer bits saves and costs, and what each adapter sends.

`python benchmarks/bases.py [MODEL]`: memory of the base, and seconds for a training step and for
ten generated tokens, with ratios to the unquantised base. All run in one process, one after the
other. Needs `make env EXTRAS=quantization`.
"""

import argparse
import time

import torch

from silotune.core.tree import size_bytes
from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig
from silotune.models.loading import LoadedModel, load_model, read_adapter
from silotune.training.generate import complete
from silotune.training.tasks.base import Example
from silotune.training.tasks.instruct import INSTRUCT

BASES = ("none", "int8", "nf4", "fp4")
ADAPTERS = {
    "lora": AdapterConfig(),
    "lora, dora": AdapterConfig(dora=True),
    "ia3": AdapterConfig(kind="ia3"),
    "prompt": AdapterConfig(kind="prompt"),
    "prefix": AdapterConfig(kind="prefix"),
    "full": AdapterConfig(kind="full"),
}
ROWS, TOKENS, REPEATS = 4, 128, 5


def main() -> None:
    """Print both tables."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    name = options.parse_args().model
    print("quantization  dora     MB    seconds/step    ratio     seconds/10 tokens    ratio")
    plain: tuple[float, float] | None = None
    for dora in (False, True):
        for kind in BASES:
            if dora and kind == "int8":
                continue  # refused on a processor
            loaded = _load(name, kind, ADAPTERS["lora, dora" if dora else "lora"])
            step, spoken = _seconds_of_a_step(loaded), _seconds_of_answers(loaded)
            plain = plain or (step, spoken)
            print(
                f"{kind:12}  {dora!s:5}  {_base_bytes(loaded) / 1e6:4.0f}  {step:14.2f}  "
                f"{step / plain[0]:7.2f}  {spoken:20.2f}  {spoken / plain[1]:7.2f}"
            )
            del loaded
    print("\nadapter     MB one way")
    for kind, adapter in ADAPTERS.items():
        print(f"{kind:10}  {size_bytes(read_adapter(_load(name, 'none', adapter))) / 1e6:.2f}")


def _load(name: str, quantization: str, adapter: AdapterConfig) -> LoadedModel:
    cfg = ModelConfig.model_validate({"name": name, "quantization": quantization})
    return load_model(cfg, adapter, seed=1, device="cpu")


def _base_bytes(loaded: LoadedModel) -> int:
    own = {p.data_ptr() for p in loaded.parameters.values()}
    return sum(
        p.numel() * p.element_size() for p in loaded.model.parameters() if p.data_ptr() not in own
    )


def _seconds_of_a_step(loaded: LoadedModel) -> float:
    gen = torch.Generator().manual_seed(1)
    rows = [
        Example(torch.randint(3, 1000, (TOKENS,), generator=gen), torch.arange(TOKENS) > 0)
        for _ in range(ROWS)
    ]
    batch, found = INSTRUCT.collate(rows), []
    loaded.model.train()
    for _ in range(REPEATS):
        began = time.perf_counter()
        INSTRUCT.loss(loaded, batch).loss_sum.backward()
        found.append(time.perf_counter() - began)
    loaded.model.eval()
    return min(found)


def _seconds_of_answers(loaded: LoadedModel) -> float:
    found = []
    for _ in range(3):
        began = time.perf_counter()
        complete(loaded, [list(range(3, 35))], max_new_tokens=10)
        found.append(time.perf_counter() - began)
    return min(found)


if __name__ == "__main__":
    main()
