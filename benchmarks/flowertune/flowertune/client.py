"""A client: load its rows and the model, set the adapter, train, answer with the adapter."""

import json
import time
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoTokenizer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from flowertune.shared import Job, model_of

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round at one client."""
    path = str(context.run_config["job"])
    job, config = Job.read(path), cast(Any, message.content["config"])
    client, round_ = config["client"], config["server-round"]
    with Path(job.rows).open() as lines:
        rows = [row for row in map(json.loads, lines) if row["client"] == client]
    tokenizer = AutoTokenizer.from_pretrained(job.base, padding_side="right")
    tokenizer.pad_token = tokenizer.eos_token
    model = model_of(path, job)
    set_peft_model_state_dict(model, cast(Any, message.content["arrays"]).to_torch_state_dict())
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
    answer = RecordDict(
        {
            "arrays": ArrayRecord(get_peft_model_state_dict(model)),
            "metrics": MetricRecord(
                {
                    "train_loss": done.training_loss,
                    "num-examples": len(rows),
                    "seconds": seconds,
                }
            ),
        }
    )
    return Message(content=answer, reply_to=message)
