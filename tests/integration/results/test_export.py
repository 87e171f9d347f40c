"""Exports of a run: PEFT folders, merged models, GGUF files and the hub, read by other loaders."""

import errno
import json
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import silotune
from silotune.cli import app
from silotune.core.checksums import list_files
from silotune.core.errors import ConfigError, DiskError, ModelError, RunFolderError, SilotuneError
from silotune.federation.progress import Progress
from silotune.models.gguf_read import convert_llama
from silotune.models.gguf_write import check_llama, check_tokenizer, write_llama
from silotune.recipes.parse import parse
from silotune.results.export import merge
from silotune.results.export_card import export_card
from tests.conftest import (
    CHATML,
    build_tiny_model,
    changed,
    hospital_rows,
    largest_file,
    write_jsonl,
)
from tests.tiny_encoders import build_tiny_encoder

LORA = {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]}
KINDS = {
    "lora": LORA,
    "everywhere": LORA | {"targets": ["all-linear"], "peft": {"rank_pattern": {"q_proj": 3}}},
    "dora": LORA | {"dora": True},
    "rslora": LORA | {"rslora": True},
    "ia3": {"kind": "ia3"},
    "loha": {"kind": "peft", "targets": ["q_proj"], "peft": {"peft_type": "LOHA", "r": 2}},
    "full": {"kind": "full"},
}
TEXTS = [
    "Which of the patients' 12 or 2024 tests,  and why?\n\nThe 3rd: he's 41.",
    "<|im_start|>user\nthe heart<|im_end|>\n Größe 東京 \t 👩‍⚕️",
]
EXACT = 1e-5
"""Largest difference between logits that is float32 rounding, as a share of the largest logit."""
RNG = 9


# --- tiny runs ------------------------------------------------------------------------------------


def build_merging_tokenizer(digits: bool = False):
    """Byte-level BPE with some merges and a beginning token, as SmolLM2 has them."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = [("h", "e"), ("t", "he"), ("Ġ", "the"), ("i", "s"), ("Ġ", "is"), ("h", "is")]
    words = [*special, *alphabet, *("".join(pair) for pair in merges)]
    inner = Tokenizer(BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    split = [pre_tokenizers.Digits(individual_digits=True), level]
    inner.pre_tokenizer = pre_tokenizers.Sequence(split) if digits else level
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def build_llama(folder: Path, *, tokenizer=None, scale: float = 6.0, **more) -> Path:
    """A random Llama with large logits and a tokenizer that GGUF can describe."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer or build_merging_tokenizer()
    table = {
        "vocab_size": len(tokenizer) + 3,  # as in models whose vocabulary is rounded up
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": True,
    }
    with torch.random.fork_rng():
        torch.manual_seed(RNG)
        model = LlamaForCausalLM(LlamaConfig(**table | more))
    with torch.no_grad():
        for parameter in model.parameters():
            # norms too, so that no two tensors are equal
            noise = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(RNG))
            parameter.mul_(scale if parameter.dim() == 2 else 1 + noise)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_run(folder: Path, model: Path, adapter: dict | None = None, **changes) -> silotune.Run:
    """A short run whose result is then changed so much that every logit shows it."""
    folder.mkdir(parents=True, exist_ok=True)
    data = write_jsonl(folder / "rows.jsonl", hospital_rows(2, 4))
    table = {
        "seed": 3,
        "rounds": 1,
        "model": {"name": str(model), "dtype": "float32"},
        "adapter": adapter or LORA,
        "data": {"path": str(data)},
        "partition": {"by": "source"},
        "train": {"batch_size": 2, "local_steps": 1, "lr": 1e-3, "max_length": 128},
        "runtime": {"device": "cpu", "threads": 1},
        "report": {"page": False, "samples": 0},
    }
    done = silotune.run(parse(changed(table, changes)), out=folder / "run")
    (file,) = (done.path / "adapter").glob("*.safetensors")
    gen = torch.Generator().manual_seed(RNG)
    tensors = {n: t + 0.1 * torch.randn(t.shape, generator=gen) for n, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    list_files(done.path, [f"adapter/{file.name}"])
    return done


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return build_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def done(tmp_path_factory, llama) -> silotune.Run:
    """One finished run that most tests read; exports go to other folders."""
    return make_run(tmp_path_factory.mktemp("run"), llama)


def logits_of(model, tokenizer, text: str = TEXTS[0]) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(**tokenizer(text, return_tensors="pt")).logits.float()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest, as a share of the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def read(folder: Path, **more):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32} | more)
    more.pop("dtype", None)
    return model, AutoTokenizer.from_pretrained(folder, **more)


# --- peft -----------------------------------------------------------------------------------------


def test_a_peft_export_is_read_by_peft_with_the_runs_template_and_the_same_logits(done, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = done.export(to=tmp_path / "out" / "peft")
    assert place == tmp_path / "out" / "peft"
    base = AutoModelForCausalLM.from_pretrained(done.config.model.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(place)
    loaded = done.load()
    expected = logits_of(loaded.model, loaded.tokenizer)
    plain = logits_of(base, tokenizer)
    assert torch.equal(logits_of(PeftModel.from_pretrained(base, place), tokenizer), expected)
    assert difference(plain, expected) > 0.01
    assert tokenizer.chat_template == CHATML


def test_auto_peft_loads_an_export_with_its_base_from_the_folder_alone(done, tmp_path, monkeypatch):
    """A base that is on no hub was not found: adapter_config.json had only its name."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    made = done.export(to=tmp_path / "made", with_base=True)
    place = made.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(place)
    monkeypatch.setattr(socket, "socket", lambda *_: pytest.fail("asked the network"))
    tokenizer = AutoTokenizer.from_pretrained(".")
    loaded = done.load()
    expected = logits_of(loaded.model, loaded.tokenizer)
    found = AutoPeftModelForCausalLM.from_pretrained(".", dtype=torch.float32)
    rows = len(tokenizer)  # it drops embeddings that no token has
    assert torch.equal(logits_of(found, tokenizer)[..., :rows], expected[..., :rows])
    names = {file.name for file in Path(done.config.model.name).iterdir()}
    assert {file.name for file in Path("base").iterdir()} == names
    card = Path("README.md").read_text()
    assert "with a copy of its base in `./base`" in card
    assert str(Path(done.config.model.name).parent) not in card


def test_a_card_says_how_auto_peft_finds_a_base_that_is_not_on_the_hub(done, monkeypatch):
    monkeypatch.setattr("silotune.results.export_card.licence_of", lambda _: None)  # asks the hub
    run = done.config
    provenance = json.loads((done.path / "provenance.json").read_text())

    def card(name: str, **more) -> str:
        model = run.model.model_copy(update={"name": name})
        return export_card(
            *(run.model_copy(update={"model": model}), done.summary, provenance),
            **{"kind": "peft", "gguf_type": "f16", "moved": None, **more},
        )

    call = '`AutoPeftModelForCausalLM.from_pretrained(".")`'
    assert f"{call} does the same." in card("owner/name")
    assert f"{call}, in this folder, does the same." in card(run.model.name)
    source = card("smollm2-135m-instruct")
    assert "is not on the hub" in source
    (line,) = [line for line in source.splitlines() if line.startswith("ln -s")]
    assert line.endswith(" smollm2-135m-instruct")
    assert "ln -s" not in card("smollm2-135m-instruct", with_base=True)


@pytest.mark.parametrize(
    ("kind", "more", "dtype", "says"),
    [
        ("peft", {}, "bfloat16", None),
        ("merged", {}, "float32", None),
        ("merged", {}, "bfloat16", "stored as bfloat16"),
        ("gguf", {"gguf_type": "f32"}, "bfloat16", None),
        ("gguf", {}, "float32", "stored as f16"),
        ("gguf", {"gguf_type": "q8_0"}, "float32", "stored as q8_0"),
    ],
)
def test_an_export_whose_rounding_may_change_an_answer_says_so(
    llama, done, tmp_path, kind, more, dtype, says
):
    """Nothing was said, and the first answer tried differed from `silotune ask`."""
    path = done.path
    if dtype != "float32":  # only what the run recorded matters here
        path = shutil.copytree(done.path, tmp_path / "run")
        table = json.loads((path / "provenance.json").read_text())
        (path / "provenance.json").write_text(json.dumps(table | {"dtype": dtype}))
        list_files(path, ["provenance.json"])
    said, progress = [], Progress()
    progress.note = said.append
    place = silotune.Run(path).export(kind, to=tmp_path / "out", progress=progress, **more)
    notes = [text for text in said if "This rounding is not in" in text]
    card = (place / "README.md").read_text()
    assert len(notes) == (says is not None)
    assert ("This rounding is not in" in card) == (says is not None)
    assert says is None or says in notes[0]


def test_an_export_is_in_the_run_folder_by_default_and_is_never_overwritten(done):
    try:
        place = done.export()
        assert place == done.path / "export" / "peft"
        with pytest.raises(RunFolderError) as caught:
            done.export()
        assert str(caught.value) == (
            f"{place} exists and is not overwritten.\n  Remove it, or choose another --to."
        )
    finally:
        shutil.rmtree(done.path / "export")


def test_a_card_says_where_an_export_comes_from_without_paths_or_client_names(done, tmp_path):
    provenance = json.loads((done.path / "provenance.json").read_text())
    for kind in ("peft", "merged", "gguf"):
        place = done.export(kind, to=tmp_path / kind)
        card = (place / "README.md").read_text()
        for said in (
            *(provenance["base"]["sha256"], provenance["data"]["sha256"]),
            *(done.summary["adapter_sha256"], provenance["versions"]["silotune"]),
            "clients: 2; rows: 7 for training (3 to 4 per client), 2 held out",
            "rounds: 1 of fedavg; this is the result after round 1",
            "licence unknown: see its own card",
        ):
            assert said in card, (kind, said)
        for path in place.iterdir():
            if path.suffix in (".json", ".md", ".gguf"):
                text = path.read_bytes().decode("utf-8", errors="replace")
                assert str(done.path.parent) not in text, path
                assert str(Path(done.config.model.name).parent) not in text, path
                assert "hospital-0" not in text, path


def test_a_card_repeats_the_licence_of_the_bases_own_card(tmp_path):
    model = build_tiny_model(tmp_path / "tiny")
    (model / "README.md").write_text("---\ntags: [a]\nlicense: 'mit'\n---\nlicense: other\n")
    card = (make_run(tmp_path / "r", model).export() / "README.md").read_text()
    assert "license: mit\n" in card
    assert "; licence mit\n" in card


# --- merged ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_is_a_plain_folder_with_the_logits_of_base_and_adapter(
    llama, tmp_path, kind
):
    done = make_run(tmp_path, llama, KINDS[kind])
    loaded = done.load()
    expected = logits_of(loaded.model, loaded.tokenizer)
    place = done.export("merged")
    assert not list(place.glob("adapter*"))
    model, tokenizer = read(place)
    assert difference(logits_of(model, tokenizer), expected) < EXACT
    assert difference(logits_of(*read(llama)), expected) > 0.01
    assert tokenizer.chat_template == CHATML


def test_merged_weights_are_rounded_once_to_the_type_of_training(llama, tmp_path):
    done = make_run(tmp_path, llama, model__dtype="bfloat16")
    state = done.adapter()
    found = load_file(done.export("merged") / "model.safetensors")
    base = load_file(llama / "model.safetensors")
    for name, tensor in found.items():
        expected = base[name].bfloat16().float()
        a = state.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")
        b = state.get(f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight")
        if a is not None and b is not None:
            expected = expected + 2.0 * b @ a  # alpha / rank
        # the product's own rounding may tip a number over the middle between two
        near = (tensor.float() - expected).abs() <= expected.abs() * 2**-8
        assert tensor.dtype == torch.bfloat16
        assert near.all()
        assert (tensor == expected.bfloat16()).float().mean() > 0.999, name


def test_a_quantised_run_merges_into_the_unquantised_base(llama, tmp_path):
    done = make_run(tmp_path, llama, model__quantization="nf4")
    place = done.export("merged")
    plain = make_run(tmp_path / "plain", llama)
    shutil.rmtree(plain.path / "adapter")
    shutil.copytree(done.path / "adapter", plain.path / "adapter")
    list_files(plain.path, [f"adapter/{file.name}" for file in (plain.path / "adapter").iterdir()])
    loaded = plain.load()  # the same adapter on the plain base
    model, tokenizer = read(place)
    expected = logits_of(loaded.model, loaded.tokenizer)
    assert difference(logits_of(model, tokenizer), expected) < EXACT
    assert (
        "**Training used the base in nf4; this export uses the unquantised base.**"
        in (place / "README.md").read_text()
    ), "the card says so"
    peft = done.export()
    assert "**Training used the base in nf4.**" in (peft / "README.md").read_text()


def test_a_classifier_is_exported_with_its_head_and_labels(tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = [{"t": f"{w} {i}", "label": w, "c": i % 2} for i in range(8) for w in ("good", "bad")]
    done = make_run(
        tmp_path,
        build_tiny_encoder(tmp_path / "encoder"),
        {"rank": 2, "alpha": 4},
        task="classify",
        data={"path": str(write_jsonl(tmp_path / "own.jsonl", rows)), "text": "t"},
        partition={"by": "c"},
    )
    place = done.export("merged")
    model = AutoModelForSequenceClassification.from_pretrained(place, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(place)
    loaded = done.load()
    expected = logits_of(loaded.model, loaded.tokenizer)
    assert difference(logits_of(model, tokenizer), expected) < EXACT
    assert model.config.id2label == dict(enumerate(done.config.data.labels or ()))
    assert "AutoModelForSequenceClassification" in (place / "README.md").read_text()
    with pytest.raises(ModelError, match="this run is a classifier"):
        done.export("gguf")


@pytest.mark.parametrize("adapter", ["prompt", "prefix"])
def test_vectors_in_front_of_the_text_are_exported_only_for_peft(llama, tmp_path, adapter):
    done = make_run(tmp_path, llama, {"kind": adapter, "virtual_tokens": 2})
    for kind in ("merged", "gguf"):
        with pytest.raises(ModelError) as caught:
            done.export(kind)
        assert str(caught.value) == (
            f"adapter.kind = '{adapter}' trains vectors in front of the text, which cannot be "
            "merged into the base's weights.\n  Export it with --as peft."
        )
    assert not (done.path / "export").exists()
    assert (done.export() / "adapter_config.json").is_file()


def test_a_fully_trained_run_is_a_copy_and_has_no_adapter_to_export(llama, tmp_path):
    done = make_run(tmp_path, llama, {"kind": "full"})
    with pytest.raises(ModelError, match=r"no adapter to export\.\n  Use --as merged\."):
        done.export()
    place = done.export("merged")
    name = "model.safetensors"
    assert (place / name).read_bytes() == (done.path / "adapter" / name).read_bytes()


def test_an_adapter_whose_merge_answers_differently_is_refused(done):
    """PEFT's merge does this for an output layer that is tied to the embedding."""
    loaded = done.load()
    plain = loaded.model.merge_and_unload
    loaded.model.merge_and_unload = lambda **how: _spoilt(plain(**how))
    with pytest.raises(ModelError, match="not those of base and adapter\n  Export it"):
        merge(loaded)


def _spoilt(model):
    with torch.no_grad():
        model.model.embed_tokens.weight[:] *= 1.1
    return model


# --- gguf -----------------------------------------------------------------------------------------

LIMITS = {"f32": EXACT, "f16": 5e-3, "q8_0": 0.1}
"""Largest difference between logits by type. These tiny models have large weights to make it
visible. For real models, see docs/export.md and tests/slow."""


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", LIMITS)
def test_transformers_reads_a_gguf_export_with_the_same_tokens_and_logits(tmp_path, kind, tied):
    done = make_run(tmp_path, build_llama(tmp_path / "llama", tie_word_embeddings=tied))
    place = done.export("gguf", gguf_type=kind)
    file = f"model-{kind}.gguf"
    assert sorted(p.name for p in place.iterdir()) == ["README.md", file]
    model, tokenizer = read(place, gguf_file=file)
    loaded = done.load()
    expected = logits_of(loaded.model, loaded.tokenizer)
    moved = difference(logits_of(model, tokenizer), expected)
    assert moved < LIMITS[kind]
    assert difference(logits_of(*read(tmp_path / "llama")), expected) > LIMITS[kind]
    if kind != "q8_0":
        ids = loaded.tokenizer("the history", return_tensors="pt")
        how = {"max_new_tokens": 12, "do_sample": False}
        assert torch.equal(model.generate(**ids, **how), loaded.model.generate(**ids, **how))
    for key in ("rms_norm_eps", "max_position_embeddings", "head_dim", "tie_word_embeddings"):
        assert getattr(model.config, key) == pytest.approx(getattr(loaded.model.config, key)), key
    assert model.config.rope_parameters["rope_theta"] == 5000.0


@pytest.mark.parametrize("digits", [False, True], ids=["gpt-2", "smollm"])
def test_the_tokenizer_in_a_gguf_export_splits_text_as_before(tmp_path, digits):
    ours = build_merging_tokenizer(digits)
    done = make_run(tmp_path, build_llama(tmp_path / "llama", tokenizer=ours))
    place = done.export("gguf", gguf_type="f32")
    _, tokenizer = read(place, gguf_file="model-f32.gguf")
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == ours(text)["input_ids"]
        assert tokenizer.decode(ours(text)["input_ids"]) == text
    assert tokenizer.chat_template == CHATML
    for token in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(tokenizer, token) == getattr(ours, token)
    from gguf import GGUFReader

    fields = GGUFReader(place / "model-f32.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == ("smollm" if digits else "gpt-2")
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert kinds == [3, 3, 3, *[1] * (len(ours) - 3), 5, 5, 5]  # control, normal, unused
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == f"[PAD{len(ours) + 2}]"


def test_our_own_reader_gets_the_merged_weights_back(done, tmp_path):
    place = done.export("gguf", gguf_type="f32", to=tmp_path / "gguf")
    merged = load_file(done.export("merged", to=tmp_path / "merged") / "model.safetensors")
    (tmp_path / "again").mkdir()
    convert_llama(place / "model-f32.gguf", tmp_path / "again")
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert found.keys() == merged.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, merged[name].bfloat16()), name


def test_attention_heads_of_another_width_are_recorded(tmp_path):
    done = make_run(tmp_path, build_llama(tmp_path / "llama", head_dim=32))
    model, tokenizer = read(done.export("gguf", gguf_type="f32"), gguf_file="model-f32.gguf")
    loaded = done.load()
    expected = logits_of(loaded.model, loaded.tokenizer)
    assert difference(logits_of(model, tokenizer), expected) < EXACT


def test_rows_that_do_not_fill_blocks_are_f16_in_a_q8_0_file(tmp_path):
    from gguf import GGUFReader

    model = build_llama(tmp_path / "llama", hidden_size=48, num_attention_heads=4)
    place = make_run(tmp_path, model).export("gguf", gguf_type="q8_0")
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(place / "model-q8_0.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"  # rows of 128
    assert kinds["blk.0.attn_q.weight"] == "F16"  # rows of 48
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_numbers_that_f16_cannot_hold_are_an_error(llama, tmp_path):
    model, tokenizer = read(llama)
    with torch.no_grad():
        model.model.embed_tokens.weight[5, 5] = 1e5
    for kind in ("f16", "q8_0"):
        with pytest.raises(ModelError) as caught:
            write_llama(model, tokenizer, tmp_path / "model.gguf", kind=kind, about={})
        assert str(caught.value) == (
            f"tensor 'model.embed_tokens.weight' contains numbers that are too large for {kind}.\n"
            "  Export with --type f32."
        )
    write_llama(model, tokenizer, tmp_path / "model.gguf", kind="f32", about={})


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_no_weight_in_a_gguf_file_is_off_by_more_than_stated(done, tmp_path, kind):
    from gguf import GGUFReader
    from gguf.quants import dequantize

    merged = load_file(done.export("merged", to=tmp_path / "merged") / "model.safetensors")
    place = done.export("gguf", gguf_type=kind, to=tmp_path / "gguf")
    found = {t.name: t for t in GGUFReader(place / f"model-{kind}.gguf").tensors}
    for theirs, name in (
        ("token_embd", "embed_tokens"),
        ("blk.1.ffn_down", "layers.1.mlp.down_proj"),
    ):
        stored = found[f"{theirs}.weight"]
        weight = merged[f"model.{name}.weight"]
        error = (torch.tensor(dequantize(stored.data, stored.tensor_type)) - weight).abs()
        largest = weight.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)
        bound = {
            "f32": torch.zeros_like(weight),
            "f16": weight.abs() / 2048 + 2**-25,  # below 2**-14 its steps are all of one size
            "q8_0": (largest * (1 / 254 + 1 / 2048)).expand(-1, -1, 32).flatten(1),
        }[kind]
        assert (error <= bound).all()
        assert kind == "f32" or (error > bound / 3).any()


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            r"this Llama has scaled rotary positions \('linear'\)",
        ),
        ({"attention_bias": True}, "this Llama has biases in its linear layers"),
        ({"hidden_act": "gelu"}, "this Llama has the activation 'gelu'"),
    ],
)
def test_a_llama_that_gguf_readers_would_misread_is_refused(more, text):
    from transformers import LlamaConfig

    with pytest.raises(ModelError, match=text):
        check_llama(LlamaConfig(**more))


def test_an_unsupported_model_family_is_named(tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    tokenizer = build_merging_tokenizer()
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "neox")
    tokenizer.save_pretrained(tmp_path / "neox")
    done = make_run(tmp_path, tmp_path / "neox", LORA | {"targets": ["query_key_value"]})
    with pytest.raises(ModelError) as caught:
        done.export("gguf")
    assert str(caught.value) == (
        "only models of the family 'llama' can be written to GGUF; this one is of the family "
        "'gpt_neox'.\n"
        "  Export it with --as merged, and convert that folder with llama.cpp's own converter."
    )
    assert not (done.path / "export").exists()


def _tokenizer_with(**parts):
    tokenizer = build_merging_tokenizer()
    for name, value in parts.items():
        setattr(tokenizer.backend_tokenizer, name, value)
    return tokenizer


def test_tokenizers_that_gguf_cannot_describe_are_refused(tokenizer):
    from tokenizers import normalizers, pre_tokenizers

    with_blank = build_merging_tokenizer()
    with_blank.add_tokens(["two words"])
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("e", "isolated"), pre_tokenizers.ByteLevel(False)]
    )
    for given, rows, text in (
        (tokenizer, 300, "the tokenizer has no merges"),
        (build_merging_tokenizer(), 10, "the tokenizer has 265 tokens, but the model has 10"),
        (with_blank, 300, "has the token 'two words', not in byte letters"),
        (_tokenizer_with(normalizer=normalizers.NFC()), 300, "normalises text"),
        (_tokenizer_with(pre_tokenizer=split), 300, "splits text in an unsupported way"),
    ):
        with pytest.raises(ModelError, match=text):
            check_tokenizer(given, rows)
    check_tokenizer(build_merging_tokenizer(), 300)


# --- what cannot be exported ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "more", "text"),
    [
        ("merge", {}, "--as = 'merge' is unknown. Did you mean 'merged'?"),
        ("gguf", {"gguf_type": "q8"}, "--type = 'q8' is unknown. Did you mean 'q8_0'?"),
        ("merged", {"gguf_type": "f16"}, "--type has an effect only with --as gguf."),
        ("merged", {"with_base": True}, "--with-base has an effect only with --as peft"),
        ("peft", {"public": True}, "--public has an effect only with --push."),
        (
            "peft",
            {"push": "mine"},
            "--push 'mine' is not a repository.\n  Include the owner: OWNER/NAME.",
        ),
    ],
)
def test_invalid_arguments_are_refused_before_anything_is_done(done, kind, more, text):
    with pytest.raises(ConfigError) as caught:
        done.export(kind, **more)
    assert text in str(caught.value)
    assert not (done.path / "export").exists()


def test_a_run_that_is_not_finished_is_not_exported(llama, tmp_path):
    done = make_run(tmp_path, llama)
    (done.path / "summary.json").unlink()
    with pytest.raises(RunFolderError, match="is not finished"):
        done.export()
    assert not (done.path / "export").exists()


@pytest.mark.parametrize("kind", ["peft", "merged", "gguf"])
def test_a_base_that_is_gone_or_has_changed_is_one_error_and_nothing_is_written(
    llama, tmp_path, kind
):
    model = tmp_path / "llama"
    shutil.copytree(llama, model)
    done = make_run(tmp_path, model)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"is not the base that .* was trained on"):
        done.export(kind)
    shutil.rmtree(model)
    with pytest.raises(ModelError, match="there is no folder"):
        done.export(kind)
    assert not (done.path / "export").exists()


def test_a_missing_folder_that_looks_like_a_hub_id_is_reported_as_gone(
    llama, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama, "models/own")
    done = make_run(tmp_path, Path("models/own"))
    shutil.rmtree("models")
    with pytest.raises(ModelError) as caught:
        done.export()
    assert str(caught.value) == (
        "the base 'models/own' is gone: it is neither a folder here nor on the hub.\n"
        "  Restore it, or use a machine that can reach it."
    )


@pytest.mark.parametrize("kind", ["peft", "merged", "gguf"])
def test_a_full_disk_leaves_nothing_half_written(done, tmp_path, kind):
    place = tmp_path / "new" / "out"
    with largest_file(2000), pytest.raises(DiskError) as caught:
        done.export(kind, to=place)
    assert str(caught.value).startswith(f"{place} cannot be written: ")
    assert "  Free up space" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    done.export(kind, to=place)


def test_a_folder_that_appeared_meanwhile_stays(done, tmp_path, monkeypatch):
    place = tmp_path / "new" / "out"

    def take_time(run, summary, provenance, **_):
        place.mkdir(parents=True)
        return "card"

    monkeypatch.setattr("silotune.results.export.export_card", take_time)
    with pytest.raises(RunFolderError, match="exists and is not overwritten"):
        done.export(to=place)
    assert place.is_dir()


def test_an_interrupt_leaves_nothing_half_written_and_passes(done, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("silotune.results.export.export_card", lambda *_, **__: SimpleNamespace())
    monkeypatch.setattr("silotune.results.export.shutil.copyfile", stop)
    with pytest.raises(KeyboardInterrupt):
        done.export(to=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- the hub --------------------------------------------------------------------------------------


class StandInHfApi:
    """What `push` asks of huggingface_hub.HfApi, without a network."""

    def __init__(self, *, trouble: Exception | None = None, public: bool | None = None) -> None:
        self.trouble, self.public = trouble, public
        self.calls: list[tuple] = []

    def __call__(self):  # in place of the class
        return self

    def whoami(self):
        if self.trouble is not None:
            raise self.trouble
        return {"name": "me"}

    def create_repo(self, repository, *, private, exist_ok):
        self.calls.append(("create", repository, private))
        assert exist_ok
        if self.public is None:
            self.public = not private
        return f"https://huggingface.co/{repository}"

    def repo_info(self, repository):
        return SimpleNamespace(private=not self.public)

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        files = {path.name for path in Path(folder_path).iterdir()}
        self.calls.append(("upload", repo_id, files))


@pytest.fixture
def hub(monkeypatch):
    def put(**how) -> StandInHfApi:
        api = StandInHfApi(**how)
        monkeypatch.setattr("huggingface_hub.HfApi", api)
        return api

    return put


@pytest.mark.parametrize("public", [False, True])
def test_a_push_uploads_the_folder_to_a_repository_that_is_private_by_default(
    done, tmp_path, hub, public
):
    api = hub()
    place = done.export(to=tmp_path / "out", push="me/own", public=public)
    files = {path.name for path in place.iterdir()}
    assert api.calls == [("create", "me/own", not public), ("upload", "me/own", files)]
    assert {"README.md", "adapter_model.safetensors"} <= files


def test_a_public_repository_is_not_used_unless_asked_for(done, tmp_path, hub):
    api = hub(public=True)
    with pytest.raises(ConfigError, match="exists and is public; nothing was uploaded"):
        done.export(to=tmp_path / "out", push="me/own")
    assert [call[0] for call in api.calls] == ["create"]
    assert (tmp_path / "out").is_dir()


def test_a_push_without_a_login_says_how_and_exports_nothing(done, tmp_path, hub):
    from huggingface_hub.errors import LocalTokenNotFoundError

    hub(trouble=LocalTokenNotFoundError("hf_secret"))
    with pytest.raises(ConfigError) as caught:
        done.export(to=tmp_path / "out", push="me/own")
    assert str(caught.value) == (
        "--push: nobody is logged in to the hub on this machine.\n"
        "  Run `hf auth login`, or set HF_TOKEN to a token with write access."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_does_not_answer_is_an_error_without_its_words(done, tmp_path, hub):
    hub(trouble=ConnectionError("Bearer hf_secret"))
    with pytest.raises(SilotuneError) as caught:
        done.export(to=tmp_path / "out", push="me/own")
    assert "the hub does not answer (ConnectionError)" in str(caught.value)
    assert "hf_secret" not in str(caught.value)


def test_an_upload_that_fails_leaves_the_export_and_says_how_to_continue(
    done, tmp_path, hub, monkeypatch
):
    api = hub()

    def fail(**_):
        raise OSError(errno.ECONNRESET, "Bearer hf_secret")

    monkeypatch.setattr(api, "upload_folder", fail)
    with pytest.raises(SilotuneError) as caught:
        done.export(to=tmp_path / "out", push="me/own")
    assert f"hf upload me/own {tmp_path / 'out'}" in str(caught.value)
    assert "hf_secret" not in str(caught.value)
    assert (tmp_path / "out" / "README.md").is_file()


# --- the command ----------------------------------------------------------------------------------


def test_the_command_prints_the_folder_and_ends_with_2_after_a_mistake(done, tmp_path):
    words = ["export", str(done.path), "--to", str(tmp_path / "out"), "--as", "gguf"]
    found = CliRunner().invoke(app, [*words, "--type", "f32"])
    assert (found.exit_code, found.stdout.strip()) == (0, str(tmp_path / "out"))
    again = CliRunner().invoke(app, words)
    assert (again.exit_code, again.stdout) == (2, "")
    assert "exists and is not overwritten" in again.stderr
