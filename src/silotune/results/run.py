"""A finished run on disk: its numbers, its adapter, its model, its page."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.core.atomic_files import write_atomically
from silotune.core.errors import ConfigError, ModelError, RunFolderError, UpdateError
from silotune.core.public_call import as_path, public
from silotune.core.tree import check_same_layout, layout_of
from silotune.core.types import AdapterState
from silotune.federation.client_memory import folder_name
from silotune.federation.metrics import Row
from silotune.federation.own_steps import as_a_client_has_it
from silotune.federation.privacy_statement import releases, statement
from silotune.federation.progress import Progress
from silotune.federation.recipe_model import load_for
from silotune.federation.run_folder import RunFolder
from silotune.models.adapters import without_frozen
from silotune.models.base import folder_of_base
from silotune.models.gguf_write import GgufType
from silotune.models.loading import LoadedModel, write_adapter
from silotune.models.sources import content_hash, is_hub_id
from silotune.recipes.personal import kept_by
from silotune.recipes.schema import RunConfig
from silotune.results.chat import NO_HEAD, SPEAKERS, Chat, Speaker, Speakers
from silotune.results.export import GGUF_DEFAULT, check_request, export_run
from silotune.results.export_card import ExportKind
from silotune.results.frames import client_numbers, frame, round_numbers
from silotune.results.hub import hub_login, push_folder
from silotune.results.listing import refuse_collection
from silotune.results.page import run_page
from silotune.results.paper import TableKind, check_kinds, write_charts, write_tables
from silotune.results.published import published
from silotune.results.run_tables import round_table
from silotune.results.saved_adapter import read_result
from silotune.results.summary import label_table, loss_table
from silotune.results.svg import ChartKind, saving

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Run:
    """A finished run on disk."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", as_path(self.path, "Run"))  # strings are accepted too

    def _folder(self) -> RunFolder:
        refuse_collection(self.path)
        return RunFolder.open(self.path)

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json: losses per client, bytes, seconds, fingerprint of the adapter.

        Raises:
            RunFolderError: The run is not finished, or the file is damaged.
        """
        summary = self._folder().read_json("summary.json")
        if summary is None:
            raise RunFolderError(
                f"{self.path} is not finished.\n  Resume it: silotune run --resume {self.path}"
            )
        return summary

    @property
    def metrics(self) -> list[Row]:
        """metrics.jsonl: one row per round, client and event."""
        return self._folder().metrics()

    def rounds(self) -> "DataFrame":
        """One row per round: losses over all clients, bytes and seconds; round 0 is the base.

        Losses are in nats per token (classify: per row); bytes are those sent, both ways.
        """
        return frame(round_numbers(self.metrics))

    def table(self) -> "DataFrame":
        """One row per client: num_train, num_eval, base_loss, federated_loss, change.

        Losses are in nats per token (classify: per row); a change below 0 is an improvement.
        """
        return frame(client_numbers(self.summary))

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Held-out questions with the answers of base and result; [] if none were asked."""
        return self._folder().read_json("samples.json") or []

    @property
    def split(self) -> dict[str, Any]:
        """Rows, lengths and labels of each client; {} for real clients, who keep them."""
        return self._folder().read_json("split.json") or {}

    @property
    def privacy(self) -> dict[str, Any] | None:
        """Its guarantee, what it has spent, and every release; None without [privacy].

        This is enough to recompute epsilon; see docs/privacy.md.
        """
        folder = self._folder()
        found = statement(folder.run, folder)
        return found and {**found, "releases": releases(folder), "sha256": self._sha256()}

    def _sha256(self) -> dict[str, str]:
        """Hashes of what the statement is about: recipe, guarantee, and the result's tensors."""
        names = ("recipe.toml", "privacy.json", "adapter/adapter_model.safetensors")
        return {
            name: hashlib.sha256((self.path / name).read_bytes()).hexdigest()
            for name in names
            if (self.path / name).is_file()
        }

    @public
    def report(self, *, charts: ChartKind | None = None, tables: TableKind | None = None) -> Path:
        """Write report.html: the run on one page that needs no network. Returns its path.

        Args:
            charts: Also write every chart as a file, into charts/.
            tables: Also write the tables, into tables/: "csv" unrounded, "latex" as on the page.
                Under [privacy], without the numbers that have no noise, like the page.
        """
        check_kinds(charts, tables)
        folder, summary, rows = self._folder(), self.summary, self.metrics
        with saving(charts) as saved:
            page = run_page(
                *(folder.run, summary, rows, folder.read_json("provenance.json")),
                split=self.split,
                samples=self.samples,
            )
        write_atomically(self.path / "report.html", page.encode())
        write_charts(self.path, saved)
        safe = published(summary, rows)
        write_tables(
            self.path,
            tables,
            numbers=lambda: {
                "clients": frame(client_numbers(safe.summary)),
                "rounds": frame(round_numbers(safe.rows)),
            },
            texts=lambda: {
                "clients": loss_table(safe.summary),
                "labels": label_table(safe.summary),
                "rounds": round_table(safe.rows),
            },
        )
        return self.path / "report.html"

    @property
    def config(self) -> RunConfig:
        """The resolved recipe."""
        return self._folder().run

    def adapter(self) -> AdapterState:
        """The result's tensors by name, float32.

        A factor `lora_A` has the shape (rank, d_in), `lora_B` (d_out, rank).

        Raises:
            RunFolderError: There is no result yet, or a file of it has changed since.
        """
        folder, place = self._folder(), self.path / "adapter"
        if any(place.glob("*.safetensors")):
            folder.check_files("adapter")
        return read_result(place)

    def load(self, *, client: str | None = None) -> LoadedModel:
        """Load the base with the result in it.

        Args:
            client: Load the result as this client of a simulation has it: after its own steps
                (`finish.local_steps`), or with the head or factor that it keeps
                (`adapter.head = "local"`, `algorithm.name = "fedsa_lora"`).

        Raises:
            RunFolderError: There is no result yet.
            ModelError: The base is not the one that the adapter was trained on.
            ConfigError: There is no such client, or it keeps nothing of its own; or the result is
                of use with a client's own part only, and none is named.
        """
        self._check_whole(client)
        return self._load_as(client)

    def _check_whole(self, client: str | None) -> None:
        """Refuse a result without the factor that every client keeps: it answers like the base."""
        config = self.config
        if client is None and (kept := config.algorithm.facts.keeps):
            raise ConfigError(
                f"{self.path}: with {kept_by(config)}, every client keeps a factor {kept} of its "
                "own, and without one the adapter answers like the base.\n"
                f"  Name a client with --client: {', '.join(sorted(self.summary['clients']))}."
            )

    def _load_as(self, client: str | None) -> LoadedModel:
        adapter = self._adapter_of(client)
        self.check_base()
        return self._load(self.config, adapter)

    def _adapter_of(self, client: str | None) -> AdapterState:
        """The result, or what a client has made of it."""
        adapter = self.adapter()
        if client is None:
            return adapter
        folder = RunFolder.open(self.path)
        return as_a_client_has_it(folder, client, adapter, self.summary["clients"])

    def _load(self, run: RunConfig, adapter: AdapterState) -> LoadedModel:
        if run.task != "prefer":  # the result replaces it; only a preference's reference needs it
            run = run.model_copy(update={"adapter": run.adapter.model_copy(update={"start": None})})
        loaded = load_for(run)
        head, known = loaded.head_modules, layout_of(loaded.parameters)
        if head is not None and run.adapter.head == "freeze":
            # the head is saved because the adapter needs it, but it is still as it was drawn
            adapter = {name: t for name, t in adapter.items() if not head.holds(name)}
        adapter = without_frozen(loaded.model, loaded.kind, adapter)
        try:
            if not run.algorithm.facts.residual:
                # another rank than the recipe's would be scaled wrongly, and be another function
                own = {n: t.to(loaded.parameters[n]) for n, t in adapter.items() if n in known}
                check_same_layout({**adapter, **own}, known, who="adapter for this model")
            write_adapter(loaded, adapter)
        except UpdateError as error:
            raise ModelError(
                f"{self.path / 'adapter'} does not fit {run.model.name}: {error}\n"
                "  Restore the run's own recipe and adapter."
            ) from error
        return loaded

    def check_base(self, *, there: bool = False) -> None:
        """Refuse a base that has changed; with `there`, also one that is gone."""
        model = self.config.model
        newest = is_hub_id(model.name) and model.revision is None  # which the recipe asks for
        if newest and not there:
            return
        try:
            folder = folder_of_base(model)
        except OSError as error:  # the path of a missing folder may look like a hub id
            raise ModelError(
                f"the base '{model.name}' is gone: it is neither a folder here nor on the hub.\n"
                "  Restore it, or use a machine that can reach it."
            ) from error
        if newest and not any(folder.glob("*.safetensors")):
            return  # fetched when it is loaded
        provenance = self._folder().read_json("provenance.json")
        if content_hash(folder) != provenance["base"]["sha256"]:
            raise ModelError(
                f"{model.name} is not the base that {self.path} was trained on: its files have "
                "changed.\n  Restore them, or train again."
            )

    @public
    def export(
        self,
        kind: ExportKind = "peft",
        *,
        to: Path | str | None = None,
        gguf_type: GgufType | None = None,
        with_base: bool = False,
        push: str | None = None,
        public: bool = False,
        client: str | None = None,
        progress: Progress | None = None,
    ) -> Path:
        """Write the result in a form that others can load, with a card that says where it is from.

        Args:
            kind: "peft": the adapter, tokenizer and chat template. "merged": the adapter merged
                into the unquantised base, as a plain model folder. "gguf": the same as a single
                file for llama.cpp, for models of the Llama family.
            to: The folder to create; by default export/<kind> in the run folder. Never overwritten.
            gguf_type: How a GGUF file stores matrices; by default f16.
            with_base: "peft": also copy the base, so that AutoPeftModel finds it in the folder.
            push: OWNER/NAME of a hub repository to upload it to, as the user who is logged in.
            public: Whether everyone may read that repository.
            client: Export the result as this client has it, see `load`. It cannot be pushed.
            progress: Receives progress messages; silent by default.

        Returns:
            The folder.

        Raises:
            ConfigError: Invalid arguments, or nobody is logged in to the hub.
            ModelError: The base is gone or has changed, or this run cannot be exported this way.
            RunFolderError: The run is not finished, or the folder exists.
            DiskError: The folder cannot be written.
            SilotuneError: The upload failed; the folder stays.
        """
        progress = progress or Progress()
        check_request(
            *(self.config, kind),
            gguf_type=gguf_type,
            with_base=with_base,
            push=push,
            public=public,
            client=client,
        )
        self._check_whole(client)
        _, adapter = self.summary, self._adapter_of(client)  # both raise if it is not finished
        self.check_base(there=True)
        api = hub_login() if push is not None else None
        name = kind if client is None else f"{kind}-{folder_name(client)}"
        place = export_run(
            self.path,
            kind,
            Path(to) if to is not None else self.path / "export" / name,
            gguf_type=gguf_type or GGUF_DEFAULT,
            client=client,
            with_base=with_base,
            load=lambda run: self._load(run, adapter),
            progress=progress,
        )
        if push is not None:
            progress.note(f"pushing to {push}")
            progress.note(f"pushed: {push_folder(api, place, push, public=public)}")
        return place

    @public
    def ask(
        self,
        question: str,
        *,
        base: bool = False,
        client: str | None = None,
        max_new_tokens: int = 128,
    ) -> str:
        """Answer a question with the trained adapter, as a client has it, or with the base.

        The system text and the template are those of training. With the task classify, `question`
        is the text to classify. The answer is its label and the probability that the model assigns.

        Args:
            question: One question, or the text to classify.
            base: Ask the untouched base.
            client: Ask the result as this client has it; see `load`.
            max_new_tokens: Maximum length of the answer, in tokens, at least 1.

        Returns:
            The answer. Decoding is greedy: the most likely token is chosen each time.

        Raises:
            ConfigError: The question is too long, the base has no head to answer with, or both
                the base and a client are asked; see also `load`.
        """
        if base and client is not None:
            raise ConfigError("the base is the same for all clients.\n  Leave out one of the two.")
        only: Speaker = "base" if base else "federated"
        chat = self.chat(only=only, client=client, max_new_tokens=max_new_tokens)
        return chat.say(question)[only]

    @public
    def chat(
        self,
        *,
        only: Speaker | None = None,
        client: str | None = None,
        max_new_tokens: int = 128,
    ) -> Chat:
        """Start a conversation with the base and the federated model, side by side.

        The model is loaded once. If all weights were trained, the base is a separate model and both
        are kept in memory. A classifier's base has no head, so only the federated model answers.

        Args:
            only: Ask only this one.
            client: In place of the federated model, ask it as this client has it; see `load`.
            max_new_tokens: Maximum length of an answer, in tokens.

        Raises:
            ConfigError: Only the base is asked, and it has no head.
            ModelError: See `load`.
        """
        run = self.config
        if run.task == "classify":
            if only == "base":
                raise ConfigError(f"{NO_HEAD}.\n  Ask without --base, and without --only base.")
            only = "federated"
        full = run.adapter.kind == "full"
        if only != "base":
            self._check_whole(client)
        result = None if full and only == "base" else self._load_as(client)
        base = load_for(run) if full and only != "federated" else result
        both = zip(SPEAKERS, (base, result), strict=True)
        models = {name: m for name, m in both if m is not None and only in (None, name)}
        return Chat(Speakers(run, models, max_new_tokens))
