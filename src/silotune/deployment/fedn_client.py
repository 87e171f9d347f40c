"""Experimental: the same client behind the two callbacks of a FEDn client.

FEDn (Scaleout) brings its own transport and server. Its models are lists of arrays without names,
in an npz file, and its clients send back a model, not a change. So the adapter's tensors are
numbered in the order of their names, and the change is added to what was received. FEDn's mean of
models, weighted by the numbers of examples, is then FedAvg of changes, as long as the server's step
is 1.

    from fedn.network.clients.fedn_client import FednClient
    from silotune.deployment.fedn_client import Callbacks

    own = Callbacks("client.toml", "hospitals")
    client = FednClient(train_callback=own.train, validate_callback=own.validate)

The client's own configuration and limits apply as everywhere. Only the callbacks are tested: FEDn's
server needs databases that are not available here. There is no extra for it: FEDn 0.33 requires
click 8.1.8 and silotune a later one, so pip installs both only with --no-deps for one of them.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from silotune.core.errors import ConfigError, UpdateError
from silotune.core.types import Failure, Score, Update
from silotune.core.wording import counted
from silotune.federation.client_config import load_client_config
from silotune.recipes.algorithm import chosen_algorithm
from silotune.recipes.parse import load_recipe
from silotune.recipes.schema import RunConfig
from silotune.runtime import wire
from silotune.runtime.flower.submit import without_places
from silotune.runtime.payload import Parcel
from silotune.runtime.real_client import Deployed
from silotune.workflows.plan.shapes import build_shapes


class Callbacks:
    """The callbacks for FEDn. Keep one object for the client's lifetime: it loads the base once."""

    def __init__(self, config: Path | str, recipe: Path | str, overrides: Sequence[str] = ()):
        """Only shapes are loaded.

        Args:
            config: The client's own configuration.
            recipe: A shipped name or a TOML file, the same at all clients.
            overrides: Dotted `key=value` texts on top of it.

        Raises:
            ConfigError: The recipe needs more from the server than FEDn's mean.
        """
        run = load_recipe(recipe, overrides)
        _check_plain(run)
        run = without_places(run)
        self._recipe = run.model_dump_json(serialize_as_any=True)
        self._run_id = hashlib.sha256(self._recipe.encode()).hexdigest()[:32]
        self._client = Deployed(Path(config))
        own = load_client_config(Path(config))
        model = run.model.model_copy(update={"name": own.model} if own.model else {})
        shapes = build_shapes(run.model_copy(update={"model": model})).parameters
        self.names = sorted(shapes)
        """The adapter's tensors in the order of the arrays of a model."""
        self._shapes = {name: list(shapes[name].shape) for name in self.names}
        self._round = 0

    def train(self, model: io.BytesIO, settings: Mapping[str, Any]) -> tuple[io.BytesIO, dict]:
        """Train a round on a model that FEDn sent.

        Args:
            model: The global model, npz.
            settings: FEDn's own for this session. Not used: the recipe has all that is needed.

        Returns:
            The client's model, and what FEDn's server wants to know about its training.

        Raises:
            UpdateError: The model does not fit this recipe, or this client could not train; the
                reason is in its log.
        """
        del settings
        self._round += 1
        arrays = self._read(model)
        update = self._ask("train", arrays)
        assert isinstance(update, Update)
        trained = [
            array + update.delta[name].numpy().reshape(array.shape)
            for name, array in zip(self.names, arrays, strict=True)
        ]
        about = {"num_examples": update.num_examples, **update.metrics}
        return write_model(trained), {"training_metadata": about}

    def validate(self, model: io.BytesIO) -> dict[str, float]:
        """Score a model that FEDn sent on this client's held-out rows.

        Raises:
            UpdateError: As in `train`.
        """
        score = self._ask("evaluate", self._read(model))
        assert isinstance(score, Score)
        return {"loss": score.loss_sum / score.num_tokens, "num_tokens": score.num_tokens}

    def _ask(self, kind: str, arrays: Sequence[np.ndarray]) -> Update | Score:
        tensors = [("adapter", name, shape) for name, shape in self._shapes.items()]
        about = {"round": max(1, self._round), "score": False, "tensors": tensors}
        asked = {"kind": kind, "recipe": self._recipe, "run": self._run_id, "parcel": about}
        values = np.concatenate([array.reshape(-1) for array in arrays]).view(np.uint8)
        reply = self._client.answer(Parcel(asked, values))
        answer = wire.decode_answer(reply, self._client.name, bytes_down=values.nbytes)
        if isinstance(answer, Failure):
            raise UpdateError(f"{answer.code}: {answer.place}\n  {answer.fix}")
        return answer

    def _read(self, model: io.BytesIO) -> list[np.ndarray]:
        with np.load(model, allow_pickle=False) as file:
            found = [file[key].astype(np.float32) for key in sorted(file.files, key=int)]
        expected = list(self._shapes.values())
        if [list(array.shape) for array in found] != expected:
            raise UpdateError(
                f"the model has {counted(len(found), 'array')} and this recipe's adapter "
                f"{len(expected)}, or their shapes differ.\n"
                "  Give FEDn a first model made from this recipe: see `first_model`."
            )
        return found


def first_model(recipe: Path | str, overrides: Sequence[str] = ()) -> io.BytesIO:
    """The model that FEDn's server starts with: the recipe's first adapter.

    Raises:
        SilotuneError: The recipe has a mistake, or the base cannot be loaded.
    """
    from silotune.federation.recipe_model import load_for
    from silotune.models.loading import read_adapter

    adapter = read_adapter(load_for(load_recipe(recipe, overrides)))
    return write_model([adapter[name].numpy() for name in sorted(adapter)])


def write_model(arrays: Sequence[np.ndarray]) -> io.BytesIO:
    """A model as FEDn's numpyhelper reads it: arrays named by number."""
    file = io.BytesIO()
    named: dict[str, Any] = {str(n): array for n, array in enumerate(arrays)}
    np.savez(file, **named)
    file.seek(0)
    return file


def _check_plain(run: RunConfig) -> None:
    """Refuse what FEDn's mean of models cannot do."""
    wrong: list[str] = []
    plain = chosen_algorithm(run.algorithm) in ("fedavg", "fedprox", "ffa_lora")
    if not plain or getattr(run.algorithm, "server_lr", 1.0) != 1.0:
        wrong.append(
            "[algorithm] needs silotune's server: use fedavg or fedprox, with server_lr = 1"
        )
    if getattr(run.algorithm, "weights", "examples") != "examples":
        wrong.append("algorithm.weights: FEDn weights clients by examples; set it to 'examples'")
    if run.privacy.unit != "none" and not run.privacy.is_at_client:
        wrong.append(
            "privacy.unit = 'client': FEDn's server adds no noise; set noise_at = 'client'"
        )
    if run.task == "prefer" and run.adapter.start is not None:
        wrong.append(
            "adapter.start: FEDn does not say which round it is, so a client that joins late would "
            "not have the reference of its preferences"
        )
    if wrong:
        raise ConfigError("\n  ".join(["FEDn's server takes a plain mean:", *wrong]))
