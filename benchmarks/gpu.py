"""Published sizes on a GPU: `python benchmarks/gpu.py [--only PART] [--out DIR] [key=value ...]`.

Weights of OpenLLaMA 3B and Llama 3 8B have to be fetched; their shapes do not. A base of random
weights in each shape trains as fast and needs as much memory as the real one; what it learns says
nothing. The tokens are bytes. Three parts, in this order:

- recipes: `flowertune` and `medical-dora` as shipped, fewer rounds and steps: tokens per second of
  training, and actual against predicted memory;
- together: several clients in one batch against the loop (benchmarks/together.py);
- peers: FlowerTune's structure and silotune, the same work (benchmarks/peers.py) on the 3B shape.

Keys and values go to the recipes. Without a GPU it stops, unless `--small` asks for tiny shapes on
the processor, which shows that the script runs and nothing else. The 8B shape writes 16 GB to
`--out`.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from silotune.core.wording import human_bytes

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.conftest import build_tokenizer

HERE = Path(__file__).parent
SHAPES: dict[str, dict[str, Any]] = {
    # config.json of openlm-research/open_llama_3b_v2
    "flowertune": {
        "vocab_size": 32000,
        "hidden_size": 3200,
        "intermediate_size": 8640,
        "num_hidden_layers": 26,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    },
    # config.json of meta-llama/Meta-Llama-3-8B, the base of Bio-Medical-Llama-3-8B
    "medical-dora": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
}
"""By the recipe that trains it."""
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
ROWS, LETTERS = 400, "abcdefghij "
PARTS = ("recipes", "together", "peers")


def build(recipe: str, folder: Path, *, small: bool) -> Path:
    """A base with random weights in bfloat16, and a tokenizer of bytes."""
    if (folder / "tokenizer.json").is_file():
        return folder
    shape = {**SHAPES[recipe], **(SMALL if small else {})}
    if small:
        shape |= {"vocab_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**shape, bos_token_id=None, eos_token_id=1, pad_token_id=1)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, length: int) -> None:
    """Random letters in the columns of Alpaca: every row has more than `length` tokens."""
    draw = random.Random(0)

    def text(count: int) -> str:
        return "".join(draw.choices(LETTERS, k=count)).strip() or "a"

    with path.open("w", encoding="utf-8") as file:
        for _ in range(ROWS):
            row = {"instruction": "Go on.", "input": text(length // 4), "output": text(length)}
            file.write(json.dumps(row) + "\n")


def train(recipe: str, base: Path, rows: Path, out: Path, args: argparse.Namespace) -> None:
    """Run a recipe in a process of its own, and print what its training cost."""
    keys = [f"model.name={base}", f"data.path={rows}", "rounds=3", "train.local_steps=4"]
    keys += ["train.warmup_steps=0", "evaluate.every=0", "plan.measure=true"]
    keys += ["report.page=false", "report.samples=0", f"data.max_rows={ROWS}", "budget={}"]
    if find_spec("bitsandbytes") is None or not torch.cuda.is_available():
        keys += ["model.quantization=none", "train.optimizer=adamw"]
        print(f"{recipe}: without bitsandbytes or a GPU, so not in 4 bits")
    if args.small:
        keys += ["train.max_length=256", "train.batch_size=2", "train.local_steps=2", "rounds=2"]
    command = [sys.executable, "-m", "silotune", "run", recipe, *keys, *args.overrides]
    command += ["--out", str(out), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"silotune's run of {recipe} failed")
    lines = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    later = [row for row in lines if row["event"] == "train" and row["round"] > 1]
    speed = statistics.median(row["num_tokens"] / row["seconds_training"] for row in later)
    memory = json.loads(done.stdout)["predicted"]["memory"]
    print(
        f"{recipe}: {speed:.0f} tokens/s in training, peak memory {human_bytes(memory['actual'])}, "
        f"predicted {human_bytes(memory['predicted'])} ({100 * memory['difference']:+.1f} %)",
        flush=True,
    )


def script(name: str, *words: str) -> None:
    """Run another benchmark."""
    print(f"\n{name} {' '.join(words)}", flush=True)
    if subprocess.run([sys.executable, str(HERE / name), *words], check=False).returncode:
        sys.exit(f"{name} failed")


def main() -> None:
    """Measure the parts that are asked for."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--only", choices=PARTS, action="append")
    options.add_argument("--small", action="store_true")
    options.add_argument("--out", type=Path)
    options.add_argument("overrides", nargs="*", metavar="key=value")
    args = options.parse_intermixed_args()
    if not torch.cuda.is_available() and not args.small:
        sys.exit("skipped: no GPU on this machine (--small shows that the script runs)")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "a processor"
    print(f"{where}, torch {torch.__version__}")
    parts = args.only or PARTS
    with tempfile.TemporaryDirectory() as scratch:
        out: Path = (args.out or Path(scratch)).resolve()
        out.mkdir(parents=True, exist_ok=True)
        if "recipes" in parts:
            write_rows(out / "rows.jsonl", 256 if args.small else 512)
            for recipe in SHAPES:
                base = build(recipe, out / "bases" / recipe, small=args.small)
                train(recipe, base, out / "rows.jsonl", out / recipe, args)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if "together" in parts:
            words = ["--small", "--cases", "4x1x16"] if args.small else ["--layers", "24"]
            dtype = [] if args.small else ["--dtype", "bfloat16"]
            script("together.py", "--device", device, *words, *dtype)
        if "peers" in parts:
            base = build("flowertune", out / "bases" / "flowertune", small=args.small)
            words = ["--turns", "1", "--rounds", "2", "--length", "64"] if args.small else []
            script("peers.py", "--base", str(base), *words)


if __name__ == "__main__":
    main()
