"""Classification: what a row becomes, its loss and scores, and the head that gives labels."""

import json
import math
import shutil
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import silotune
from silotune.core.algorithm import LocalContext, LocalRule
from silotune.core.errors import ConfigError, ModelError
from silotune.core.tree import sha256
from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig, quiet_libraries
from silotune.models.heads import Head, draw_head
from silotune.models.loading import (
    LoadedModel,
    base_only,
    load_model,
    read_adapter,
    renew_adapter,
    save_adapter,
    write_adapter,
)
from silotune.recipes.parse import parse
from silotune.training.loop import TrainConfig, train
from silotune.training.scoring import build_eval_batches, evaluate, score_each
from silotune.training.tasks.base import Example
from silotune.training.tasks.classify import classify, collate, loss, padding_id, predictions
from tests.conftest import build_tiny_model, build_tokenizer, write_jsonl
from tests.tiny_encoders import build_encoder_tokenizer, build_tiny_encoder

LABELS = ("no", "maybe", "yes")
TASK = classify(LABELS)
FAMILIES = ("bert", "distilbert", "roberta", "llama")
TARGETS = {"distilbert": ("q_lin", "v_lin"), "llama": ("q_proj", "v_proj")}
HEADS = {
    "bert": ("classifier",),
    "distilbert": ("pre_classifier", "classifier"),
    "roberta": ("classifier",),
    "llama": ("score",),
}
ROWS = [
    {"text": "ab" * (1 + 7 * i % 11) + chr(97 + i), "label": LABELS[(2 * i + i // 4) % 3]}
    for i in range(12)
]
PAIRS = [{"text": r["text"], "text_pair": "why " + r["text"][::-1], "label": "no"} for r in ROWS]


@dataclass(frozen=True)
class Shelf:
    """Tiny models on disk, each built on first use."""

    place: Path

    def __call__(self, family: str, name: str | None = None, **more) -> Path:
        folder = self.place / (name or family)
        if not folder.exists():
            with quiet_libraries():
                if family == "llama":
                    build_tiny_model(folder)
                else:
                    build_tiny_encoder(folder, family, **more)
        return folder

    def copy(self, family: str, name: str, **settings_) -> Path:
        """The same with other settings in its config.json."""
        folder = self.place / name
        shutil.copytree(self(family), folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings_))
        return folder


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("classify"))


def load(folder: Path, family: str = "bert", *, seed=1, dtype="float32", labels=LABELS, **adapter):
    model = ModelConfig(name=str(folder), dtype=dtype)
    return load_model(model, lora(family, **adapter), seed=seed, device="cpu", labels=labels)


def lora(family: str, **adapter) -> AdapterConfig:
    return AdapterConfig(
        **{"rank": 2, "alpha": 4, "targets": TARGETS.get(family, ("query", "value"))} | adapter
    )


@pytest.fixture(scope="module")
def models(shelf) -> dict[str, LoadedModel]:
    """For tests that change nothing; moved away from the start, so that the adapter matters."""
    found = {family: load(shelf(family), family) for family in FAMILIES}
    for loaded in found.values():
        scatter(loaded)
    return found


def scatter(loaded: LoadedModel) -> None:
    gen = torch.Generator().manual_seed(4)
    state = read_adapter(loaded)
    write_adapter(loaded, {n: t + torch.randn(t.shape, generator=gen) for n, t in state.items()})


def prepared(loaded: LoadedModel, rows=ROWS, max_length: int = 128):
    return TASK.prepare(rows, loaded.tokenizer, max_length).examples


def logits_of(loaded: LoadedModel, rows=ROWS) -> torch.Tensor:
    with torch.no_grad():
        return loss(loaded, collate(prepared(loaded, rows))).logits


def learn(loaded: LoadedModel, steps: int = 1, rows=ROWS, **settings_):
    batch = collate(prepared(loaded, rows))
    cfg = TrainConfig(**{"clip_norm": 0} | settings_)
    context = LocalContext(read_adapter(loaded), {}, {})
    return train(
        loaded, [[batch]] * steps, TASK, cfg, LocalRule(), context, round_=1, lr=1e-2, seed=5
    )


def plain_model(folder: Path, **more):
    """What anyone without silotune would load."""
    from transformers import AutoModelForSequenceClassification

    with quiet_libraries():
        return AutoModelForSequenceClassification.from_pretrained(folder, **more).eval()


# --- rows


def test_an_example_is_what_the_tokenizer_makes_of_the_text_with_its_special_tokens(models):
    tokenizer = models["bert"].tokenizer
    found = TASK.prepare(ROWS, tokenizer, 128)
    for row, example in zip(ROWS, found.examples, strict=True):
        assert tokenizer.decode(example.ids) == f"[CLS]{row['text']}[SEP]"
        assert LABELS[example.label] == row["label"]
        assert not example.trained.any()
    assert found.rows == tuple(range(len(ROWS)))
    assert (found.num_cut, found.num_dropped) == (0, 0)


def test_no_rows_make_no_examples(models):
    found = TASK.prepare([], models["bert"].tokenizer, 128)
    assert (found.examples, found.num_cut, found.rows) == ((), 0, ())


def test_a_pair_tells_bert_which_text_a_token_belongs_to():
    (example,) = TASK.prepare(PAIRS[:1], build_encoder_tokenizer("bert"), 128).examples
    first, second = len(PAIRS[0]["text"]) + 2, len(PAIRS[0]["text_pair"]) + 1
    assert example.segments is not None
    assert example.segments.tolist() == [0] * first + [1] * second


@pytest.mark.parametrize(("family", "rows"), [("roberta", PAIRS), ("bert", ROWS)])
def test_segments_are_absent_where_they_say_nothing(family, rows):
    found = TASK.prepare(rows, build_encoder_tokenizer(family), 128).examples
    assert all(example.segments is None for example in found)


def test_a_pair_in_a_batch_has_the_logits_of_transformers_own_encoding(models):
    loaded = models["bert"]
    for row, ours in zip(PAIRS, logits_of(loaded, PAIRS), strict=True):
        own = loaded.tokenizer(row["text"], row["text_pair"], return_tensors="pt")
        with torch.no_grad():
            torch.testing.assert_close(ours, loaded.model(**own).logits[0])


def test_the_order_of_a_pair_and_its_segments_matter_to_bert(models):
    batch = collate(prepared(models["bert"], PAIRS))
    with torch.no_grad():
        marked = loss(models["bert"], batch).logits
        unmarked = loss(models["bert"], collate([unsegmented(e) for e in batch_of(PAIRS)])).logits
    assert not torch.allclose(marked, unmarked, atol=1e-3)


def batch_of(rows) -> tuple[Example, ...]:
    return TASK.prepare(rows, build_encoder_tokenizer("bert"), 128).examples


def unsegmented(example: Example) -> Example:
    return Example(example.ids, example.trained, label=example.label)


def text_of(length: int, paired: bool) -> dict[str, str]:
    row = {"text": "a" * length, "label": LABELS[length % 3]}
    return {**row, "text_pair": "b" * length} if paired else row


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    limit=st.integers(6, 30),
    paired=st.booleans(),
)
def test_long_rows_are_truncated_by_the_tokenizer_and_keep_their_last_special_token(
    lengths, limit, paired
):
    tokenizer = build_encoder_tokenizer()
    rows = [text_of(n, paired) for n in lengths]
    whole = [n * (1 + paired) + 2 + paired for n in lengths]
    assert TASK.num_tokens(rows, tokenizer) == whole
    found = TASK.prepare(rows, tokenizer, limit)
    assert found.num_cut == sum(n > limit for n in whole)
    assert found.num_dropped == 0
    for example, n in zip(found.examples, whole, strict=True):
        assert example.ids.numel() == min(n, limit)
        assert example.ids[-1] == tokenizer.sep_token_id
        assert (example.ids == tokenizer.sep_token_id).sum() == 1 + paired


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5), paired=st.booleans())
def test_a_batch_is_padded_on_the_right_and_has_one_target_a_row(lengths, paired):
    rows = [text_of(n, paired) for n in lengths]
    examples = batch_of(rows)
    batch = collate(examples)
    longest = max(e.ids.numel() for e in examples)
    assert batch.ids.shape == batch.mask.shape == (len(rows), longest)
    assert batch.targets.tolist() == [n % 3 for n in lengths]
    assert batch.positions.tolist() == [i * longest for i in range(len(rows))]
    assert batch.num_trained == len(rows)
    assert batch.num_real_tokens == sum(e.ids.numel() for e in examples)
    assert (batch.segments is not None) == paired
    for i, example in enumerate(examples):
        n = example.ids.numel()
        assert batch.mask[i].tolist() == [True] * n + [False] * (longest - n)
        assert torch.equal(batch.ids[i, :n], example.ids)
        if paired:
            assert torch.equal(batch.segments[i, :n], example.segments)
            assert not batch.segments[i, n:].any()


# --- the loss of a batch


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_transformers_own_times_the_rows(models, family):
    loaded = models[family]
    batch = collate(prepared(loaded))
    with torch.no_grad():
        own = loaded.model(
            input_ids=batch.ids.masked_fill(~batch.mask, padding_id(loaded.tokenizer)),
            attention_mask=batch.mask,
            labels=batch.targets,
        )
        out = loss(loaded, batch)
    torch.testing.assert_close(out.loss_sum, own.loss * len(ROWS))
    torch.testing.assert_close(out.logits, own.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rows_logits_do_not_depend_on_what_it_is_padded_with(models, family):
    loaded = models[family]
    together = logits_of(loaded)
    alone = torch.cat([logits_of(loaded, [row]) for row in ROWS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone[:-1], alone[1:], atol=1e-3)  # and the rows differ


@pytest.mark.parametrize("padding", [None, 40])
def test_a_decoder_reads_its_last_token_whatever_padding_its_config_names(shelf, padding):
    """Many public decoders name one padding token in the config and another in the tokenizer."""
    folder = shelf.copy("llama", f"llama-pads-{padding}", pad_token_id=padding)
    loaded = load(folder, "llama")
    together = logits_of(loaded)
    alone = torch.cat([logits_of(loaded, [row]) for row in ROWS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_attentions_are_those_of_every_layer(shelf, models):
    batch = collate(prepared(models["bert"]))
    loaded = load(shelf("bert"))
    loaded.model.get_base_model().set_attn_implementation("eager")
    found = loss(loaded, batch, attentions=True).attentions
    rows, length = batch.ids.shape
    assert [a.shape for a in found] == [(rows, 2, length, length)] * 2
    assert loss(loaded, batch).attentions == ()


def test_a_tokenizer_with_an_end_token_only_pads_with_it():
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    assert padding_id(tokenizer) == tokenizer.eos_token_id


def test_a_tokenizer_without_padding_and_end_token_is_refused(shelf):
    folder = shelf.copy("llama", "llama-endless", pad_token_id=None, eos_token_id=None)
    bare = build_tokenizer()
    bare.eos_token = bare.pad_token = None
    bare.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"neither a padding nor an end token[\s\S]*pad_token"):
        logits_of(load(folder, "llama"), ROWS[:2])


@pytest.mark.parametrize(("family", "rows"), [("bert", ROWS), ("bert", PAIRS), ("llama", ROWS)])
def test_predictions_are_the_probabilities_of_what_was_trained(models, family, rows):
    loaded = models[family]
    unlabelled = [{k: text for k, text in row.items() if k != "label"} for row in rows]
    expected = logits_of(loaded, rows).softmax(-1)
    torch.testing.assert_close(predictions(loaded, unlabelled, 128), expected)


# --- scores


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_counts_are_those_of_scikit_learns_confusion_matrix(models, family):
    from sklearn.metrics import confusion_matrix

    loaded = models[family]
    examples = prepared(loaded)
    score = scored(loaded, examples, 5)
    true = [e.label for e in examples]
    matrix = confusion_matrix(true, logits_of(loaded).argmax(-1), labels=range(len(LABELS)))
    expected = [(matrix[i, i], matrix[:, i].sum(), matrix[i].sum()) for i in range(len(LABELS))]
    assert [tuple(row) for row in score.label_counts] == expected
    assert score.num_correct == matrix.trace()
    assert (score.client, score.num_tokens, score.num_examples) == ("north", len(ROWS), len(ROWS))


def scored(loaded, examples, batch_size):
    batches = build_eval_batches(examples, TASK, batch_size)
    return evaluate(loaded, batches, TASK, client="north", num_examples=len(examples))


def test_the_loss_is_a_sum_over_rows_whatever_the_batch_size(models):
    loaded = models["bert"]
    examples = prepared(loaded)
    nll = F.cross_entropy(logits_of(loaded), torch.tensor([e.label for e in examples]))
    found = [scored(loaded, examples, size) for size in (1, 5, 100)]
    for score in found:
        assert score.loss_sum == pytest.approx(float(nll) * len(ROWS), rel=1e-5)
        assert score.label_counts == found[0].label_counts


def test_rows_scored_one_by_one_add_up_to_the_evaluation(models):
    loaded = models["llama"]
    examples = prepared(loaded)
    whole, rows = scored(loaded, examples, 4), score_each(loaded, examples, TASK, batch_size=5)
    assert math.fsum(r.loss_sum for r in rows) == pytest.approx(whole.loss_sum, rel=1e-5)
    assert [r.num_tokens for r in rows] == [1] * len(ROWS)
    assert [r.true for r in rows] == [e.label for e in examples]
    assert [r.given for r in rows] == logits_of(loaded).argmax(-1).tolist()
    right = [sum(r.given == r.true == n for r in rows) for n in range(len(LABELS))]
    assert [counts[0] for counts in whole.label_counts] == right


# --- where the head is, and what it starts with


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_what_is_outside_the_encoder_or_decoder(models, family):
    loaded = models[family]
    assert loaded.head_modules is not None
    assert loaded.head_modules.modules == HEADS[family]
    assert loaded.head == {n for n in loaded.parameters if "lora_" not in n}


def test_a_pooler_that_the_files_lack_is_part_of_the_head(shelf, tmp_path):
    """As in a BERT that was saved after pretraining on masked words."""
    folder = shelf("bert", "bert-without-pooler", kind="AutoModelForMaskedLM")
    loaded = load(folder)
    assert loaded.head_modules is not None
    assert loaded.head_modules.modules == ("classifier", "bert.pooler")
    pooler = {n for n in loaded.head if "pooler" in n}
    assert len(pooler) == 2
    assert len(loaded.head) == 4
    before = read_adapter(loaded)
    learn(loaded)
    assert all(
        not torch.equal(before[n], t) for n, t in read_adapter(loaded).items() if n in pooler
    )
    check_peft_folder(loaded, folder, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("family", "tensor"),
    [
        ("bert", "bert.encoder.layer.1"),
        ("roberta", "roberta.encoder.layer.1"),
        ("distilbert", "distilbert.transformer.layer.1"),
    ],
)
def test_files_that_lack_a_layer_are_refused_and_the_tensor_is_named(shelf, family, tensor):
    folder = shelf(family, f"{family}-halved", num_layers=1)
    config = json.loads((folder / "config.json").read_text())
    key = "n_layers" if family == "distilbert" else "num_hidden_layers"
    (folder / "config.json").write_text(json.dumps(config | {key: 2}))
    with pytest.raises(ModelError, match=rf"the files lack \d+ tensors \('{tensor}"):
        load(folder, family)


def test_files_of_another_shape_are_refused_and_the_tensor_is_named(shelf):
    """Sizes may differ in a head for other labels, and nowhere else."""
    folder = shelf.copy("bert", "bert-widened", vocab_size=999)
    with pytest.raises(ModelError, match=r"'bert.embeddings.word_embeddings.weight'"):
        load(folder)


@pytest.fixture(scope="module")
def with_head(shelf) -> Path:
    """A DistilBERT that somebody trained on three labels."""
    return shelf("distilbert", "with-head", kind="AutoModelForSequenceClassification", num_labels=3)


def test_a_head_for_as_many_labels_is_kept(with_head):
    loaded = load(with_head, "distilbert")
    files = load_file(with_head / "model.safetensors")
    assert loaded.head_modules is not None
    assert loaded.head_modules.modules == HEADS["distilbert"]
    assert loaded.head_modules.fresh == ()
    for name, tensor in plain_head(loaded).items():
        assert torch.equal(tensor, files[name])


def test_a_head_for_another_number_of_labels_is_drawn_anew(with_head):
    two = load(with_head, "distilbert", labels=("no", "yes"))
    files = load_file(with_head / "model.safetensors")
    assert two.head_modules is not None
    assert two.head_modules.fresh == ("classifier.bias", "classifier.weight")
    found = plain_head(two)
    assert found["classifier.weight"].shape == (2, 16)
    assert torch.equal(found["pre_classifier.weight"], files["pre_classifier.weight"])
    again = plain_head(load(with_head, "distilbert", labels=("no", "yes")))
    assert torch.equal(found["classifier.weight"], again["classifier.weight"])


def plain_head(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    state = read_adapter(loaded)
    return {name.removeprefix("base_model.model."): state[name] for name in loaded.head}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_head_is_the_seeds_and_of_the_configs_spread(shelf, family):
    first, again, other = (plain_head(load(shelf(family), family, seed=s)) for s in (1, 1, 2))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        if name.endswith("bias"):
            assert not tensor.any()
        else:
            assert not torch.equal(tensor, other[name])
    drawn = torch.cat([t.flatten() for n, t in first.items() if not n.endswith("bias")])
    spread = 0.02 if family == "llama" else 0.2
    assert 0.8 * spread < float(drawn.std()) < 1.2 * spread


def test_every_kind_and_dtype_begins_with_the_same_head(shelf):
    wanted = plain_head(load(shelf("roberta"), "roberta"))
    full = plain_head(load(shelf("roberta"), "roberta", kind="full"))
    half = plain_head(load(shelf("roberta"), "roberta", dtype="bfloat16"))
    for name, tensor in wanted.items():
        assert torch.equal(full[name], tensor)
        torch.testing.assert_close(half[name], tensor, rtol=1e-2, atol=1e-6)


def test_a_new_norm_begins_as_one_that_changes_nothing():
    """As in the heads of ModernBERT."""
    base = nn.Sequential(OrderedDict(dense=nn.Linear(2, 2), norm=nn.LayerNorm(2)))
    base.config = SimpleNamespace()
    fresh = tuple(sorted(dict(base.named_parameters())))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.fill_(math.nan)
    draw_head(base, Head(("dense", "norm"), fresh), 1)
    assert base.norm.weight.tolist() == [1, 1]
    assert base.norm.bias.tolist() == base.dense.bias.tolist() == [0, 0]
    assert 0 < float(base.dense.weight.detach().abs().max()) < 0.1


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_loading_leaves_the_global_generator_alone(shelf, kind):
    before = torch.get_rng_state()
    load(shelf("bert"), kind=kind)
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_a_base_without_head_prints_nothing(shelf, with_head, capfd):
    load(shelf("bert", "bert-without-pooler", kind="AutoModelForMaskedLM"))
    load(with_head, "distilbert", labels=("no", "yes"))
    assert capfd.readouterr() == ("", "")


# --- another seed's adapter on the base in memory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_renewed_adapter_is_bit_for_bit_that_of_a_fresh_load(shelf, family, dtype):
    renewed = load(shelf(family), family, dtype=dtype)
    learn(renewed, 2)
    for seed in (2, 3):
        renewed = renew_adapter(renewed, lora(family), seed=seed)
        check_same(renewed, load(shelf(family), family, dtype=dtype, seed=seed))
        learn(renewed)


def check_same(ours: LoadedModel, wanted: LoadedModel) -> None:
    mine, theirs = ours.model.state_dict(), wanted.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert ours.parameters.keys() == wanted.parameters.keys()
    assert ours.head == wanted.head
    assert [n for n, t in theirs.items() if not torch.equal(mine[n].float(), t.float())] == []
    assert torch.equal(logits_of(ours), logits_of(wanted))
    assert [p.requires_grad for p in ours.model.parameters()] == [
        p.requires_grad for p in wanted.model.parameters()
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_from_the_checkpoint_is_restored_when_renewed(with_head, dtype):
    renewed = load(with_head, "distilbert", dtype=dtype)
    learn(renewed, 2)
    renewed = renew_adapter(renewed, lora("distilbert"), seed=2)
    check_same(renewed, load(with_head, "distilbert", dtype=dtype, seed=2))


@pytest.mark.parametrize("labels", [LABELS, ("no", "yes")])
def test_half_a_head_from_the_checkpoint_is_renewed_too(with_head, labels):
    rows = [row for row in ROWS if row["label"] in labels]
    task = classify(labels)
    renewed = load(with_head, "distilbert", labels=labels)
    batch = collate(task.prepare(rows, renewed.tokenizer, 128).examples)
    cfg, context = TrainConfig(), LocalContext({}, {}, {})
    train(renewed, [[batch]], task, cfg, LocalRule(), context, round_=1, lr=0.1, seed=5)
    renewed = renew_adapter(renewed, lora("distilbert"), seed=2)
    wanted = load(with_head, "distilbert", labels=labels, seed=2)
    assert sha256(read_adapter(renewed)) == sha256(read_adapter(wanted))


def test_renewing_a_frozen_head_gives_the_next_seeds(shelf):
    renewed = load(shelf("bert"), head="freeze")
    learn(renewed)
    renewed = renew_adapter(renewed, lora("bert", head="freeze"), seed=2)
    check_same(renewed, load(shelf("bert"), head="freeze", seed=2))


# --- what is trained and sent


@pytest.mark.parametrize("head", ["train", "freeze", "local"])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trained_tensors_are_the_adapter_or_the_body_and_a_head_that_is_not_frozen(
    shelf, family, kind, head
):
    loaded = load(shelf(family), family, kind=kind, head=head)
    plain = dict(plain_model(shelf(family), num_labels=3).named_parameters())
    heads = {n for n in plain if n.split(".")[0] in HEADS[family]}
    if kind == "lora":
        body = {n for n in loaded.parameters if "lora_A" in n or "lora_B" in n}
        assert len(body) == 2 * 2 * 2  # layers, targets, factors
        heads = {f"base_model.model.{n}" for n in heads}
    else:
        body = plain.keys() - heads
    heads = set() if head == "freeze" else heads
    assert loaded.parameters.keys() == body | heads
    assert loaded.head == heads
    assert all(p.requires_grad for p in loaded.parameters.values())
    assert sum(p.requires_grad for p in loaded.model.parameters()) == len(loaded.parameters)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_training_changes_adapter_and_head_and_lowers_the_loss(shelf, family, kind):
    loaded = load(shelf(family), family, kind=kind)
    before = read_adapter(loaded)
    learn(loaded)
    moved = {n for n, t in read_adapter(loaded).items() if not torch.equal(t, before[n])}
    if kind == "lora":  # lora_A learns once lora_B is no longer zero
        assert moved == {n for n in loaded.parameters if "lora_A" not in n}
    else:
        assert moved >= loaded.head
        assert len(moved) > len(loaded.head)
    first = scored(loaded, prepared(loaded), 100).loss_sum
    learn(loaded, 5)
    assert scored(loaded, prepared(loaded), 100).loss_sum < first


def test_a_step_counts_rows_and_not_tokens(shelf):
    loaded = load(shelf("llama"), "llama")  # no dropout
    examples = prepared(loaded)
    start = read_adapter(loaded)
    ends = []
    for parts in ([examples], [[e] for e in examples]):
        write_adapter(loaded, start)
        cfg = TrainConfig(optimizer="sgd", clip_norm=0)
        batches = [[collate(part) for part in parts]]
        context = LocalContext(dict(start), {}, {})
        done = train(loaded, batches, TASK, cfg, LocalRule(), context, round_=1, lr=0.5, seed=5)
        assert done.num_targets == len(ROWS)
        ends.append((done.train_loss, read_adapter(loaded)))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-5)
    for name, tensor in ends[0][1].items():
        torch.testing.assert_close(ends[1][1][name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_head_stays_bit_for_bit_and_is_saved_with_the_adapter(shelf, family, tmp_path):
    loaded = load(shelf(family), family, head="freeze")
    wanted = plain_head(load(shelf(family), family))
    learn(loaded, 3)
    saved = check_peft_folder(loaded, shelf(family), tmp_path / "adapter")
    for name, tensor in wanted.items():
        assert torch.equal(saved[f"base_model.model.{name}"], tensor)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_gives_a_plain_model_our_logits(shelf, family, tmp_path):
    loaded = load(shelf(family), family)
    learn(loaded, 3)
    saved = check_peft_folder(loaded, shelf(family), tmp_path / "adapter")
    assert saved.keys() == loaded.parameters.keys()


def check_peft_folder(loaded: LoadedModel, base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """PEFT alone, on a plain model with its own head, gives the same logits as ours."""
    from peft import PeftModel

    save_adapter(loaded, folder, base=ModelConfig(name="owner/base"))
    plain = plain_model(base, num_labels=len(LABELS))
    with quiet_libraries():
        theirs = PeftModel.from_pretrained(plain, str(folder)).eval()
    batch = collate(prepared(loaded))
    with torch.no_grad():
        own = theirs(
            input_ids=batch.ids.masked_fill(~batch.mask, padding_id(loaded.tokenizer)),
            attention_mask=batch.mask,
        ).logits
    torch.testing.assert_close(logits_of(loaded), own)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("owner/base", "SEQ_CLS")
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("head", ["train", "freeze"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fully_trained_model_is_saved_as_one_that_transformers_reads(
    shelf, family, head, tmp_path
):
    loaded = load(shelf(family), family, kind="full", head=head)
    learn(loaded, 2)
    save_adapter(loaded, tmp_path / "whole", base=ModelConfig(name="owner/base"))
    plain = plain_model(tmp_path / "whole")
    assert tuple(plain.config.id2label[n] for n in range(3)) == LABELS
    batch = collate(prepared(loaded))
    with torch.no_grad():
        own = plain(
            input_ids=batch.ids.masked_fill(~batch.mask, padding_id(loaded.tokenizer)),
            attention_mask=batch.mask,
        ).logits
    torch.testing.assert_close(logits_of(loaded), own)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_head_of_a_half_precision_base_trains_in_float32(shelf, family, kind):
    loaded = load(shelf(family), family, dtype="bfloat16", kind=kind)
    sent = loaded.parameters if kind == "lora" else {n: loaded.parameters[n] for n in loaded.head}
    assert {p.dtype for p in sent.values()} == {torch.float32}
    body = [p for n, p in loaded.model.named_parameters() if "embed" in n]
    assert {p.dtype for p in body} == {torch.bfloat16}
    assert logits_of(loaded).dtype == torch.float32
    before = read_adapter(loaded)
    assert math.isfinite(learn(loaded, 2).train_loss)
    after = read_adapter(loaded)
    assert all(not torch.equal(before[n], after[n]) for n in loaded.head)


def test_a_pooler_in_the_head_of_a_half_precision_base_trains_in_float32(shelf):
    folder = shelf("bert", "bert-without-pooler", kind="AutoModelForMaskedLM")
    loaded = load(folder, dtype="bfloat16")
    assert {p.dtype for p in loaded.parameters.values()} == {torch.float32}
    assert math.isfinite(learn(loaded, 2).train_loss)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_alone_has_neither_adapter_nor_trained_head(shelf, family, dtype):
    loaded = load(shelf(family), family, dtype=dtype)
    first = logits_of(loaded)  # the first lora_B is zero
    scatter(loaded)
    trained = logits_of(loaded)
    assert not torch.allclose(trained, first, atol=1e-2)
    with base_only(loaded):
        near = {} if dtype == "float32" else {"rtol": 0.1, "atol": 0.05}
        torch.testing.assert_close(logits_of(loaded), first, **near)
    assert torch.equal(logits_of(loaded), trained)


def test_a_frozen_head_needs_no_gradients_after_the_base_was_asked(shelf):
    loaded = load(shelf("bert"), head="freeze")
    with base_only(loaded):
        logits_of(loaded)
    learning = [n for n, p in loaded.model.named_parameters() if p.requires_grad]
    assert [n for n in learning if "lora_" not in n] == []


def test_a_target_that_is_also_in_the_head_gets_factors_in_the_body_only(shelf, tmp_path):
    loaded = load(shelf("roberta"), "roberta", targets=("query", "dense"))
    assert {n.rpartition("classifier.")[2] for n in loaded.head} == {
        *("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias")
    }
    learn(loaded, 2)
    check_peft_folder(loaded, shelf("roberta"), tmp_path / "adapter")
    renewed = renew_adapter(loaded, lora("roberta", targets=("query", "dense")), seed=2)
    wanted = load(shelf("roberta"), "roberta", targets=("query", "dense"), seed=2)
    check_same(renewed, wanted)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_gradient_checkpointing_changes_no_step(shelf, family):
    ends = []
    for on in (False, True):
        model = ModelConfig(name=str(shelf(family)), dtype="float32", gradient_checkpointing=on)
        loaded = load_model(model, lora(family), seed=1, device="cpu", labels=LABELS)
        scatter(loaded)
        learn(loaded, optimizer="sgd")
        ends.append(read_adapter(loaded))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor)


# --- a finished run


@pytest.fixture(scope="module", params=["lora", "full"])
def finished(request, shelf, tmp_path_factory):
    """A complete run whose head keeps its initial values."""
    place = tmp_path_factory.mktemp("frozen")
    rows = [{**row, "site": f"site-{n % 2}"} for n, row in enumerate(ROWS * 2)]
    table = {
        "task": "classify",
        "seed": 3,
        "rounds": 1,
        "model": {"name": str(shelf("bert")), "dtype": "float32"},
        "adapter": {"kind": request.param, "head": "freeze"},
        "data": {"path": str(write_jsonl(place / "rows.jsonl", rows)), "labels": list(LABELS)},
        "partition": {"by": "site"},
        "train": {"batch_size": 2, "local_steps": 2, "lr": 1e-2, "max_length": 64},
        "runtime": {"device": "cpu", "threads": 1},
        "report": {"page": False, "samples": 0},
    }
    if request.param == "lora":
        table["adapter"] |= {"rank": 2, "targets": ["query", "value"]}
    return silotune.run(parse(table), out=place / "run")


def test_a_finished_run_with_a_frozen_head_loads_as_it_was_saved(finished, shelf):
    loaded = finished.load()
    assert loaded.head == frozenset()
    if loaded.has_adapter:
        from peft import PeftModel

        plain = plain_model(shelf("bert"), num_labels=3)
        with quiet_libraries():
            theirs = PeftModel.from_pretrained(plain, str(finished.path / "adapter")).eval()
    else:
        theirs = plain_model(finished.path / "adapter")
    batch = collate(prepared(loaded))
    with torch.no_grad():
        own = theirs(input_ids=batch.ids, attention_mask=batch.mask).logits
    torch.testing.assert_close(logits_of(loaded), own)


def test_a_finished_run_names_a_texts_label_and_its_share(finished):
    shares = predictions(finished.load(), [{"text": "abab"}], 64)[0]
    expected = f"{LABELS[int(shares.argmax())]} ({float(shares.max()):.1%})"
    assert finished.ask("abab") == expected


def test_a_base_without_head_is_not_asked(finished):
    with pytest.raises(ConfigError, match=r"no head for these labels[\s\S]*without --base"):
        finished.ask("abab", base=True)
