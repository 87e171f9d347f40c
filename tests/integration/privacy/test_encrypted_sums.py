"""A run with homomorphic encryption is the plain run within its precision, at the price it says."""

import sys

import pytest
import torch

import silotune
from silotune.core.errors import ConfigError, QuorumError, UpdateError
from silotune.federation import encrypted_sum, secure_sum
from silotune.federation.client import take_part
from silotune.federation.spool import Spool
from silotune.privacy.secure_sum import ckks
from silotune.runtime import inprocess
from tests.conftest import hospital_rows, write_jsonl, write_tiny_recipe

CKKS = ["secure_sum.kind=ckks", "secure_sum.range=0.25"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model):
    place = tmp_path_factory.mktemp("ckks")
    made = write_tiny_recipe(place, tiny_model)
    write_jsonl(place / "hospitals.jsonl", hospital_rows(5, 6))
    return made


@pytest.fixture
def _tenseal():
    pytest.importorskip("tenseal", reason="needs the extra ckks")


def adapter_of(recipe, place, *keys):
    return silotune.run(recipe, list(keys), out=place).adapter()


@pytest.mark.usefixtures("_tenseal")
@pytest.mark.parametrize("keys", [[], ["algorithm.weights=uniform", "algorithm.name=fedavgm"]])
def test_the_adapter_is_that_of_the_plain_run_and_the_plan_counts_its_bytes(recipe, tmp_path, keys):
    keys = [*keys, "rounds=2"]
    done = silotune.run(recipe, [*CKKS, *keys], out=tmp_path / "ckks")
    usual = adapter_of(recipe, tmp_path / "usual", *keys)
    assert max(float((t - usual[n]).abs().max()) for n, t in done.adapter().items()) < 1e-6
    planned = silotune.plan(recipe, [*CKKS, *keys], measured=False).traffic
    assert planned.bytes_up == done.summary["bytes_up"]
    assert planned.up % ckks.CIPHERTEXT_BYTES == 0


@pytest.mark.usefixtures("_tenseal")
def test_what_reaches_the_server_are_ciphertexts_and_no_norm(recipe, tmp_path, monkeypatch):
    seen, add = [], Spool.add

    def watch(self, update):
        seen.append(update)
        add(self, update)

    monkeypatch.setattr(Spool, "add", watch)
    silotune.run(recipe, [*CKKS, "rounds=1"], out=tmp_path / "run")
    assert len(seen) == 5
    for update in seen:
        assert list(update.delta) == [encrypted_sum.TENSOR]
        assert update.delta[encrypted_sum.TENSOR].dtype == torch.uint8
        assert "delta_norm" not in update.metrics
        assert update.metrics[secure_sum.CUT] == 0


@pytest.mark.usefixtures("_tenseal")
def test_any_client_may_be_missing_as_long_as_min_cohort_are_there(recipe, tmp_path, monkeypatch):
    """Nothing has to be rebuilt for those that are gone; but a sum over few says too much."""
    gone = {"hospital-1"}

    def take(worker, data, broadcast, own, *, count=None):
        if data.name in gone:
            raise UpdateError(f"client '{data.name}' fails")
        return take_part(worker, data, broadcast, own, count=count)

    monkeypatch.setattr(inprocess, "take_part", take)
    keys = [*CKKS, "rounds=1", "sampling.quorum=0.2"]
    silotune.run(recipe, keys, out=tmp_path / "four")
    gone.add("hospital-2")
    with pytest.raises(QuorumError, match="3 usable updates of 5, and a secure sum needs 4"):
        silotune.run(recipe, keys, out=tmp_path / "three")


@pytest.mark.usefixtures("_tenseal")
def test_numbers_that_are_no_ciphertexts_end_the_run_with_the_clients_name(
    recipe, tmp_path, monkeypatch
):
    """A sum with nonsense in it would be nonsense everywhere."""
    hide = encrypted_sum.SimulatedEncryption.hide

    def broken(self, update):
        sent = hide(self, update)
        if update.client == "hospital-3":
            sent.delta[encrypted_sum.TENSOR].zero_()
        return sent

    monkeypatch.setattr(encrypted_sum.SimulatedEncryption, "hide", broken)
    with pytest.raises(UpdateError, match="'hospital-3', round 1: what it sent are no ciphertexts"):
        silotune.run(recipe, [*CKKS, "rounds=1"], out=tmp_path / "run")


@pytest.mark.usefixtures("_tenseal")
def test_check_says_who_has_the_key_and_what_it_costs(recipe):
    (told,) = [w for w in silotune.check(recipe, CKKS).warnings if "ckks" in w]
    assert "all clients share one secret key" in told
    assert "eight times as large as float32" in told


@pytest.mark.usefixtures("_tenseal")
def test_sums_have_no_stronger_guarantee_where_any_client_can_open_each_change(recipe, tmp_path):
    private = ["privacy.unit=client", "privacy.noise_at=client", "privacy.noise_multiplier=1"]
    found = silotune.check(
        recipe, [*CKKS, *private, "privacy.delta=0.01", "algorithm.weights=uniform"]
    ).promise
    assert found["sums"] == {"why_not": ckks.KEYS_NOTE}
    assert not found["clients"]["hospital-0"]["discrete"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["secure_sum.kind=ckks"], "secure_sum.range: is missing"),
        ([*CKKS, "runtime.name=flower-simulation"], "'ckks' cannot be used with runtime.name"),
        ([*CKKS, "runtime.name=flower"], "Use 'masks', which hides more"),
        ([*CKKS, "secure_sum.simulate=true"], 'only has an effect with kind = "masks"'),
        ([*CKKS, "secure_sum.colluding=2"], 'only has an effect with kind = "masks"'),
        ([*CKKS, "algorithm.name=median"], "'median' cannot be used with secure sums"),
        ([*CKKS, "algorithm.name=flexlora"], "no weighted sum of the changes"),
        (
            [*CKKS, "privacy.unit=client", "privacy.noise_multiplier=1", "privacy.delta=1e-3"],
            "the server cannot clip a change",
        ),
    ],
)
def test_what_cannot_be_encrypted_is_refused_with_the_reason(recipe, tmp_path, keys, said):
    with pytest.raises(ConfigError) as error:
        silotune.run(recipe, keys, out=tmp_path / "run")
    assert said in str(error.value)


def test_without_the_library_check_says_what_to_install(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "tenseal", None)
    with pytest.raises(ConfigError, match="make env EXTRAS=ckks"):
        silotune.check(recipe, CKKS)
