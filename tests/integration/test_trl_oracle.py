"""TRL as an oracle of the local step: on the same ids and mask, the same loss and gradients."""

import pytest
import torch

from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig
from silotune.models.loading import load_model
from silotune.training.tasks.instruct import INSTRUCT, collate, prepare

ROWS = [
    ({"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}),
    (
        {"role": "user", "content": "What is a1?"},
        {"role": "assistant", "content": "It is a1, yes."},
    ),
    ({"role": "user", "content": "Hm"}, {"role": "assistant", "content": "A longer answer. " * 3}),
]


@pytest.fixture
def loaded(tiny_model):
    adapter = AdapterConfig(rank=2, alpha=4, dropout=0.0, targets=("q_proj", "v_proj"))
    model = load_model(
        ModelConfig(name=str(tiny_model), dtype="float32"), adapter, seed=1, device="cpu"
    )
    gen = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters.values():
            p.copy_(torch.randn(p.shape, generator=gen) * 0.1)
    return model


def gradients(loaded):
    found = {name: p.grad.clone() for name, p in loaded.parameters.items()}
    loaded.model.zero_grad()
    return found


# transformers 5.23 warns of the name that trl 1.16 itself defines
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_loss_and_gradients_equal_those_of_sft_trainer(loaded, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    examples = prepare(ROWS, loaded.tokenizer, 512).examples
    batch = collate(examples)
    ours = INSTRUCT.loss(loaded, batch).loss_sum / batch.num_trained
    ours.backward()
    our_gradients = gradients(loaded)

    rows = [
        {"input_ids": e.ids.tolist(), "completion_mask": e.trained.int().tolist()} for e in examples
    ]
    args = SFTConfig(
        output_dir=str(tmp_path),
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        loss_type="nll",
        completion_only_loss=True,
        report_to="none",
        per_device_train_batch_size=len(rows),
    )
    trainer = SFTTrainer(
        model=loaded.model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=loaded.tokenizer,
    )
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    # the end token is learned there too, although it is the padding token
    assert (inputs["labels"] == loaded.tokenizer.eos_token_id).sum() == len(rows)
    loaded.model.train()
    theirs = trainer.compute_loss(loaded.model, inputs)
    theirs.backward()
    their_gradients = gradients(loaded)

    # the mean over trained tokens of the batch, token by token the same ids and mask
    assert torch.equal(inputs["input_ids"][0][: examples[0].ids.numel()], examples[0].ids)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-4)
    for name, gradient in our_gradients.items():
        error = (gradient - their_gradients[name]).norm() / their_gradients[name].norm()
        assert float(error) < 1e-4, name
