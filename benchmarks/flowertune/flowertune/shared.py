"""What both apps need: the job, the model, and the way from a round to a learning rate."""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel


@dataclass(frozen=True)
class Job:
    """One run, as `benchmarks/peers.py` writes it."""

    base: str
    """Folder of the base model."""
    rows: str
    """JSON lines with client, prompt and completion."""
    out: str
    """Folder for the adapter, the time of each round, and the seconds in training."""
    cohorts: list[list[str]]
    """The clients of each round."""
    num_clients: int
    steps: int
    batch_size: int
    max_length: int
    lr_max: float
    lr_min: float
    rank: int
    alpha: int
    dropout: float
    seed: int
    tuned: bool
    """Not as published: the base is kept between messages, in bfloat16 where the processor has it,
    and activations are kept."""
    bfloat16: bool

    @classmethod
    def read(cls, path: Any) -> Self:
        """From its file."""
        return cls(**json.loads(Path(str(path)).read_text()))

    def lr(self, round_: int) -> float:
        """FlowerTune's cosine over the rounds, which counts them from 1."""
        share = (1 + math.cos(math.pi * round_ / len(self.cohorts))) / 2
        return self.lr_min + (self.lr_max - self.lr_min) * share


def _load(job: Job) -> PreTrainedModel:
    dtype = torch.bfloat16 if job.tuned and job.bfloat16 else torch.float32
    return AutoModelForCausalLM.from_pretrained(job.base, dtype=dtype)


@functools.cache
def _wrapped(job_path: str) -> PeftModel:
    return _new(Job.read(job_path))


def _new(job: Job) -> PeftModel:
    model = _load(job)
    if not job.tuned:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    config = LoraConfig(
        r=job.rank,
        lora_alpha=job.alpha,
        lora_dropout=job.dropout,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(job.seed)
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.config.use_cache = False
    return model


def model_of(job_path: str, job: Job) -> PeftModel:
    """The base with an adapter: as published, loaded for every message."""
    return _wrapped(job_path) if job.tuned else _new(job)
