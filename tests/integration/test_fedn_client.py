"""The FEDn callbacks, called as FEDn's client calls them. Its server is a stand-in: a mean."""

import io
import json

import numpy as np
import pytest
import tomli_w

import silotune
from silotune.core.errors import ConfigError, UpdateError
from silotune.deployment.fedn_client import Callbacks, first_model
from silotune.results.saved_adapter import read_result
from tests.conftest import hospital_rows, write_jsonl, write_tiny_recipe

CLIENTS = ("hospital-0", "hospital-1")
KEYS = ["rounds=2", "data.max_rows=6"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model):
    made = tmp_path_factory.mktemp("fedn")
    write_tiny_recipe(made, tiny_model)
    for name in CLIENTS:
        rows = [r for r in hospital_rows() if r["source"] == name]
        write_jsonl(made / f"{name}.jsonl", rows)
        table = {
            "name": name,
            "state": f"state-{name}",
            "model": str(tiny_model),
            "data": {"path": f"{name}.jsonl"},
            "runtime": {"device": "cpu", "threads": 1},
        }
        (made / f"{name}.toml").write_text(tomli_w.dumps(table))
    rows = [r for r in hospital_rows() if r["source"] in CLIENTS]
    write_jsonl(made / "hospitals.jsonl", rows)
    return made


class StandIn:
    """What FEDn 0.33's client does around the callbacks, and its numpyhelper's running mean.

    Read in fedn/network/clients/fedn_client.py and fedn/utils/helpers/plugins/numpyhelper.py: a
    model is bytes, `settings` a dict from JSON, `training_metadata.num_examples` the weight.
    """

    def __init__(self, model: bytes) -> None:
        self.model = model

    def round(self, clients: list[Callbacks]) -> None:
        total, mean = 0, None
        for client in clients:
            settings = json.loads("{}").get("client_settings", {})
            out, meta = client.train(io.BytesIO(self.model), settings)
            json.dumps(meta)  # it travels as JSON
            arrays = self.load(out.getvalue())
            count = meta["training_metadata"]["num_examples"]
            total += count
            mean = (
                arrays
                if mean is None
                else [np.add(x, count * (y - x) / total) for x, y in zip(mean, arrays, strict=True)]
            )
        assert mean is not None
        file = io.BytesIO()
        np.savez(file, **{str(n): array for n, array in enumerate(mean)})
        self.model = file.getvalue()

    @staticmethod
    def load(data: bytes) -> list[np.ndarray]:
        with np.load(io.BytesIO(data)) as file:
            return [file[str(n)] for n in range(len(file.files))]


@pytest.fixture(scope="module")
def clients(place):
    return [Callbacks(place / f"{name}.toml", place / "tiny.toml", KEYS) for name in CLIENTS]


def test_two_rounds_by_fedn_learn_what_silotune_learns(place, clients):
    fedn = StandIn(first_model(place / "tiny.toml", KEYS).getvalue())
    for _ in range(2):
        fedn.round(clients)
    run = silotune.run(place / "tiny.toml", KEYS, out=place / "run")
    ours = read_result(run.path / "adapter")
    assert sorted(ours) == clients[0].names
    for name, theirs in zip(clients[0].names, StandIn.load(fedn.model), strict=True):
        # its running mean rounds in float32, ours in float64
        np.testing.assert_allclose(theirs, ours[name].numpy(), atol=1e-6)
    scores = [client.validate(io.BytesIO(fedn.model)) for client in clients]
    loss = sum(s["loss"] * s["num_tokens"] for s in scores) / sum(s["num_tokens"] for s in scores)
    assert loss == pytest.approx(run.summary["overall"]["federated_loss"], abs=1e-4)


def test_a_model_of_another_recipe_is_refused_before_anything_is_trained(place, clients):
    other = first_model(place / "tiny.toml", [*KEYS, "adapter.rank=3"])
    with pytest.raises(UpdateError, match="their shapes differ"):
        clients[0].train(other, {})


def test_a_clients_own_limits_count_here_too(place):
    text = (place / f"{CLIENTS[0]}.toml").read_text()
    (place / "strict.toml").write_text(text + "\n[limits]\nmax_rounds = 1\n")
    own = Callbacks(place / "strict.toml", place / "tiny.toml", KEYS)
    with pytest.raises(UpdateError, match=r"declined: .*does not take part"):
        own.train(first_model(place / "tiny.toml", KEYS), {})


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (["algorithm.server_lr=2.0"], "server_lr = 1"),
        (["algorithm.name=fedadam"], "use fedavg or fedprox"),
        (["algorithm.name=fedavgm"], "use fedavg or fedprox"),
        (["algorithm.name=median"], "use fedavg or fedprox"),
        (["algorithm.weights=uniform"], "FEDn weights clients by examples"),
        (["task=prefer", "adapter.start=runs/before"], "FEDn does not say which round"),
    ],
)
def test_what_a_plain_mean_cannot_do_is_refused(place, keys, text):
    with pytest.raises(ConfigError, match=text):
        Callbacks(place / f"{CLIENTS[0]}.toml", place / "tiny.toml", [*KEYS, *keys])
