"""Who is in a consortium, and how a client proves it: keys, requests, kits, folder and gates."""

import datetime
import json
import shutil
import ssl
import stat
import subprocess
import types

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from silotune.core.errors import ConfigError
from silotune.deployment.audit_log import check_log
from silotune.deployment.consortium.caddy import find_caddy
from silotune.deployment.consortium.certificates import (
    client_certificate,
    fingerprint,
    is_signed_by,
    name_of,
    new_authority,
    new_key,
    new_request,
    pem,
    prove,
    public_key,
    read_certificate,
    read_key,
    server_certificate,
    write_key,
)
from silotune.deployment.consortium.folder import Consortium, read_address
from silotune.deployment.consortium.gate import client_gate, server_gate, write_leaves
from silotune.deployment.consortium.kit import Request, read_kit, read_request_file, write_file
from silotune.deployment.join import init, renew, server_fingerprint, take_kit
from silotune.federation.operator_log import entries
from silotune.federation.roster import MEMBERS, Roster, is_consortium, names_in, write_members
from tests.conftest import hospital_rows, write_jsonl

needs_openssl = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="openssl, the independent judge, is not installed"
)


@pytest.fixture
def consortium(tmp_path):
    Consortium.create(tmp_path / "fl", name="hospitals", address="fl.example.org")
    return Consortium.open(tmp_path / "fl")


@pytest.fixture
def north(tmp_path):
    """A client's folder with its key and request."""
    init("north", tmp_path / "north")
    return tmp_path / "north"


def problem(call, *args, **keys) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args, **keys)
    return str(caught.value)


# --- keys and certificates -----------------------------------------------------------------------


def test_a_private_key_is_readable_only_by_its_owner_and_never_overwritten(tmp_path):
    path, key = tmp_path / "key.pem", new_key()
    write_key(path, key)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert fingerprint(read_key(path).public_key()) == fingerprint(key.public_key())
    assert "is never overwritten" in problem(write_key, path, new_key())
    path.chmod(0o640)
    assert f"chmod 600 {path}" in problem(read_key, path)


def test_a_certificate_whose_key_is_no_point_of_the_curve_is_an_error():
    """Such a certificate is read without a word; only its key is refused, in a library's words."""
    made = new_authority("hospitals", new_key())
    point = made.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    der = made.public_bytes(Encoding.DER)
    wrong = x509.load_der_x509_certificate(der.replace(point, point[:-8] + bytes(8)))
    assert "its key is damaged" in problem(public_key, wrong)


@needs_openssl
def test_openssl_accepts_the_certificates_for_their_use_and_no_other(tmp_path):
    """An independent judge: certificates that only we accept are worth nothing."""
    signer, key = new_key(), new_key()
    authority = new_authority("hospitals", signer)
    made = {
        "server": server_certificate(authority, signer, key, "fl.example.org"),
        "address": server_certificate(authority, signer, key, "10.1.2.3"),
        "client": client_certificate(authority, signer, key.public_key(), "north"),
    }
    (tmp_path / "ca.pem").write_text(pem(authority))
    for name, own in made.items():
        (tmp_path / f"{name}.pem").write_text(pem(own))

    def verify(name, *options) -> bool:
        words = ["openssl", "verify", "-x509_strict", "-CAfile", "ca.pem", *options, f"{name}.pem"]
        return subprocess.run(words, cwd=tmp_path, capture_output=True).returncode == 0

    server, client = ("-purpose", "sslserver"), ("-purpose", "sslclient")
    assert verify("server", *server, "-verify_hostname", "fl.example.org")
    assert not verify("server", *server, "-verify_hostname", "other.example.org")
    assert verify("address", *server, "-verify_ip", "10.1.2.3")
    assert verify("client", *client)
    assert not verify("client", *server), "a client must not pose as the server"
    assert not verify("server", *client)


def test_a_certificate_of_another_authority_of_the_same_name_is_not_ours():
    ours, theirs = new_key(), new_key()
    authority, other = new_authority("hospitals", ours), new_authority("hospitals", theirs)
    made = client_certificate(other, theirs, new_key().public_key(), "north")
    assert is_signed_by(made, other)
    assert not is_signed_by(made, authority)


@needs_openssl
def test_fingerprints_are_what_openssl_says_about_the_key(tmp_path):
    key = new_key()
    write_key(tmp_path / "key.pem", key)
    der = subprocess.run(
        ["openssl", "pkey", "-in", "key.pem", "-pubout", "-outform", "DER"],
        cwd=tmp_path,
        capture_output=True,
        check=True,
    ).stdout
    said = subprocess.run(
        ["openssl", "dgst", "-sha256", "-r"], input=der, capture_output=True, check=True
    ).stdout.decode()
    assert fingerprint(key.public_key()).replace(" ", "") == said[:32]


# --- requests and kits ---------------------------------------------------------------------------


def test_approval_makes_a_kit_that_matches_the_clients_key_and_holds_no_secret(
    consortium, north, tmp_path
):
    kit, told = consortium.approve(north / "request.toml")
    assert told == fingerprint(read_key(north / "key.pem").public_key())
    write_jsonl(tmp_path / "rows.jsonl", hospital_rows())
    joined = take_kit(kit, north, data=tmp_path / "rows.jsonl")
    assert joined.own.name == "north"
    assert joined.own.data.path == str(tmp_path / "rows.jsonl")
    assert server_fingerprint(joined.kit) == consortium.fingerprint()
    assert (joined.kit.host, joined.kit.port) == ("fl.example.org", 8443)
    for path in (kit, north / "request.toml"):
        assert "PRIVATE" not in path.read_text()
    # the second time --data is not needed, and what the operators wrote is kept
    own = north / "client.toml"
    own.write_text(own.read_text().replace("# max_rounds = 20", "max_rounds = 20"))
    assert take_kit(kit, north).own.limits.max_rounds == 20


HIDDEN = {"hiv": "+", "a \x7f\n\u2028 ]": 1, "x" * 300: 2}


@pytest.mark.parametrize(
    ("row", "usual"),
    [
        ({"question": "q", "answer": "a"}, ["question", "answer"]),
        ({"answer": "a", "question": "q", "label": "l"}, ["question", "answer"]),
        ({"messages": []}, ["messages"]),
        ({"instruction": "i", "output": "o", "input": "n"}, ["instruction", "input", "output"]),
        ({"instruction": "i", "output": "o"}, ["instruction", "output"]),
        ({"text": "t", "text_pair": "p", "label": 1}, ["text", "text_pair", "label"]),
        ({"city": "c"}, []),
    ],
)
def test_a_new_client_allows_only_the_columns_of_a_known_format(
    consortium, north, tmp_path, row, usual
):
    """What else the file holds is what a hospital would not think of: it is named, not allowed."""
    kit, _ = consortium.approve(north / "request.toml")
    write_jsonl(tmp_path / "rows.jsonl", [{**row, **HIDDEN}] * 2)
    own = take_kit(kit, north, data=tmp_path / "rows.jsonl").own
    assert list(own.limits.columns or ()) == usual
    assert own.limits.min_count == 5
    text = (north / "client.toml").read_text(encoding="utf-8")
    (others,) = (line for line in text.splitlines() if line.startswith("# not allowed so far: "))
    assert '"hiv"' in others


def test_a_new_client_whose_rows_cannot_be_read_is_told_about_columns(consortium, north, tmp_path):
    kit, _ = consortium.approve(north / "request.toml")
    (tmp_path / "rows.jsonl").write_text("no json")
    assert take_kit(kit, north, data=tmp_path / "rows.jsonl").own.limits.columns is None
    assert "# columns = " in (north / "client.toml").read_text()


def test_a_kit_does_not_match_another_key(consortium, north, tmp_path):
    kit, _ = consortium.approve(north / "request.toml")
    init("south", tmp_path / "south")
    assert "is for another key" in problem(take_kit, kit, tmp_path / "south")
    assert "holds no key" in problem(take_kit, kit, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda r, k: r.model_copy(update={"name": "south"}), "was signed for 'north'"),
        (lambda r, k: r.model_copy(update={"request": "nonsense"}), "is not a certificate request"),
        (lambda r, k: k, "is not a silotune request"),
    ],
)
def test_a_request_that_is_not_as_its_client_made_it_is_refused(
    consortium, north, tmp_path, change, text
):
    kit, _ = consortium.approve(north / "request.toml")
    asked = read_request_file(north / "request.toml")
    write_file(tmp_path / "changed.toml", change(asked, read_kit(kit)))
    assert text in problem(consortium.approve, tmp_path / "changed.toml")


def test_a_request_whose_key_was_exchanged_in_transit_is_refused(consortium, north, tmp_path):
    """The signature is the old key's: whoever inserts another key cannot make it."""
    asked = read_request_file(north / "request.toml")
    lines = asked.request.splitlines()
    middle = list(lines[2])
    middle[5] = "A" if middle[5] != "A" else "B"
    lines[2] = "".join(middle)
    broken = asked.model_copy(update={"request": "\n".join(lines) + "\n"})
    write_file(tmp_path / "broken.toml", broken)
    problem(consortium.approve, tmp_path / "broken.toml")
    assert not consortium.members()


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a b", "-a", "x" * 64, "a\n", "é"])
def test_a_name_that_could_be_a_path_is_refused(tmp_path, name):
    problem(init, name, tmp_path / "client")
    assert not (tmp_path / "client" / "key.pem").exists()
    key = new_key()
    asked = Request.model_construct(
        kind="silotune request", name=name, request=pem(new_request(name or "x", key))
    )
    (tmp_path / "r.toml").write_text(
        f"kind = 'silotune request'\nname = {json.dumps(name)}\nrequest = '''{asked.request}'''\n"
    )
    problem(read_request_file, tmp_path / "r.toml")


@pytest.mark.parametrize("part", ["authority", "certificate"])
def test_a_kit_whose_parts_do_not_belong_together_is_refused(consortium, north, tmp_path, part):
    kit, _ = consortium.approve(north / "request.toml")
    Consortium.create(tmp_path / "other", name="hospitals", address="fl.example.org")
    other, _ = Consortium.open(tmp_path / "other").approve(north / "request.toml")
    mixed = read_kit(kit).model_copy(update={part: getattr(read_kit(other), part)})
    write_file(tmp_path / "mixed.toml", mixed)
    assert "Ask the server's operators for the kit again" in problem(
        read_kit, tmp_path / "mixed.toml"
    )


def test_a_file_that_is_not_ours_is_refused_unread(tmp_path):
    for name, text in {"a": "x" * 200_000, "b": "[[[", "c": "name = 1", "d": "\x00"}.items():
        (tmp_path / name).write_text(text)
        assert str(tmp_path / name) in problem(read_kit, tmp_path / name)
    assert "cannot be read" in problem(read_kit, tmp_path / "missing")


# --- who is in -----------------------------------------------------------------------------------


def test_adding_and_removing_a_client_changes_no_other_file(consortium, north, tmp_path):
    consortium.approve(north / "request.toml")

    def files():
        found = [p for p in consortium.folder.rglob("*") if p.is_file()]
        found = [p for p in found if p.stem != "operators"]  # the log of what was done
        return {str(p.relative_to(consortium.folder)): p.read_bytes() for p in found}

    before = files()
    init("south", tmp_path / "south")
    consortium.approve(tmp_path / "south" / "request.toml")
    assert list(names_in(consortium.folder)) == list(consortium.members()) == ["north", "south"]
    assert {k: v for k, v in files().items() if "south" not in k} == before
    consortium.revoke("south")
    assert list(consortium.members()) == ["north"]
    assert {k: v for k, v in files().items() if "south" not in k} == before
    assert "Its members: north." in problem(consortium.revoke, "south")


def test_a_name_is_taken_until_it_is_revoked(consortium, north, tmp_path):
    consortium.approve(north / "request.toml")
    init("NORTH", tmp_path / "again")
    text = problem(consortium.approve, tmp_path / "again" / "request.toml")
    assert "silotune server revoke north" in text
    consortium.revoke("north")
    consortium.approve(tmp_path / "again" / "request.toml")
    assert list(consortium.members()) == ["NORTH"]


def test_a_revoked_key_comes_back_only_if_the_operators_say_so(consortium, north, tmp_path):
    """An old request is still intact after its key was stolen and revoked."""
    for _ in range(2):  # also the second time
        consortium.approve(north / "request.toml", again=True)
        consortium.revoke("north")
        text = problem(consortium.approve, north / "request.toml")
        assert "the key of 'north' was revoked" in text
        assert "--again" in text
    renamed = Request(name="other", request=pem(new_request("other", read_key(north / "key.pem"))))
    write_file(tmp_path / "other.toml", renamed)
    assert "was revoked" in problem(consortium.approve, tmp_path / "other.toml")
    consortium.approve(north / "request.toml", again=True)
    assert list(consortium.members()) == ["north"]
    consortium.approve(north / "request.toml")  # a member's certificate is renewed as before


@pytest.fixture
def joined(consortium, north, tmp_path):
    """The client north, which has joined with its first key."""
    kit, _ = consortium.approve(north / "request.toml")
    data = write_jsonl(tmp_path / "rows.jsonl", hospital_rows())
    take_kit(kit, north, data=data)
    return north


def test_a_new_key_replaces_the_old_one_which_cannot_come_back(consortium, joined, tmp_path):
    first = read_key(joined / "key.pem")
    shutil.copy(joined / "request.toml", tmp_path / "request.toml")
    request, shown = renew(joined)
    assert read_key(joined / "key.pem").private_numbers() == first.private_numbers()
    kit, approved = consortium.approve(request)
    assert approved == shown
    assert fingerprint(consortium.members()["north"].key) == shown
    take_kit(kit, joined)
    assert fingerprint(read_key(joined / "key.pem").public_key()) == shown
    assert not (joined / "new-key.pem").exists()
    take_kit(kit, joined)  # again, as every `join` does
    text = problem(consortium.approve, tmp_path / "request.toml")
    assert "'north' is already in, with another key" in text
    consortium.revoke("north")
    assert "was revoked" in problem(consortium.approve, tmp_path / "request.toml")
    assert check_log(joined).fingerprints[-1] == shown
    assert [row["what"] for row in entries(joined)] == ["init", "new key asked for", "new key"]
    done = [row["what"] for row in entries(consortium.folder)]
    assert done[1:4] == ["approve", "key replaced", "approve"]


def test_only_the_holder_of_the_old_key_can_replace_it(consortium, joined, tmp_path):
    """Somebody else may ask in the client's name: the names of clients are no secret."""
    init("north", tmp_path / "thief")
    made = read_request_file(tmp_path / "thief" / "request.toml")
    for proof in ("", "00", prove(read_key(tmp_path / "thief" / "key.pem"), made.request)):
        write_file(tmp_path / "asked.toml", made.model_copy(update={"proof": proof}))
        text = problem(consortium.approve, tmp_path / "asked.toml")
        assert "'north' is already in, with another key" in text
    assert fingerprint(consortium.members()["north"].key) == fingerprint(
        read_key(joined / "key.pem").public_key()
    )
    request, _ = renew(joined)
    good = read_request_file(request)
    write_file(request, made.model_copy(update={"proof": good.proof}))
    assert "another key" in problem(consortium.approve, request), "a proof is of one request"


def test_an_old_kit_works_until_the_new_one_is_here_and_a_key_can_be_renewed_again(
    consortium, joined
):
    before = joined / "kit.toml"
    renew(joined)
    take_kit(before, joined)
    request, shown = renew(joined)
    kit, _ = consortium.approve(request)
    take_kit(kit, joined)
    assert fingerprint(read_key(joined / "key.pem").public_key()) == shown
    assert "is not the folder of a client that has joined" in problem(renew, joined.parent)


def test_the_servers_key_is_replaced_and_the_authority_signs_the_new_one(consortium):
    path = consortium.folder / "server" / "key.pem"
    before = read_key(path)
    (path.parent / "new.pem").touch(mode=0o600)  # left by a renewal that was interrupted
    shown = consortium.renew_server_key()
    after = read_key(path)
    assert fingerprint(after.public_key()) == shown != fingerprint(before.public_key())
    made = read_certificate((path.parent / "certificate.pem").read_text(), where="server")
    assert is_signed_by(made, consortium.authority())
    assert fingerprint(public_key(made)) == shown
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(p.name for p in path.parent.iterdir()) == ["certificate.pem", "key.pem"]
    assert check_log(consortium.folder).lines == 2


def test_one_key_is_one_client(consortium, north, tmp_path):
    consortium.approve(north / "request.toml")
    key = read_key(north / "key.pem")
    write_file(
        tmp_path / "second.toml", Request(name="second", request=pem(new_request("second", key)))
    )
    assert "is already in, as 'north'" in problem(consortium.approve, tmp_path / "second.toml")


def test_approving_again_renews_the_certificate(consortium, north):
    first = read_kit(consortium.approve(north / "request.toml", days=3)[0])
    second = read_kit(consortium.approve(north / "request.toml", days=30)[0])
    ends = [
        read_certificate(kit.certificate, where="kit").not_valid_after_utc
        for kit in (first, second)
    ]
    assert ends[1] - ends[0] > datetime.timedelta(days=26)
    member = consortium.members()["north"]
    assert pem(member.certificate) == second.certificate
    assert name_of(member.certificate) == "north"


def test_the_authoritys_key_is_readable_only_by_its_owner(consortium):
    for path in consortium.folder.rglob("key.pem"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(consortium.folder.stat().st_mode) == 0o700
    assert is_consortium(consortium.folder)


@pytest.mark.parametrize(
    ("address", "read"),
    [
        ("fl.example.org", ("fl.example.org", 8443)),
        ("10.0.0.1:443", ("10.0.0.1", 443)),
        ("[::1]:9", ("::1", 9)),
    ],
)
def test_addresses_are_read(address, read):
    assert read_address(address) == read


@pytest.mark.parametrize("address", ["", ":1", "a b", "host:0", "host:70000", "host:x", "http://a"])
def test_what_is_not_an_address_is_refused(address):
    assert "is not an address" in problem(read_address, address)


@pytest.mark.parametrize(
    ("given", "listens"),
    [
        ("", ":8443"),
        ("10.0.0.1", "10.0.0.1:8443"),
        ("0.0.0.0:443", "0.0.0.0:443"),
        (":443", ":443"),
        ("[::]", "[::]:8443"),
        ("[::1]:9", "[::1]:9"),
        ("localhost", "localhost:8443"),
    ],
)
def test_a_gate_listens_at_the_kits_port_unless_told_otherwise(tmp_path, given, listens):
    """Bug: with a host and no port, nothing listened where the kit says."""
    Consortium.create(tmp_path / "fl", name="a", address="fl.example.org", listen=given or None)
    made = Consortium.open(tmp_path / "fl")
    assert made.about.listen == listens
    earlier = Consortium(made.folder, made.about.model_copy(update={"listen": given or ":8443"}))
    for one in (made, earlier):
        config = server_gate(
            one, engine_port=1, engine_certificate=tmp_path, leaves=tmp_path, public=tmp_path
        )
        assert config["apps"]["http"]["servers"]["gate"]["listen"] == [listens]


@pytest.mark.parametrize("given", ["a b", "host:0", "host:70000", "::1", "http://a", "host:"])
def test_what_a_gate_cannot_listen_on_is_refused(tmp_path, given):
    text = problem(Consortium.create, tmp_path / "fl", name="a", address="h", listen=given)
    assert f"'{given}' is not an address to listen on" in text
    assert not (tmp_path / "fl").exists()


def test_the_roster_follows_who_comes_and_goes(tmp_path):
    path = tmp_path / MEMBERS
    path.parent.mkdir(parents=True)
    write_members(path, {"south": 2, "north": 1})
    roster = Roster(path)
    assert list(roster.nodes()) == ["north", "south"]
    assert (roster.name_of(2), roster.name_of(3)) == ("south", None)
    write_members(path, {"east": 3})
    assert (roster.name_of(2), roster.name_of(3)) == (None, "east")


# --- the gates -----------------------------------------------------------------------------------


def test_caddy_accepts_both_configurations(consortium, north, tmp_path):
    kit, _ = consortium.approve(north / "request.toml")
    leaves = tmp_path / "leaves"
    assert write_leaves(leaves, consortium.members())
    assert not write_leaves(leaves, consortium.members()), "nothing has changed"
    own = consortium.folder / "server"
    server = server_gate(
        consortium,
        engine_port=1,
        engine_certificate=own / "certificate.pem",
        leaves=leaves,
        public=tmp_path,
    )
    shutil.copy(own / "certificate.pem", tmp_path / "certificate.pem")
    client = client_gate(
        read_kit(kit),
        port=1,
        own=own,
        key=north / "key.pem",
        certificate=consortium.members()["north"].folder / "certificate.pem",
        authority=consortium.folder / "authority" / "certificate.pem",
    )
    for n, config in enumerate((server, client)):
        path = tmp_path / f"{n}.json"
        path.write_text(json.dumps(config))
        words = [find_caddy(), "validate", "--config", str(path)]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_nobody_is_let_in_when_nobody_is_approved(consortium, tmp_path):
    assert not write_leaves(tmp_path / "leaves", consortium.members())
    assert list((tmp_path / "leaves").iterdir()) == []


def shakes_hands(consortium, kit, folder) -> bool:
    """Whether a client with this kit and the gate's certificate accept each other, by TLS."""
    (folder / "shown.pem").write_text(kit.certificate)
    client = ssl.create_default_context(cadata=kit.authority)
    client.load_cert_chain(folder / "shown.pem", folder / "key.pem")
    place = consortium.folder
    server = ssl.create_default_context(
        ssl.Purpose.CLIENT_AUTH, cafile=place / "authority" / "certificate.pem"
    )
    server.verify_mode = ssl.CERT_REQUIRED
    server.load_cert_chain(place / "server" / "certificate.pem", place / "server" / "key.pem")
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(back, there, server_hostname=kit.host),
        server.wrap_bio(there, back, server_side=True),
    ]
    for _ in range(6):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:
                return False
    return True


def test_a_new_authority_lets_in_every_client_with_its_new_kit_and_none_with_an_old_one(
    consortium, joined, tmp_path
):
    before, old = consortium.fingerprint(), read_kit(joined / "kit.toml")
    assert shakes_hands(consortium, old, joined)
    shown, kits = consortium.renew_authority()
    assert shown == consortium.fingerprint() != before
    assert [kit.name for kit in kits] == ["north.toml"]
    assert not shakes_hands(consortium, old, joined)
    text = problem(take_kit, kits[0], joined)
    assert f"is of another authority ({shown})" in text
    assert before in text
    (joined / "kit.toml").unlink()  # as the error says
    again = take_kit(kits[0], joined)
    assert shakes_hands(consortium, again.kit, joined)
    assert server_fingerprint(again.kit) == shown
    own = fingerprint(read_key(joined / "key.pem").public_key())
    assert fingerprint(consortium.members()["north"].key) == own, "its key stays, and rosters do"
    checked = check_log(consortium.folder)
    assert checked.fingerprints == (before, shown)
    consortium.approve(joined / "request.toml")
    assert is_signed_by(consortium.members()["north"].certificate, consortium.authority())
    assert check_log(consortium.folder).lines == checked.lines + 1
    assert sorted(p.name for p in (consortium.folder / "authority").iterdir()) == [
        "certificate.pem",
        "key.pem",
    ]


@pytest.mark.parametrize("when", ["logged", "certificate replaced"])
def test_a_renewal_of_the_authority_that_was_interrupted_is_finished_by_the_next(
    consortium, joined, monkeypatch, when
):
    from silotune.deployment.consortium import folder as own

    class Killed(Exception):
        pass

    def kill(*args):
        raise Killed

    with monkeypatch.context() as patch:
        if when == "logged":
            patch.setattr(own, "write_atomically", kill)
        else:
            patch.setattr(own, "os", types.SimpleNamespace(replace=kill))
        with pytest.raises(Killed):
            consortium.renew_authority()
    shown, (kit,) = consortium.renew_authority()
    (joined / "kit.toml").unlink()
    assert shakes_hands(consortium, take_kit(kit, joined).kit, joined)
    assert check_log(consortium.folder).fingerprints[-1] == shown
    assert len(check_log(consortium.folder).fingerprints) == 2, "the same new key"
