"""The nine kinds of malformed input. What is used must give what whole input gives."""

import contextlib
import gzip
import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from csv import DictWriter
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

import silotune
from silotune.deployment import join
from silotune.deployment.consortium.folder import Consortium
from silotune.deployment.consortium.kit import read_kit, read_request_file
from silotune.federation.acceptance import Known, check_update, what_is_expected
from silotune.federation.client_config import load_client_config
from silotune.federation.client_recipe import own_recipe, own_rows
from silotune.federation.progress import Progress
from silotune.federation.run_folder import RunFolder
from silotune.recipes.mistakes import known_keys
from silotune.runtime import wire
from silotune.runtime.flower.strategy import algorithm_of
from silotune.runtime.payload import Parcel, read_text
from tests.conftest import build_tiny_model, hospital_rows, write_tiny_recipe
from tests.fuzz.damage import (
    ODD_JSON,
    ODD_OBJECTS,
    ODD_TOML,
    change_value,
    damage_bytes,
    damage_file,
)
from tests.fuzz.isolation import Silent

ADAPTER = Path("adapter") / "adapter_model.safetensors"


@dataclass(frozen=True)
class Case:
    """One malformed input."""

    what: str
    """What was done to it."""
    use: Callable[[], object]
    """Uses it as a user would; raises `Silent` where damage changed what came out."""


class Stop(Exception):
    """Ends a run between two answers, as a kill does."""


class StopInRoundTwo(Progress):
    """Leaves a checkpoint of round 1 and a spool of round 2."""

    def client_done(self, update):
        if update.round == 2:
            raise Stop


class Assets:
    """What is damaged: a recipe, a finished run, an unfinished one, a consortium."""

    def __init__(self, place: Path) -> None:
        place.mkdir(parents=True)
        self.place, self.num_places = place, 0
        self.model = build_tiny_model(place / "model")
        self.recipe = write_tiny_recipe(place, self.model)
        self.text = self.recipe.read_text()
        self.keys = sorted(set(known_keys()))
        self.finished = place / "finished"
        done = silotune.run(self.recipe, out=self.finished)
        done.report()
        self.records = _records(done)
        self.unfinished = place / "unfinished"
        with contextlib.suppress(Stop):
            silotune.run(self.recipe, out=self.unfinished, progress=StopInRoundTwo())
        self.state = RunFolder.open(self.unfinished).load_state()
        self.consortium, self.client = place / "consortium", place / "north"
        Consortium.create(self.consortium, name="demo", address="127.0.0.1:18443")
        join.init("north", self.client)
        Consortium.open(self.consortium).approve(self.client / "request.toml")

    def new_place(self) -> Path:
        self.num_places += 1
        place = self.place / "cases" / f"{self.num_places:05d}"
        place.mkdir(parents=True)
        return place


# --- recipes and rows


def recipe_value(assets: Assets, draw: Random) -> Case:
    """Any known key with any odd value: checked, and run for a round if nothing objects."""
    key, value, place = draw.choice(assets.keys), draw.choice(ODD_TOML), assets.new_place()

    def use() -> str:
        keys = ["rounds=1", f"{key}={value}"]
        if silotune.check(assets.recipe, keys).run.runtime.name != "in-process":
            return "checked"
        silotune.run(assets.recipe, keys, out=place / "out")
        return "ran"

    return Case(f"{key} = {value[:40]}", use)


def recipe_text(assets: Assets, draw: Random) -> Case:
    """Damaged TOML: bytes, keys that nobody knows, depth, length."""
    text, number = assets.text, draw.choice(["9" * 5000, "1" + "0" * 400, "inf", "-9" * 2000])
    unknown = draw.choice(["sede", "x" * 5000, "\u202ea", "é"])
    section = draw.choice(["model", "adapter", "data", "train", "runtime", "algorithm", "privacy"])
    refused = {
        "unknown key": f'"{unknown}" = 1\n{text}',
        "unknown section": f"{text}[trian]\nx = 1\n",
        "key twice": f"seed = 4\n{text}",
        "section twice": f"{text}[train]\nlr = 1\n",
        "deep lists": f"x = {'[' * 20_000}{']' * 20_000}\n{text}",
        "deep keys": f"{'.'.join('a' * 2000)} = 1\n{text}",
        "long text": f'{text}[y]\nz = "{"w" * 5_000_000}"\n',
        "long number": text.replace("rounds = 3", f"rounds = {number}"),
        "3000 unknown keys": "".join(f"k{i} = {i}\n" for i in range(3000)) + text,
        "no section": f"{section} = {draw.choice(['1', '[]', 'true'])}\n"
        + text.replace(f"[{section}]", f"[z{section}]"),
    }
    how = draw.choice([*refused, "bytes", "bytes"])
    if how == "bytes":
        data, how = damage_bytes(draw, text.encode())
    else:
        data = refused[how].encode()
    path = assets.new_place() / "r.toml"
    path.write_bytes(data)

    def use() -> str:
        silotune.check(path)
        if how in refused:
            raise Silent("a recipe with a mistake passed the check")
        return "checked"

    return Case(how, use)


def rows(assets: Assets, draw: Random) -> Case:
    """Damaged rows in six formats: checked, previewed and run."""
    ending = draw.choice(["jsonl", "jsonl", "jsonl.gz", "csv", "tsv", "json", "parquet"])
    place, table = assets.new_place(), hospital_rows()
    column = draw.choice(["source", "question", "answer"])
    how = draw.choice(["bytes", "bytes", "value", "value", "key", "column gone", "few", "long"])
    if how == "value":
        draw.choice(table)[column] = draw.choice((*ODD_OBJECTS, "{{ 7*7 }}", "<|im_end|>"))
    elif how == "key":
        row = draw.choice(table)
        row[draw.choice(["", " ", "a.b", "\0", "x" * 1000, "QUESTION"])] = row.pop(column)
    elif how == "column gone":
        for row in table:
            row.pop(column)
    elif how == "few":
        table = table[: draw.randint(0, 2)]
    elif how == "long":
        for row in table[:3]:
            row[column] = "word " * 20_000
    data = _as_file(table, ending)
    if how == "bytes":
        data, how = damage_bytes(draw, data)
    path = place / f"rows.{ending}"
    path.write_bytes(data)

    def use() -> int:
        keys = ["rounds=1", f'data.path="{path}"']
        checked = silotune.check(assets.recipe, keys)
        silotune.preview(assets.recipe, keys)
        silotune.run(assets.recipe, keys, out=place / "out").report()
        return sum(len(own.train) for own in checked.rows.values())

    return Case(f"{ending}, {column}: {how}", use)


def _as_file(table: Sequence[dict[str, Any]], ending: str) -> bytes:
    if ending == "jsonl.gz":
        return gzip.compress(_as_file(table, "jsonl"))
    if ending == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in table)
    elif ending == "json":
        text = json.dumps(table)
    elif ending in ("csv", "tsv"):
        out, sign = io.StringIO(), "," if ending == "csv" else "\t"
        keys = sorted({key for row in table for key in row}) or ["question"]
        writer = DictWriter(out, keys, delimiter=sign)
        writer.writeheader()
        writer.writerows(table)
        text = out.getvalue()
    else:
        return _as_parquet(table)
    return text.encode("utf-8", "surrogatepass")


def _as_parquet(table: Sequence[dict[str, Any]]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    out = io.BytesIO()
    try:
        parquet.write_table(pyarrow.Table.from_pylist(list(table)), out)
    except (pyarrow.ArrowException, UnicodeError, OverflowError, TypeError):  # no such Parquet
        out = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(hospital_rows()), out)
    return out.getvalue()


# --- run folders


def _damaged_copy(
    assets: Assets, draw: Random, run: Path, patterns: Sequence[str]
) -> tuple[Path, str]:
    copy = assets.new_place() / "run"
    shutil.copytree(run, copy)
    files = [p for pattern in patterns for p in sorted(copy.glob(pattern)) if p.is_file()]
    path = draw.choice(files)
    how = damage_file(draw, path)
    return copy, f"{path.relative_to(copy)}: {how}"


def checkpoint(assets: Assets, draw: Random) -> Case:
    """An unfinished run, damaged and resumed: the undisturbed adapter, or an error."""
    folders = ("checkpoints/*/*", "spool/*/*", "clients/*/*")
    names = (*folders, "metrics.jsonl", "*.json", "recipe.toml", "run-id", "checksums.sha256")
    copy, what = _damaged_copy(assets, draw, assets.unfinished, names)

    def use() -> str:
        silotune.run(resume=copy)
        if (copy / ADAPTER).read_bytes() != (assets.finished / ADAPTER).read_bytes():
            raise Silent("another adapter than that of the undisturbed run")
        return "the same adapter"

    return Case(what, use)


def adapter(assets: Assets, draw: Random) -> Case:
    """A finished run's adapter, damaged, asked and exported."""
    copy, what = _damaged_copy(assets, draw, assets.finished, ["adapter/*", "checksums.sha256"])

    def use() -> str:
        run = silotune.Run(copy)
        run.ask("What is a1?", max_new_tokens=2)
        run.export("merged")
        if _hashes(copy / "adapter") != _hashes(assets.finished / "adapter"):
            raise Silent("a damaged adapter was asked and exported")
        return "asked and exported"

    return Case(what, use)


def record(assets: Assets, draw: Random) -> Case:
    """A finished run's records, damaged: read, and put on a page."""
    names = ["*.json", "*.jsonl", "recipe.toml", "checksums.sha256"]
    copy, what = _damaged_copy(assets, draw, assets.finished, names)

    def use() -> str:
        run = silotune.Run(copy)
        if _records(run) != assets.records:
            raise Silent("damaged records were read")
        run.report()
        return "reported"

    return Case(what, use)


def _records(run: silotune.Run) -> str:
    folder = RunFolder.open(run.path)
    split, provenance = folder.read_json("split.json"), folder.read_json("provenance.json")
    return json.dumps([run.summary, run.metrics, run.samples, run.privacy, split, provenance])


def _hashes(folder: Path) -> Iterator[tuple[str, str]]:
    return [(p.name, sha256(p.read_bytes()).hexdigest()) for p in sorted(folder.iterdir())]


# --- clients and consortia

CLIENT_KEYS = {
    "": ("name", "state", "model"),
    "data": ("path", "eval_path", "template", "prompt", "eval_fraction", "max_rows", "label"),
    "limits": ("max_steps", "max_rounds", "max_hours", "max_bytes", "models", "epsilon", "delta"),
    "runtime": ("device", "threads", "dtype", "quantization", "idle_s", "turn"),
}


def client(assets: Assets, draw: Random) -> Case:
    """client.toml: damaged, or a key with an odd value."""
    data = assets.place / "hospitals.jsonl"
    tables = {
        "": ['name = "north"', 'state = "state"'],
        "data": [f'path = "{data}"'],
        "limits": ["max_steps = 5"],
        "runtime": ["threads = 1"],
    }
    section = draw.choice(sorted(tables))
    key, value = draw.choice((*CLIENT_KEYS[section], "zzz")), draw.choice(ODD_TOML)
    what = f"{section}.{key} = {value[:40]}"
    tables[section] = [x for x in tables[section] if not x.startswith(f"{key} =")]
    tables[section].append(f"{key} = {value}")
    lines = [line for name, own in tables.items() for line in ([f"[{name}]"] * bool(name) + own)]
    text = "\n".join(lines).encode("utf-8", "surrogatepass")
    if draw.random() < 0.4:
        text, what = damage_bytes(draw, text)
    path = assets.new_place() / "client.toml"
    path.write_bytes(text)

    def use() -> int:
        own = load_client_config(path)
        run = silotune.load_recipe(assets.recipe)
        own_recipe(run, own.model_copy(update={"model": own.model or str(assets.model)}))
        return len(own_rows(run, own).train)

    return Case(what, use)


def kit(assets: Assets, draw: Random) -> Case:
    """A kit, a request and consortium.toml, damaged on their way."""
    sources = {
        assets.consortium / "kits" / "north.toml": read_kit,
        assets.client / "request.toml": read_request_file,
        assets.consortium / "consortium.toml": lambda path: Consortium.open(path.parent),
    }
    source = draw.choice(sorted(sources))
    lines, how = source.read_text().splitlines(), draw.choice(["bytes", "bytes", "value", "line"])
    at = draw.randrange(len(lines))
    if how == "bytes":
        data, how = damage_bytes(draw, source.read_bytes())
    else:
        key = lines[at].partition("=")[0]
        lines[at] = f"{key}= {draw.choice(ODD_TOML)}" if how == "value" else lines[at - 1]
        data = "\n".join(lines).encode("utf-8", "surrogatepass")
    path = assets.new_place() / source.name
    path.write_bytes(data)
    return Case(f"{source.name}: {how}", lambda: sources[source](path))


def message(assets: Assets, draw: Random) -> Case:
    """What a client may send: decoded and checked as a server does."""
    state, run = assets.state, RunFolder.open(assets.unfinished).run
    algorithm = algorithm_of(run.algorithm)
    metrics = {"train_loss": 1.0, "num_tokens": 5, "seconds_training": 0.1, "seconds": 1.0}
    delta = {name: t * 0 + 0.5 for name, t in state.adapter.items()}
    update = silotune.core.types.Update("hospital-0", state.round + 1, delta, 5, metrics)
    parcel = wire.encode_update(update)
    about, values = json.loads(json.dumps(parcel.about)), parcel.values.copy()
    tensor = draw.choice(about["update"]["tensors"])
    how = draw.choice(["numbers", "length", "dtype", "shape", "name", "depth", *["value"] * 5])
    if how == "numbers":
        values[draw.randrange(values.size)] = draw.choice([np.nan, np.inf, -np.inf])
    elif how == "length":
        values = draw.choice([values[: draw.randrange(values.size)], np.append(values, values[:1])])
    elif how == "dtype":
        values = values.astype(draw.choice(["float64", "int64", "float16", "complex64"]))
    elif how == "shape":
        tensor[2] = draw.choice([[10**12, 10**12], [-1, -1], [0], [], [1] * 65, [2**63], [True]])
    elif how == "name":
        tensor[1] = draw.choice(["", "../../x", "\0", "x" * 10**6, "delta/extra"])
    elif how == "depth":
        about["update"]["metrics"] = json.loads("[" * 500 + "]" * 500)
    else:
        how = f"value of {change_value(draw, about, (*ODD_JSON, 'x' * 100_000, [], {}))}"
    is_number = how == "numbers"
    known = Known(run, lambda: {"hospital-0": {"num_train": 8, "num_eval": 2}})

    def use() -> str:
        said = wire.decode_answer(
            Parcel(read_text(json.dumps(about)), values), "hospital-0", bytes_down=1
        )
        if isinstance(said, silotune.core.types.Update):
            expected = what_is_expected(algorithm, state, ["hospital-0"], known)
            check_update(said, expected, {"hospital-0"})
            if is_number:
                raise Silent("an update that holds no number was accepted")
        return type(said).__name__

    return Case(how, use)


KINDS: dict[str, Callable[[Assets, Random], Case]] = {
    kind.__name__: kind
    for kind in (
        recipe_value,
        recipe_text,
        rows,
        checkpoint,
        adapter,
        record,
        client,
        kit,
        message,
    )
}
