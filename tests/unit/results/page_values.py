"""Values for the pages of a run and a comparison, with harmful names."""

from silotune.recipes.parse import parse

HOSTILE = (
    "<script>alert(1)</script>",
    "St. Mary's Memorial Hospital & Research Centre of the Upper Rhine Valley",
    "W" * 60,
    "n" * 60,
    "東京大学医学部附属病院",
    "$x_1^2$",
    "_underscore #010203 font-family: x; ",
    '"><img src=x onerror=alert(2)>',
)
ARMS = ("base", "local", "federated", "federated: fedprox", "centralized", "only A")
VERDICTS = ("gained", "lost", "no clear difference", "too few rows")
ROUNDS = 3


def recipe():
    return parse({"rounds": ROUNDS, "data": {"path": "medquad_mini"}})


def split_of(names, *, num_labels=0):
    return {
        name: {
            "num_train": 40 + i,
            "num_eval": 8,
            "tokens": {"p5": 9, "p25": 30, "p50": 60.5, "p75": 90, "p95": 200, "max": 512},
            "labels": {f"label {j}": 1 + (i + j) % 7 for j in range(num_labels)},
        }
        for i, name in enumerate(names)
    }


def summary_of(names, *, worse=()):
    return {
        "algorithm": "fedavg",
        "rounds": ROUNDS,
        "result_round": ROUNDS,
        "clients": {
            name: {
                "base_loss": 2.5,
                "federated_loss": 2.6 if name in worse else 2.25,
                "num_train": 40,
                "num_eval": 8,
            }
            for name in names
        },
        "overall": {"base_loss": 2.5, "federated_loss": 2.3},
        "bytes_up": 1_800_000,
        "bytes_down": 2_400_000,
        "tokens_trained": 1726,
        "seconds_training": 61.0,
        "seconds_total": 75.0,
        "base_model_loads": 1,
        "peak_memory_bytes": 504_393_728,
        "adapter_sha256": "59" * 32,
    }


def rows_of(names):
    """Rows as in rounds.py: each adapter is scored, each round trains."""
    rows = []
    for r in range(ROUNDS + 1):
        for i, name in enumerate(names):
            at = {"round": r, "client": name, "status": "ok", "num_tokens": 100 + i}
            down = 3_000 if r == ROUNDS else 0
            loss = 2.5 - 0.1 * r + 0.05 * i
            rows.append({"event": "evaluate", **at, "loss": loss, "bytes_down": down})
            if r:
                cost = {"bytes_down": 3_000, "bytes_up": 2_500}
                times = {"seconds_training": 4.0 + i, "seconds": 5.5 + i}
                rows.append({"event": "train", **at, "train_loss": loss - 0.2, **cost, **times})
        if r:
            rows.append({"event": "round", "round": r, "num_asked": len(names), "seconds": 9.0})
    return rows


def provenance():
    return {
        "run": "runs/one",
        "base": {
            "name": "smollm2-135m-instruct",
            "description": "SmolLM2 135M Instruct",
            "sha256": "c2" * 32,
            "revision": None,
        },
        "data": {"path": "medquad_mini", "sha256": "2f" * 32},
        "device": "cpu",
        "dtype": "bfloat16",
        "threads": 2,
        "python": "3.11.7",
        "machine": "x86_64",
        "versions": {"silotune": "0.1.0", "torch": "2.13.0"},
    }


def samples_of(names):
    return [
        {
            "client": name,
            "question": "What is <b>this</b>?",
            "reference": "</pre><script>alert(3)</script>",
            "answers": {"base": "x" * 300, "federated": "An answer.\nIn two lines."},
        }
        for name in names
    ]


def comparison_of(names, *, arms=ARMS):
    def numbers(i):
        def interval(mean):
            return {"mean": mean, "low": mean - 0.11, "high": mean + 0.07}

        scores = {arm: interval(2.2 - 0.05 * j + 0.02 * i) for j, arm in enumerate(arms)}
        compared = [arm for arm in arms if arm != "local"]
        return {
            "scores": {"loss": scores, "rougeL": scores},
            "differences": {
                key: {
                    arm: interval(-0.1 + 0.05 * ((i + j) % 4)) for j, arm in enumerate(compared, -1)
                }
                for key in ("loss", "rougeL")
            },
            "verdicts": {
                key: {arm: VERDICTS[(i + j) % 4] for j, arm in enumerate(compared, -1)}
                for key in ("loss", "rougeL")
            },
        }

    cost = {"tokens": 120_000, "examples": 400, "steps": 50, "seconds": 80.0}
    loss = {"label": "held-out loss", "unit": "nats per token", "lower_is_better": True}
    rouge = {"label": "ROUGE-L", "unit": "mean F", "lower_is_better": False}
    return {
        "seeds": [17, 18, 19],
        "base_name": "smollm2-135m-instruct",
        "result": "federated",
        "metrics": {"loss": {**loss, "digits": 3}, "rougeL": {**rouge, "digits": 3}},
        "arms": {arm: {**cost, "bytes_up": 921_600, "bytes_down": 1_843_200} for arm in arms},
        "clients": {
            name: {"num_train": 40, "num_eval": 8, **numbers(i)} for i, name in enumerate(names)
        },
        "overall": numbers(0),
        "worse_off": {"federated: fedprox": [names[0]], "federated": [names[-1]]},
        "notes": ["3 seeds; a verdict from fewer than 5 is weak evidence"],
    }
