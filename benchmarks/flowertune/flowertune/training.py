"""One round at one client: its rows, the model, the trainer. Shared with benchmarks/flare."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from datasets import Dataset
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoTokenizer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from flowertune.shared import Job, model_of


def trained(
    path: str, job: Job, client: str, round_: int, adapter: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], int, float, float]:
    """Set the adapter and train.

    Returns:
        The trained adapter, the number of the client's rows, the seconds inside the training loop,
        and the training loss.
    """
    with Path(job.rows).open() as lines:
        rows = [row for row in map(json.loads, lines) if row["client"] == client]
    tokenizer = AutoTokenizer.from_pretrained(job.base, padding_side="right")
    tokenizer.pad_token = tokenizer.eos_token
    model = model_of(path, job)
    set_peft_model_state_dict(model, dict(adapter))
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=SFTConfig(
            output_dir=f"{job.out}/trainer/{client}",
            learning_rate=job.lr(round_),
            lr_scheduler_type="constant",
            per_device_train_batch_size=job.batch_size,
            max_steps=job.steps,
            max_length=job.max_length,
            gradient_checkpointing=not job.tuned,
            bf16=False,  # the default of the version that was published; here the base decides
            use_cpu=not torch.cuda.is_available(),
            seed=job.seed,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(
            [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
        ),
    )
    began = time.perf_counter()
    done = trainer.train()
    seconds = time.perf_counter() - began
    return dict(get_peft_model_state_dict(model)), len(rows), seconds, done.training_loss
