"""Who a real client takes for whom: a certificate of the authority, and a pinned fingerprint."""

import datetime
import json

import pytest
import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from silotune.core.errors import ConfigError, Declined
from silotune.deployment.consortium.certificates import (
    fingerprint,
    new_authority,
    new_key,
    pem,
)
from silotune.federation.client_config import ClientConfig, load_client_config
from silotune.federation.client_recipe import own_recipe
from silotune.privacy.secure_sum.member import Advert
from silotune.privacy.secure_sum.shamir import SHARE_BYTES
from silotune.recipes.parse import parse
from silotune.runtime import sum_wire
from silotune.runtime.identity import Unknown, add_throwaways, identity_of, own_fingerprint
from tests.consortium import Kits

NAMES = ("north", "south", "east", "west")
TEXT = b"keys of round 1"


class Consortium(Kits):
    """Four clients; nobody's roster is missing."""

    def identity(self, name, **sums):
        own = {"roster": self.others(name), **sums}
        config = ClientConfig.model_validate(
            {"name": name, "data": {"path": "x"}, "secure_sum": own}
        )
        return identity_of(self.places[name] / "client.toml", config)


@pytest.fixture
def four(tmp_path):
    return Consortium({name: tmp_path / name for name in NAMES})


def test_four_clients_of_a_consortium_know_each_other(four):
    tags = {name: four.identity(name) for name in NAMES}
    shown = {name: tag.credential for name, tag in tags.items()}
    for reader in NAMES:
        found = tags[reader].verifiers(shown)
        assert found.keys() == set(NAMES)
        for name in NAMES:
            signature = tags[name].sign(TEXT)
            assert found[name](TEXT, signature)
            assert not found[name](TEXT + b"!", signature)
            assert not found[name](TEXT, b"nonsense")
            other = NAMES[NAMES.index(name) - 1]
            assert not found[name](TEXT, tags[other].sign(TEXT))


def test_a_server_with_the_authoritys_key_cannot_invent_a_client_or_another_key(four):
    mine = new_key()
    north = four.identity("north")
    with pytest.raises(Unknown, match="'mallory' is not on this client's roster"):
        north.verifiers({"mallory": four.certificate("mallory", mine)})
    with pytest.raises(Unknown) as error:
        north.verifiers({"south": four.certificate("south", mine)})
    assert fingerprint(mine.public_key()) in str(error.value)
    assert f"this client's roster says {four.roster['south']}" in str(error.value)
    with pytest.raises(Unknown, match="has the fingerprint"):
        north.verifiers({"north": four.certificate("north", mine)})


def test_a_pinned_key_needs_a_valid_certificate_that_names_its_client(four):
    north, key = four.identity("north"), four.keys["south"]
    other = new_authority("demo", signer := new_key())
    now = datetime.datetime.now(datetime.UTC)
    late = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "south")]))
        .issuer_name(four.authority.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=3))
        .not_valid_after(now - datetime.timedelta(days=1))
        .sign(four.signer, hashes.SHA384())
    )
    for text, said in (
        (four.certificate("south", key, other, signer), "is not from this consortium's authority"),
        (four.certificate("east", key), "names another client"),
        (pem(late), "has expired"),
        ("nonsense", "is not from this consortium's authority"),
    ):
        with pytest.raises(Unknown, match=said):
            north.verifiers({"south": text})


def test_a_client_without_a_roster_says_what_belongs_there_and_its_own_fingerprint(four):
    with pytest.raises(Declined) as error:
        four.identity("north", roster={})
    assert "[secure_sum] roster in its client.toml is empty" in str(error.value)
    assert four.roster["north"] in str(error.value)
    with pytest.raises(Declined, match="gives 'north' another fingerprint than that of its own"):
        four.identity("north", roster={**four.roster, "north": four.roster["east"]})
    four.identity("north", roster=four.roster)


def test_a_key_that_others_may_read_or_that_is_missing_is_an_error(four, tmp_path):
    (tmp_path / "north" / "key.pem").chmod(0o644)
    with pytest.raises(ConfigError, match="can be read by other users"):
        four.identity("north")
    with pytest.raises(ConfigError, match=r"\[secure_sum\] key"):
        four.identity("south", key="none.pem")


def test_a_fingerprint_is_read_with_or_without_blanks_short_or_whole(four):
    def config(**sums):
        table = {"name": "north", "data": {"path": "x"}, "secure_sum": sums}
        return ClientConfig.model_validate(table)

    text = four.roster["south"]
    for given in (text, text.upper(), text.replace(" ", ""), text.replace(" ", ":")):
        assert config(roster={"south": given}).secure_sum.roster["south"] == text.replace(" ", "")
    for wrong in (text[:-1], text + "00", "south"):
        with pytest.raises(ValueError, match="eight groups of four hexadecimal digits"):
            config(roster={"south": wrong})
    with pytest.raises(ValueError, match="required needs roster"):
        config(required=True)
    with pytest.raises(ValueError, match="greater than or equal to 3"):
        config(min_cohort=2)


def test_a_client_that_requires_secure_sums_declines_a_recipe_without_them(four):
    table = {
        "rounds": 1,
        "data": {"path": "medquad_mini"},
        "evaluate": {"every": 0},
        "runtime": {"name": "flower"},
    }
    own = ClientConfig.model_validate(
        {
            "name": "north",
            "data": {"path": "x"},
            "secure_sum": {"required": True, "roster": {"south": four.roster["south"]}},
        }
    )
    with pytest.raises(Declined, match=r"secure_sum.kind must be 'masks': this client requires it"):
        own_recipe(parse(table), own)
    sums = {"kind": "masks", "range": 1.0}
    own_recipe(parse({**table, "secure_sum": sums}), own)
    nobody = parse({**table, "secure_sum": sums})
    without_masks = nobody.model_copy(
        update={"secure_sum": nobody.secure_sum.model_copy(update={"simulate": True})}
    )
    with pytest.raises(Declined, match=r"secure_sum\.simulate"):
        own_recipe(without_masks, own)


def test_keys_and_shares_take_about_two_kilobytes_for_a_client_and_another_one(four):
    """The number in docs/secure-sums.md: keys, shares up and down, and a share that opens."""
    advert = Advert(bytes(32), bytes(32), bytes(32), four.identity("north").sign(TEXT))
    keys = sum_wire.encode_keys(advert, four.identity("north").credential)
    hidden = sum_wire.encode_shares({"north": bytes(sum_wire.HIDDEN_BYTES)})
    opened = sum_wire.encode_shares({"north": bytes(SHARE_BYTES)})
    size = sum(len(json.dumps(text)) for text in (keys, hidden, hidden, opened))
    assert size == pytest.approx(2000, rel=0.2)


def test_throwaway_keys_of_clients_on_one_machine_fit_together(tmp_path):
    configs = {}
    for name in ("a", "Zürich 1"):
        path = tmp_path / str(len(configs)) / "client.toml"
        path.parent.mkdir()
        path.write_text(tomli_w.dumps({"name": name, "data": {"path": "rows.jsonl"}}))
        configs[name] = path
    add_throwaways(configs)
    tags = {name: identity_of(path, load_client_config(path)) for name, path in configs.items()}
    shown = {name: tag.credential for name, tag in tags.items()}
    for tag in tags.values():
        assert all(f(TEXT, tags[n].sign(TEXT)) for n, f in tag.verifiers(shown).items())
    path = configs["a"]
    own = load_client_config(path)
    assert own_fingerprint(path, own).replace(" ", "") == own.secure_sum.roster["a"]
