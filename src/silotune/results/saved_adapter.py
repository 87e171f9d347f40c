"""The tensors that a finished run has saved."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from silotune.core.errors import RunFolderError


def read_result(adapter: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved adapter or model, by name.

    Raises:
        RunFolderError: There are none, or a file is damaged.
    """
    files = sorted(adapter.glob("*.safetensors"))
    if not files:
        raise RunFolderError(
            f"{adapter} holds no result yet.\n  Resume it: silotune run --resume {adapter.parent}"
        )
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        try:
            tensors |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise RunFolderError(
                f"{path} is damaged: {error}\n  Restore {adapter} from a copy."
            ) from error
    return tensors
