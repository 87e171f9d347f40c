"""TRL as an oracle of the local step: on the same ids and mask, the same loss and gradients."""

import pytest
import torch

from silotune.data.preferences import preference
from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig
from silotune.models.loading import load_model, read_adapter, write_adapter
from silotune.training.known_tokens import prepare_rows
from silotune.training.tasks.instruct import INSTRUCT, collate, prepare
from silotune.training.tasks.prefer import PreferConfig, prefer

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


PAIRS = [
    {"prompt": "Why?", "chosen": "So it is.", "rejected": "No."},
    {"prompt": "What is a1?", "chosen": "It is a1, yes.", "rejected": "A longer answer. " * 3},
    {"prompt": "Hm", "chosen": "Yes", "rejected": "Not at all"},
]
LOSSES = {
    "dpo": ({}, {"loss_type": "sigmoid"}, 3),
    "dpo, beta 2": ({"beta": 2.0}, {"loss_type": "sigmoid", "beta": 2.0}, 3),
    "dpo of means": ({"length_normalized": True}, {"loss_type": "sigmoid_norm"}, 3),
    # theirs is always of means, which ours is on demand
    "ipo of means": ({"loss": "ipo", "length_normalized": True}, {"loss_type": "ipo"}, 3),
    # theirs is a mean over the tokens of all pairs, ours over each pair's: equal for one pair
    "with likelihood": (
        {"nll_weight": 0.7},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]},
        1,
    ),
}


# transformers 5.23 warns of the name that trl 1.16 itself defines
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(("mine", "theirs", "num_pairs"), LOSSES.values(), ids=LOSSES)
def test_loss_and_gradients_of_pairs_equal_those_of_dpo_trainer(
    loaded, tmp_path, mine, theirs, num_pairs
):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    task = prefer(PreferConfig(**mine))
    rows = [preference(row, where="x") for row in PAIRS[:num_pairs]]
    trained = {name: 8 * t for name, t in read_adapter(loaded).items()}
    examples = prepare_rows(rows, task, loaded, 512).examples
    # their reference is a copy of the adapter as it is when the trainer is built: here the base
    write_adapter(loaded, {n: t * ("lora_A" in n) for n, t in trained.items()})

    def sides(example):
        """Their form: the prompt once, and of each answer the tokens that are learned."""
        found = {}
        for which, name in enumerate(("chosen_ids", "rejected_ids")):
            at = example.segments == which
            ids, trained = example.ids[at], example.trained[at]
            first = int(trained.nonzero()[0])
            found |= {"prompt_ids": ids[:first].tolist(), name: ids[trained].tolist()}
        return found

    args = DPOConfig(
        output_dir=str(tmp_path),
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        per_device_train_batch_size=len(rows),
        **theirs,
    )
    trainer = DPOTrainer(
        model=loaded.model,
        args=args,
        train_dataset=Dataset.from_list(PAIRS[:num_pairs]),
        processing_class=loaded.tokenizer,
    )
    assert "ref" in trainer.model.peft_config
    write_adapter(loaded, trained)
    batch = task.collate(examples)
    out = task.loss(loaded, batch)
    ours = out.loss_sum / batch.num_terms
    ours.backward()
    our_gradients = gradients(loaded)

    inputs = trainer.data_collator([sides(example) for example in examples])
    loaded.model.train()
    their_loss = trainer.compute_loss(loaded.model, inputs)
    their_loss.backward()
    their_gradients = gradients(loaded)

    # the logs of a sequence add up to a hundred nats, of which float32 keeps five digits
    assert float(ours.detach()) == pytest.approx(float(their_loss.detach()), rel=1e-4)
    for name, gradient in our_gradients.items():
        error = (gradient - their_gradients[name]).norm() / their_gradients[name].norm()
        assert float(error) < 1e-4, name
    assert float(out.pairs.margins.abs().max()) > 5e-4, "or the loss would say nothing"
    margins = trainer._metrics["train"]["rewards/margins"][-1]
    if "length_normalized" not in mine:
        assert float(out.pairs.margins.mean()) == pytest.approx(float(margins), abs=1e-4)
