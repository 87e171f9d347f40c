"""Clients in one batch against the loop: tokens per second, their ratio, and memory.

The base has random weights in the shapes of a real one (by default SmolLM2-135M's layers, fewer of
them), so nothing is fetched. The ways alternate in one process, so that a drift of the machine
affects all of them. Processor time is shown beside wall time, because it also means something
where other work shares the processor. Training only: no scoring, no disk, no aggregation.

    python benchmarks/together.py [--cases 20x1x32 5x4x128] [--curve] [--memory] [--small]

A case is clients x rows x tokens; 20x1x16-96 draws every row's length between 16 and 96.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from silotune.core.algorithm import LocalContext, LocalRule
from silotune.core.wording import human_bytes
from silotune.models.adapters import trained_parameters
from silotune.models.devices import peak_memory_bytes
from silotune.models.loading import LoadedModel, read_adapter, write_adapter
from silotune.runtime.groups import MOST_CLIENTS
from silotune.training.local_step import OwnTraining
from silotune.training.loop import TrainConfig, train
from silotune.training.tasks.base import Batch, Example
from silotune.training.tasks.instruct import INSTRUCT
from silotune.training.together import MOST_TOKENS, train_together

CASES = ("20x1x32", "20x1x16-96", "20x1x128", "5x1x32", "5x4x32", "5x4x128", "2x1x32")
CURVE = (8, 16, 32, 64, 128, 256, 512, 1024)
OF_BASE = ("layers", "width", "rank", "dtype", "device")
RULE = LocalRule()


def build(options: argparse.Namespace) -> LoadedModel:
    """A random Llama with LoRA on its query and value projections."""
    wide = options.width
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=wide,
        intermediate_size=wide * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=wide // 64,
        num_key_value_heads=1 if wide % 192 else wide // 192,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=2 * options.rank,
        lora_dropout=0.05,
        target_modules=["q_proj", "v_proj"],
    )
    model = get_peft_model(LlamaForCausalLM(config).to(dtype), lora)
    parameters = trained_parameters(model, "lora")
    for p in parameters.values():
        p.data = p.data.float()
    model.eval()
    device = torch.device(options.device)
    return LoadedModel(model.to(device), None, device, dtype, parameters, kind="lora")


def clients_of(case: str, loaded: LoadedModel, steps: int) -> list[OwnTraining]:
    """What the clients of a case train on: random tokens, half of them learned."""
    num_clients, rows, lengths = case.split("x")
    low, _, high = lengths.partition("-")
    draw, start = random.Random(case), read_adapter(loaded)

    def batch() -> Batch:
        examples: list[Example] = []
        for _ in range(int(rows)):
            n = draw.randint(int(low), int(high or low))
            examples.append(Example(torch.randint(0, 8192, (n,)), torch.arange(n) >= n // 2))
        return INSTRUCT.collate(examples)

    return [
        OwnTraining(
            steps=[[batch()] for _ in range(steps)],
            context=LocalContext(start, {}, {}),
            lr=1e-3,
            seed=k,
        )
        for k in range(int(num_clients))
    ]


def loop(loaded: LoadedModel, group: Sequence[OwnTraining], cfg: TrainConfig) -> None:
    """One client after another."""
    for one in group:
        write_adapter(loaded, one.context.received)
        train(
            loaded, one.steps, INSTRUCT, cfg, RULE, one.context,
            round_=1, lr=one.lr, seed=one.seed,
        )  # fmt: skip
        read_adapter(loaded)


def joined(
    loaded: LoadedModel, group: Sequence[OwnTraining], cfg: TrainConfig, most: int | None = None
) -> None:
    """All clients in one pass, or with `most` as "auto" splits them."""
    train_together(loaded, group, INSTRUCT, cfg, RULE, round_=1, most_tokens=most)


def auto(loaded: LoadedModel, group: Sequence[OwnTraining], cfg: TrainConfig) -> None:
    """As `runtime.together = "auto"` does: by the size of a client's median pass."""
    sizes = [batch.ids.numel() for one in group for step in one.steps for batch in step]
    size = max(1, min(MOST_CLIENTS, MOST_TOKENS // int(statistics.median(sizes))))
    for at in range(0, len(group), size):
        part = group[at : at + size]
        if size == 1 or len(part) == 1:
            loop(loaded, part, cfg)
        else:
            joined(loaded, part, cfg, MOST_TOKENS)


WAYS: dict[str, Callable[..., None]] = {"loop": loop, "together": joined, "auto": auto}


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Wall and processor seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(case: str, loaded: LoadedModel, options: argparse.Namespace) -> None:
    """Alternate the ways on one case, and print a line of a table."""
    group = clients_of(case, loaded, options.steps)
    cfg = TrainConfig(batch_size=1)
    tokens = sum(b.num_real_tokens for one in group for step in one.steps for b in step)
    for way in WAYS.values():
        way(loaded, group, cfg)  # first touches of memory, and kernels of new shapes
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for turn in range(options.turns):
        names = list(WAYS) if turn % 2 == 0 else list(reversed(WAYS))
        for name in names:
            seconds[name].append(timed(partial(WAYS[name], loaded, group, cfg)))
    shown = [case, f"{tokens}"]
    shown += [f"{tokens / statistics.median(w for w, _ in seconds[name]):.0f}" for name in WAYS]
    for name in list(WAYS)[1:]:
        for which in (0, 1):
            each = [
                a[which] / b[which] for a, b in zip(seconds["loop"], seconds[name], strict=True)
            ]
            low, middle, high = min(each), statistics.median(each), max(each)
            shown.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
    print("| " + " | ".join(shown) + " |", flush=True)


def curve(loaded: LoadedModel, options: argparse.Namespace) -> None:
    """Processor seconds of a pass of one client by its tokens: what it costs besides them."""
    cfg, best = TrainConfig(batch_size=1), dict[int, float]()
    groups = {n: clients_of(f"1x1x{n}", loaded, options.steps) for n in CURVE}
    for turn in range(options.turns + 1):
        for n, group in groups.items():
            _, cpu = timed(partial(loop, loaded, group, cfg))
            if turn:
                best[n] = min(best.get(n, cpu), cpu)
    each = {n: cpu / options.steps for n, cpu in best.items()}
    print("tokens of a pass: processor ms:", {n: round(1000 * s, 1) for n, s in each.items()})
    slope = (each[256] - each[32]) / (256 - 32)
    print(f"a pass costs as much as {each[32] / slope - 32:.0f} tokens besides its own (32 to 256)")


def memory(case: str, options: argparse.Namespace) -> None:
    """Peak memory of each way, in a process of its own."""
    found: dict[str, int] = {}
    for name in WAYS:
        more = [f"--{key}={getattr(options, key)}" for key in OF_BASE]
        command = [sys.executable, __file__, "--cases", case, "--only", name, *more]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    shown = ", ".join(f"{name} {human_bytes(size)}" for name, size in found.items())
    print(f"peak memory, {case}: {shown}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--curve", action="store_true", help="only the cost of a pass by its tokens"
    )
    parser.add_argument("--memory", action="store_true", help="also peak memory of the first case")
    parser.add_argument("--small", action="store_true", help="a tiny base: seconds, for a test")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.small:
        options.layers, options.width, options.turns, options.steps = 2, 64, 1, 1
    torch.set_num_threads(options.threads)
    loaded = build(options)
    if options.only:
        case = options.cases[0]
        WAYS[options.only](loaded, clients_of(case, loaded, options.steps), TrainConfig())
        print(peak_memory_bytes())
        return
    print(
        f"{options.layers} layers of width {options.width}, rank {options.rank}, {options.dtype}, "
        f"{options.device}, {options.threads} threads, torch {torch.__version__}"
    )
    if options.curve:
        curve(loaded, options)
        return
    print("ratios are loop / way: above 1, the way is faster; median (lowest to highest turn)")
    columns = ["case", "tokens", *(f"{name}, tokens/s" for name in WAYS)]
    columns += [f"{name}, {kind}" for name in list(WAYS)[1:] for kind in ("wall", "processor")]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", flush=True)
    for case in options.cases:
        compare(case, loaded, options)
    if options.memory:
        memory(options.cases[0], options)


if __name__ == "__main__":
    main()
