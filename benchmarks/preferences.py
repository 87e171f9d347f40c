"""What opposed preferences cost, and what helps: half of the clients have their pairs swapped.

    python benchmarks/preferences.py [PAIRS] [--model NAME] [--clients 4] [--rounds 6] [--out DIR]

PAIRS is a JSONL file with pairs as texts or lists of messages; without it, made-up pairs are used,
in which every chosen answer begins alike and every rejected one, too. The rows are dealt out in
turn; then every second client's pairs are swapped, in its train and held-out rows alike: what the
others prefer, it rejects. Compared are the base, each client alone, FedAvg, a robust rule (the
median), factors B kept by each client (FedSA-LoRA), and all rows in one place. Without --model, a
random model of 2 layers is trained on bytes: its numbers show the mechanism, not the quality of any
model. An interrupted comparison goes on, a finished one is read again.
"""

import argparse
import json
import sys
from pathlib import Path

import silotune

RECIPE = """
seed = 11
rounds = {rounds}
task = "prefer"
[model]
name = "{model}"
dtype = "float32"
[adapter]
rank = 8
targets = ["q_proj", "v_proj"]
[data]
path = "{data}"
[train]
batch_size = {batch}
local_steps = {steps}
lr = {lr}
max_length = {length}
[evaluate]
every = {rounds}
[runtime]
device = "cpu"
threads = 1
[report]
page = false
[compare]
seeds = {seeds}
tune = false
every = {rounds}
algorithms = [{{ name = "median" }}, {{ name = "fedsa_lora" }}]
"""


def deal(pairs: list[dict], folder: Path, clients: int) -> None:
    """One file per client; every second client prefers what the others reject."""
    for n in range(clients):
        own = pairs[n::clients]
        if n % 2:
            own = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in own]
        name = f"{'swapped' if n % 2 else 'plain'}-{n}"
        lines = "".join(json.dumps(row) + "\n" for row in own)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def made_up(count: int) -> list[dict]:
    """Pairs with a preference that every row shows, so that any model can learn it."""
    return [
        {
            "prompt": [{"role": "user", "content": f"What is {n}?"}],
            "chosen": [{"role": "assistant", "content": f"It is {n}."}],
            "rejected": [{"role": "assistant", "content": f"No {n}!"}],
        }
        for n in range(count)
    ]


def num_characters(row: dict) -> int:
    """Bytes of the prompt and the longer answer: tokens of the random model."""
    prompt, chosen, rejected = (
        len(own.encode())
        if isinstance(own := row[part], str)
        else sum(len(turn["content"].encode()) for turn in own)
        for part in ("prompt", "chosen", "rejected")
    )
    return prompt + max(chosen, rejected)


def bounds(score: dict | None) -> dict | None:
    """A mean with its interval; None where there is none, such as a base's preferences."""
    return score and {key: score[key] for key in ("mean", "low", "high")}


def main() -> None:
    """Write the clients' files and a recipe, run it once, and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pairs", type=Path, nargs="?")
    parser.add_argument("--model", help="a base; by default a random one of 2 layers")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--characters", type=int, default=330, help="longest pair that is used")
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/preferences"))
    parser.add_argument("--no-compare", action="store_true", help="one run of FedAvg, no more")
    args = parser.parse_args()
    every = made_up(args.rows)
    if args.pairs is not None:
        every = [json.loads(line) for line in args.pairs.read_text("utf-8").splitlines()]
    pairs = [row for row in every if num_characters(row) <= args.characters][: args.rows]
    place: Path = args.out.resolve()
    recipe = place / "recipe.toml"
    if not recipe.is_file():
        (place / "rows").mkdir(parents=True, exist_ok=True)
        deal(pairs, place / "rows", args.clients)
        if args.model is None:
            sys.path.insert(0, str(Path(__file__).parents[1]))
            from tests.conftest import build_tiny_model

            args.model = build_tiny_model(place / "model", width=64)
        recipe.write_text(RECIPE.format(data=place / "rows", **vars(args)), encoding="utf-8")
    run, compared = place / "run", place / "compared"
    done = silotune.run(resume=run) if run.exists() else silotune.run(recipe, out=run)
    sys.stdout.write(json.dumps({"conflict": done.summary.get("conflict")}) + "\n")
    sys.stdout.flush()
    if args.no_compare:
        return
    if compared.exists():
        found = silotune.compare(resume=compared).result
    else:
        found = silotune.compare(recipe, out=compared).result
    for metric in ("loss", "preference_accuracy", "reward_margin"):
        overall = found["overall"]
        means = {arm: bounds(score) for arm, score in overall["scores"][metric].items()}
        # "against" is FedAvg minus the arm
        apart = {arm: bounds(score) for arm, score in overall["against"][metric].items()}
        sys.stdout.write(json.dumps({metric: means, "FedAvg minus": apart}) + "\n")
    sys.stdout.write(json.dumps({"worse_off": found["worse_off"]}) + "\n")


if __name__ == "__main__":
    main()
