"""The recipe: RunConfig, assembled from the configs of the parts.

A field is the only place for its default, its help text and its range. This file loads no model and
no data.
"""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from silotune.compression.config import WireConfig
from silotune.core.types import Config
from silotune.data.partition import PartitionConfig
from silotune.data.reading import DataConfig
from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig
from silotune.privacy.base import PrivacyConfig
from silotune.privacy.secure_sum.config import SecureSumConfig
from silotune.recipes.algorithm import ALGORITHM_CONFIGS, AnyAlgorithmConfig
from silotune.recipes.sections import (
    BudgetConfig,
    CheckpointConfig,
    CompareConfig,
    FinishConfig,
    PlanConfig,
    ReportConfig,
    RuntimeConfig,
    SamplingConfig,
    StopConfig,
    SweepConfig,
)
from silotune.recipes.tracks import TrackName
from silotune.training.loop import TrainConfig
from silotune.training.scoring import EvaluateConfig
from silotune.training.server_training import DistillConfig, ServerConfig
from silotune.training.tasks.prefer import PreferConfig


class RunConfig(Config):
    """A recipe: everything that decides what a run computes."""

    seed: int = Field(default=17, ge=0)
    """Every random draw of a run is derived from it, by name."""
    rounds: int = Field(ge=1)
    """Rounds of training and aggregation."""
    task: Literal["instruct", "classify", "text", "prefer"] = "instruct"
    """instruct: answer like the rows do. classify: assign one of several labels to a text. text:
    continue texts like those of the rows, of which every token is learned (continued
    pre-training). prefer: of two answers to a prompt, make the chosen one likelier than the
    rejected one (direct preference optimisation)."""
    track: TrackName | None = None
    """Follow the rules of this track of the FlowerTune LLM leaderboard: its data set, its number of
    clients, its limit for communication."""
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig
    partition: PartitionConfig | None = None
    sampling: SamplingConfig = SamplingConfig()
    train: TrainConfig = TrainConfig()
    prefer: PreferConfig = PreferConfig()
    algorithm: AnyAlgorithmConfig = Field(default_factory=lambda: ALGORITHM_CONFIGS["fedavg"]())
    privacy: PrivacyConfig = PrivacyConfig()
    secure_sum: SecureSumConfig = SecureSumConfig()
    wire: WireConfig = WireConfig()
    server: ServerConfig = ServerConfig()
    distill: DistillConfig = DistillConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    finish: FinishConfig = FinishConfig()
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)
    budget: BudgetConfig = BudgetConfig()
    stop: StopConfig = StopConfig()
    plan: PlanConfig = PlanConfig()
    report: ReportConfig = ReportConfig()
    compare: CompareConfig = CompareConfig()
    sweep: SweepConfig = SweepConfig()

    if not TYPE_CHECKING:  # checkers keep the signature that follows from the fields

        def __init__(self, **given: Any) -> None:
            try:
                super().__init__(**given)
            except ValidationError:
                from silotune.recipes.parse import parse

                parse(given, name="RunConfig")
                raise

        # pydantic's mark of an __init__ that validation does not call: `parse` needs its own errors
        __init__.__pydantic_base_init__ = True
