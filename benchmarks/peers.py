"""Through FlowerTune's structure, NVFlare and silotune, the same work: `make bench-peers`.

FlowerTune's structure is a Flower app around TRL's SFTTrainer and PEFT (benchmarks/flowertune),
once as published (float32, activations computed again, the base loaded for every message) and once
tuned (bfloat16 where the processor has it, activations kept, the base kept). NVFlare's simulator
runs the tuned form through its Client API (benchmarks/flare), in an environment of its own that is
made when it is first needed; where its package cannot be installed, it is left out. All systems
train the same base on the same rows, clients, cohorts, steps, batches and lengths, with one command
each as a user types it. The turns alternate, each with a seed of its own. A plain PyTorch loop that
belongs to none of them scores the adapters.

    python benchmarks/peers.py [--turns 3] [--rounds 3] [--base NAME] [--out DIR] [key=value ...]

Keys and values are silotune's, such as runtime.together=auto. Finished turns are read again. Let
nothing else run on the machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from flower_run import Memory, environment, run_app

import silotune
from silotune.core.seeds import generator
from silotune.core.stats import mean_interval
from silotune.federation.sampling import sample
from silotune.models.sources import resolve
from silotune.recipes.sections import SamplingConfig

APP = Path(__file__).parent / "flowertune"
FLARE, NVFLARE = Path(__file__).parent / "flare", "nvflare==2.9.0"
PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n### Instruction:\n{question}\n### Response: "
)
"""What silotune's template `flowertune` writes before an answer."""
CLIENTS, ASKED, STEPS, BATCH, LR = 20, 3, 4, 4, 1e-3


@dataclass(frozen=True)
class Work:
    """What all systems do in a turn."""

    base: str
    rows: Path
    held_out: Path
    rounds: int
    length: int
    """Tokens of a row, at most."""
    seed: int
    overrides: Sequence[str]
    """Of silotune's recipe."""


@dataclass(frozen=True)
class Turn:
    """What one run of one system cost."""

    system: str
    seed: int
    job: float
    """Seconds from the command to its end."""
    steady: float
    """Median seconds of a round after the first."""
    training: float
    """Seconds in which a client was inside its training loop."""
    memory: int
    """Peak of the proportional set sizes of all its processes."""
    sent: int
    """Bytes of tensors, both ways."""
    loss: float = 0.0
    """Held-out, nats per answer token."""


def write_rows(name: str, path: Path) -> None:
    """MedQuAD's rows, dealt out to the clients one by one."""
    folder = Path(silotune.__file__).parent / "data" / "examples" / "medquad_mini"
    rows = [_shown(json.loads(line)) for line in (folder / name).read_text().splitlines()]
    owned = [row | {"client": f"client-{i % CLIENTS:02d}"} for i, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in owned))


def _shown(row: Mapping[str, str]) -> dict[str, str]:
    question, answer = row["question"], row["answer"]
    return {
        "question": question,
        "answer": answer,
        "prompt": PREAMBLE.format(question=question),
        "completion": answer,
    }


def cohorts(work: Work) -> list[list[str]]:
    """Whom silotune asks in each round."""
    names = [f"client-{i:02d}" for i in range(CLIENTS)]
    asked = SamplingConfig(num_clients=ASKED)
    gens = [generator(work.seed, "sampling", r + 1) for r in range(work.rounds)]
    return [sample(names, asked, gen) for gen in gens]


def _job(folder: Path, work: Work, *, tuned: bool) -> Path:
    """What the apps beside silotune read."""
    job = {
        "base": str(resolve(work.base)),
        "rows": str(work.rows),
        "out": str(folder),
        "cohorts": cohorts(work),
        "num_clients": CLIENTS,
        "steps": STEPS,
        "batch_size": BATCH,
        "max_length": work.length,
        "lr_max": LR,
        "lr_min": LR,
        "rank": 32,
        "alpha": 64,
        "dropout": 0.075,
        "seed": work.seed,
        "tuned": tuned,
        "bfloat16": torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported(),
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    return path


def _turn(system: str, folder: Path, work: Work, took: float, peak: int, *, log: Path) -> Turn:
    """What an app has told in its folder."""
    if not (folder / "told.json").is_file():
        sys.exit(f"{system} ended without a result; its output is in {log}")
    told = json.loads((folder / "told.json").read_text())
    steady = statistics.median(b - a for a, b in pairwise(told["times"][1:]))
    return Turn(system, work.seed, took, steady, told["training"], peak, told["bytes"])


def flowertune(folder: Path, work: Work, *, tuned: bool) -> Turn:
    """FlowerTune's structure in Flower's simulation, one actor with all processors."""
    path, home, cores = _job(folder, work, tuned=tuned), folder / "flwr", os.cpu_count() or 1
    began = time.time()
    peak = run_app(APP, {"job": str(path)}, home=home, nodes=CLIENTS, cores_each=cores)
    took = time.time() - began
    system = "FlowerTune, tuned" if tuned else "FlowerTune, as published"
    return _turn(system, folder, work, took, peak, log=home / "log")


def nvflare(folder: Path, work: Work, *, python: Path) -> Turn:
    """The tuned form in NVFlare's simulator, one process for each client of a round."""
    path, home, log = _job(folder, work, tuned=True), folder / "home", folder / "log"
    own = {
        "PYTHONPATH": f"{FLARE}{os.pathsep}{APP}",
        # more threads than processors make its three processes wait for each other
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ASKED)),
    }
    began = time.time()
    with Memory(home) as memory, log.open("w") as output:
        subprocess.run(
            [str(python), str(FLARE / "job.py"), str(path)],
            env=environment(home) | own,
            stdout=output,
            stderr=output,
            check=False,
        )
        took = time.time() - began
    return _turn("NVFlare, tuned", folder, work, took, memory.peak, log=log)


def nvflare_python(place: Path) -> Path | None:
    """An environment with NVFlare, and everything else from this one; None without its package."""
    python = place / "bin" / "python"
    if not (place / "ready").is_file():
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", NVFLARE]
        if subprocess.run(install, check=False).returncode:
            return None
        ours = sysconfig.get_paths()["purelib"]
        (found,) = place.glob("lib/python*/site-packages")
        (found / "beside.pth").write_text(f"{ours}\n")
        (place / "ready").touch()
    return python


def ours(folder: Path, work: Work) -> Turn:
    """`silotune run` with the same work."""
    recipe = f"""
seed = {work.seed}
rounds = {work.rounds}
[model]
name = {json.dumps(work.base)}
[adapter]
rank = 32
alpha = 64
dropout = 0.075
targets = ["q_proj", "v_proj"]
[data]
path = {json.dumps(str(work.rows))}
prompt = "{{question}}"
completion = "{{answer}}"
template = "flowertune"
eval_path = {json.dumps(str(work.held_out))}
[partition]
by = "client"
[sampling]
num_clients = {ASKED}
[train]
batch_size = {BATCH}
local_steps = {STEPS}
max_length = {work.length}
lr = {LR}
schedule = "constant"
[evaluate]
every = 0
[report]
page = false
samples = 0
"""
    path, home = folder / "recipe.toml", folder / "home"
    path.write_text(recipe)
    command = [sys.executable, "-m", "silotune", "run", str(path), "--out", str(folder / "run")]
    began = time.time()
    with Memory(home) as memory, (folder / "log").open("w") as log:
        done = subprocess.run(
            [*command, *work.overrides], env=environment(home), stdout=log, stderr=log, check=False
        )
        took = time.time() - began
    if done.returncode:
        sys.exit(f"silotune's run failed; its output is in {folder / 'log'}")
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    steady = statistics.median(
        x["seconds"] for x in told if x["event"] == "round" and x["round"] > 1
    )
    trained = [x for x in told if x["event"] == "train"]
    asked = [[x["client"] for x in trained if x["round"] == r + 1] for r in range(work.rounds)]
    if asked != cohorts(work):
        sys.exit(f"silotune asked {asked}, not the cohorts that FlowerTune's structure was given")
    sent = sum(x["bytes_down"] + x["bytes_up"] for x in trained)
    training = sum(x["seconds_training"] for x in trained)
    (folder / "run" / "adapter").rename(folder / "adapter")
    return Turn("silotune", work.seed, took, steady, training, memory.peak, sent)


def scored(place: Path, base: str, held_out: Path, length: int) -> Turn:
    """A finished turn with the held-out loss of its adapter, computed once."""
    path = place / "turn.json"
    turn = Turn(**json.loads(path.read_text()))
    if not turn.loss:
        turn = replace(turn, loss=held_out_loss(base, place / "adapter", held_out, length))
        path.write_text(json.dumps(asdict(turn)))
    return turn


def held_out_loss(name: str, adapter: Path, held_out: Path, length: int) -> float:
    """Nats per answer token, by a plain loop over one row at a time, in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = str(resolve(name))
    tokenizer = cast(Any, AutoTokenizer.from_pretrained(base))
    model = cast(Any, AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    total, num = 0.0, 0
    for row in map(json.loads, held_out.read_text().splitlines()):
        prompt: list[int] = tokenizer(row["prompt"])["input_ids"]
        answer: list[int] = tokenizer(row["completion"] + tokenizer.eos_token)["input_ids"]
        ids = torch.tensor([(prompt + answer)[:length]])
        with torch.inference_mode():
            scores = model(ids).logits[0, len(prompt) - 1 : -1].float()
        wanted = ids[0, len(prompt) :]
        total += float(torch.nn.functional.cross_entropy(scores, wanted, reduction="sum"))
        num += len(wanted)
    return total / num


SYSTEMS: dict[str, Callable[[Path, Work], Turn]] = {
    "published": partial(flowertune, tuned=False),
    "tuned": partial(flowertune, tuned=True),
    "nvflare": partial(nvflare, python=Path()),
    "silotune": ours,
}


def table(turns: Sequence[Turn]) -> str:
    """The medians, and ratios within each turn."""
    own = {t.seed: t for t in turns if t.system == "silotune"}
    lines = [
        "| | steady round, s | of silotune | job, s | of silotune | outside training, s "
        "| peak memory, GB | sent, MB | held-out loss | minus silotune's |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for system in dict.fromkeys(t.system for t in turns):
        its = [t for t in turns if t.system == system]

        def middle(value: Callable[[Turn], float], its: Sequence[Turn] = its) -> float:
            return statistics.median(map(value, its))

        worse = [t.loss - own[t.seed].loss for t in its]
        mean, low, high = mean_interval(worse)
        far = "" if system == "silotune" else f"{mean:+.3f}"
        if far and low is not None and high is not None:
            far += f" ({low:+.3f} to {high:+.3f})"
        lines.append(
            f"| {system} | {middle(lambda t: t.steady):.1f} "
            f"| {middle(lambda t: t.steady / own[t.seed].steady):.2f} "
            f"| {middle(lambda t: t.job):.0f} | {middle(lambda t: t.job / own[t.seed].job):.2f} "
            f"| {middle(lambda t: t.job - t.training):.0f} "
            f"| {middle(lambda t: t.memory) / 1e9:.1f} "
            f"| {middle(lambda t: t.sent) / 1e6:.1f} | {middle(lambda t: t.loss):.3f} | {far} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    options.add_argument("--length", type=int, default=128)
    options.add_argument("--base", default="smollm2-135m-instruct")
    options.add_argument("--out", type=Path)
    options.add_argument("overrides", nargs="*", metavar="key=value")
    args = options.parse_args()
    out: Path = (args.out or Path(tempfile.mkdtemp())).resolve()
    out.mkdir(parents=True, exist_ok=True)
    write_rows("train.jsonl", out / "rows.jsonl")
    write_rows("eval.jsonl", out / "held_out.jsonl")
    systems, names = dict(SYSTEMS), list(args.systems)
    if "nvflare" in names:
        python = nvflare_python(out / "nvflare")
        if python is None:
            print(f"{NVFLARE} cannot be installed here, so it is left out", flush=True)
            names.remove("nvflare")
        else:
            systems["nvflare"] = partial(nvflare, python=python)
    places: list[Path] = []
    for turn in range(args.turns):
        work = Work(
            args.base,
            out / "rows.jsonl",
            out / "held_out.jsonl",
            args.rounds,
            args.length,
            17 + turn,
            args.overrides,
        )
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            places.append(folder := out / f"{turn}-{name}")
            if not (folder / "turn.json").is_file():
                folder.mkdir()
                done = systems[name](folder, work)
                (folder / "turn.json").write_text(json.dumps(asdict(done)))
                print(json.dumps(asdict(done)), flush=True)
    print("measured; other work may run now, while the adapters are scored", flush=True)
    turns = [scored(place, args.base, out / "held_out.jsonl", args.length) for place in places]
    turns.sort(key=lambda t: [t.system != "silotune", t.system])
    print(
        f"{args.base}, {CLIENTS} clients, {ASKED} a round, {args.rounds} rounds, {STEPS} steps of "
        f"{BATCH} rows of at most {args.length} tokens, {args.turns} turns\n\n{table(turns)}"
    )


if __name__ == "__main__":
    main()
