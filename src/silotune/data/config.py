"""[data]: which rows to train on, and how they become what a task learns.

Only the settings; `reading` does what they say.
"""

from datetime import date

from pydantic import Field, field_validator, model_validator

from silotune.core.types import Config
from silotune.data.conversations import parse_template

HUB_ONLY = ("name", "split", "eval_split", "revision")
"""Settings that only apply to a data set on the hub."""


class DataConfig(Config):
    """Which rows to train on, and how they become conversations."""

    path: str = Field(min_length=1)
    """A named example (medquad_mini, medquad_pairs), a file, a folder, or a data set on the Hugging
    Face hub."""
    eval_path: str | None = Field(default=None, min_length=1)
    """A file or folder with the held-out rows, in the same layout as `path`; replaces
    `eval_fraction`."""
    eval_split: str | None = Field(default=None, min_length=1)
    """Split with the held-out rows, for example "test": of a hub data set, or of a local folder
    with parts such as train and test; replaces `eval_fraction`."""
    eval_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of its rows that each client holds out for scoring. A keyed hash decides each row by
    itself, so the number varies around this share; at least one row."""
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of its remaining rows that each client sets aside for choices, decided row by row like
    the held-out part. If above 0, a run scores these rows instead of the held-out ones, which
    `silotune compare` and `silotune evaluate` score once, at the end."""
    name: str | None = Field(default=None, min_length=1)
    """Configuration of a hub data set."""
    split: str = Field(default="train", min_length=1)
    """Split of a hub data set; a slice such as "train[:500]" is fine."""
    revision: str | None = Field(default=None, min_length=1)
    """Commit or tag of a hub data set; a full commit makes a run repeatable."""
    prompt: str | None = Field(default=None, min_length=1)
    """Template with {column} placeholders for the user's turn, for rows in an unknown format."""
    completion: str | None = Field(default=None, min_length=1)
    """Template with {column} placeholders for the answer; goes with `prompt`."""
    system: str | None = Field(default=None, min_length=1)
    """System text for every conversation that has none."""
    template: str = Field(default="auto", min_length=1)
    """How a conversation becomes text, for training, scoring and answers alike. auto: the model's
    own chat template, or plain if it has none. three-block: "### Instruction:" with the system
    text, "### Input:" with the question, "### Response:". alpaca, vicuna and flowertune: the
    templates of these projects. Or a file with your own Jinja chat template, which is saved with
    the run."""
    date: str | None = None
    """The day, as YYYY-MM-DD, for chat templates that write today's date. If absent, the day on
    which the run starts; the run keeps it."""
    max_rows: int | None = Field(default=None, ge=1)
    """Maximum number of training rows per client, chosen by a keyed hash of each row."""
    max_eval_rows: int | None = Field(default=None, ge=1)
    """Maximum number of held-out rows per client, chosen by a keyed hash of each row."""
    label: str | None = Field(default=None, min_length=1)
    """A column whose distribution at each client is shown in the report, for example the kind of
    question. With task = "classify", the column of the classes; "label" if absent."""
    labels: tuple[str, ...] | None = Field(default=None, min_length=2)
    """classify: all classes, in the order of the model's outputs. If absent, the classes of all
    rows, sorted. Required with real clients, because no one else can read their rows."""
    text: str | None = Field(default=None, min_length=1)
    """text and classify: the column of the text. If absent, "text"; with classify, found by the
    usual names (text, sentence, ...)."""
    text_pair: str | None = Field(default=None, min_length=1)
    """classify: the column of the second text, for pairs; goes with `text`."""
    skip_empty: bool = False
    """Skip rows that lack a question, an answer or a text, and pairs whose answers are the same;
    report how many, instead of stopping."""
    split_seed: int | None = Field(default=None, ge=0)
    """Seed for the partition into clients and the held-out rows; the run's seed if absent. Set it
    to run several seeds on the same held-out rows."""

    @property
    def scored_part(self) -> str:
        """Which rows a run scores: "validation" if there are any, otherwise "held-out"."""
        return "validation" if self.validation_fraction > 0 else "held-out"

    @field_validator("date", mode="before")
    @classmethod
    def _day_as_text(cls, value: object) -> object:
        return value.isoformat() if isinstance(value, date) else value  # TOML has dates

    @model_validator(mode="after")
    def _no_contradiction(self) -> "DataConfig":
        mistakes: list[str] = []
        # Compared with the default: a resolved recipe sets every field and must remain valid.
        given = [key for key in ("eval_path", "eval_split") if getattr(self, key) is not None]
        given += ["eval_fraction"] * is_changed(self, "eval_fraction")
        if len(given) > 1:
            count = "both" if len(given) == 2 else "all"
            mistakes.append(f"give {' or '.join(given)}, not {count}")
        if self.eval_path == self.path:
            mistakes.append("eval_path is the same as path; held-out rows must not be trained on")
        if self.eval_split is not None and _overlap(self.split, self.eval_split):
            mistakes.append(
                "eval_split shares rows with split; held-out rows must not be trained on"
            )
        if (self.prompt is None) != (self.completion is None):
            mistakes.append("prompt and completion belong together; set both")
        has_placeholder: dict[str, bool] = {}
        for key, template in (("prompt", self.prompt), ("completion", self.completion)):
            try:
                has_placeholder[key] = any(column for _, column in parse_template(template or ""))
            except ValueError as error:
                mistakes.append(f"{key} {error}")
        if self.date is not None and not _is_day(self.date):
            mistakes.append("date is no day of the calendar; write it as YYYY-MM-DD")
        if self.text_pair is not None and self.text is None:
            mistakes.append("text_pair goes with text; set both")
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            mistakes.append("labels contains a label twice")
        if self.completion is not None and has_placeholder.get("completion") is False:
            mistakes.append("completion has no {column}, so every row would teach the same answer")
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self


def _is_day(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def is_changed(cfg: DataConfig, key: str) -> bool:
    """Whether a key differs from its default."""
    return getattr(cfg, key) != DataConfig.model_fields[key].default


def _overlap(split: str, other: str) -> bool:
    """Whether two hub splits certainly share rows: the same split, or a split and its slice."""
    return split == other or split.startswith(f"{other}[") or other.startswith(f"{split}[")
