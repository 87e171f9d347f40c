"""The two gates, as configurations of the proxy Caddy: who is let through, and to what.

The engine's control interface has no authentication and shares its port with the clients' one. So
the SuperLink listens on loopback. The server's gate in front of it lets through the clients' paths
only, and only clients whose certificate is approved (it is not enough that the authority once
signed it). A client's gate is the other end: a SuperNode cannot show a client certificate, so it
connects to a gate on loopback that can.

Neither gate has an admin interface. A new configuration is read on SIGUSR1, without interrupting
the connections of clients that stay in.
"""

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from silotune.core.atomic_files import write_atomically
from silotune.deployment.consortium.certificates import pem
from silotune.deployment.consortium.folder import Consortium, Member, listen_address
from silotune.deployment.consortium.kit import Kit

LOOPBACK = "127.0.0.1"
FLEET = "/v1/fleet/*"
"""Flower's paths for clients; all other paths of its server are refused."""
NOTICE = "/silotune/notice.json"
"""The only other path: what approved clients can read before they are asked to train."""
OBJECTS = "/v1/fleet/push-object"
"""The only path whose requests carry a message's contents."""
MOST_BYTES = 8 * 1024 * 1024
"""Most bytes of a request with contents: Flower sends parts of at most 5 MB, ours are of 2 MB. The
engine reads a request before it looks at its signature, and keeps the memory."""
FEW_BYTES = 256 * 1024
"""Most bytes of any other request: numbers, names, hashes and signatures."""
READ_S = "180s"
"""How long a request's body may take. Flower's server forgets a message that it has a part of when
no other part has arrived for as long."""


def server_gate(
    consortium: Consortium,
    *,
    engine_port: int,
    engine_certificate: Path,
    leaves: Path,
    public: Path,
) -> dict[str, Any]:
    """The configuration of the server's gate.

    Args:
        consortium: Says where the gate listens and what it shows.
        engine_port: The SuperLink's port on loopback.
        engine_certificate: The certificate that the SuperLink must show.
        leaves: Folder of the approved clients' certificates; see `write_leaves`.
        public: Folder with the notice to clients.
    """
    place = consortium.folder
    folder = {"loader": "folder", "folders": [_path(leaves)]}
    policy = {
        "client_authentication": {
            "mode": "require_and_verify",
            "ca": _pinned(place / "authority" / "certificate.pem"),
            "verifiers": [{"verifier": "leaf", "leaf_certs_loaders": [folder]}],
        },
        "protocol_min": "tls1.3",
    }
    to_engine = {
        "handler": "reverse_proxy",
        "upstreams": [{"dial": f"{LOOPBACK}:{engine_port}"}],
        "transport": {"protocol": "http", "tls": {"ca": _pinned(engine_certificate)}},
    }
    routes = [
        {
            "match": [{"path": [path], "method": ["POST"]}],
            "handle": [{"handler": "request_body", "max_size": most}, to_engine],
            "terminal": True,
        }
        for path, most in ((OBJECTS, MOST_BYTES), (FLEET, FEW_BYTES))
    ] + [
        {
            "match": [{"path": [NOTICE], "method": ["GET"]}],
            "handle": [{"handler": "file_server", "root": _path(public)}],
            "terminal": True,
        },
        {"handle": [{"handler": "static_response", "status_code": 403}]},
    ]
    shown = {"certificate": "certificate.pem", "key": "key.pem"}
    shown = {key: _path(place / "server" / name) for key, name in shown.items()}
    # an earlier version kept a host without a port, at which nothing listened
    listen = listen_address(consortium.about.listen, consortium.about.port)
    return _config(listen, routes, policy, [shown])


def client_gate(
    kit: Kit,
    *,
    port: int,
    own: Path,
    key: Path,
    certificate: Path,
    authority: Path,
    proxy: str | None = None,
) -> dict[str, Any]:
    """The configuration of a client's gate.

    Args:
        kit: Where the server is.
        port: Where the SuperNode finds this gate, on loopback.
        own: Folder with key.pem and certificate.pem for that loopback address.
        key: The client's private key.
        certificate: The kit's certificate for that key.
        authority: The kit's authority.
        proxy: URL of the proxy to the server; None: connect directly, whatever HTTPS_PROXY says.
    """
    way = {"from": "url", "url": proxy} if proxy else {"from": "none"}
    tls = {
        "ca": _pinned(authority),
        "client_certificate_file": _path(certificate),
        "client_certificate_key_file": _path(key),
        **({} if _is_address(kit.host) else {"server_name": kit.host}),
    }
    to_server = {
        "handler": "reverse_proxy",
        "upstreams": [{"dial": f"{host_of(kit)}:{kit.port}"}],
        # otherwise the server's gate would see the loopback address as the name
        "headers": {"request": {"set": {"Host": [kit.host]}}},
        # not HTTP/2: on its one connection, a heartbeat would wait behind megabytes of data
        "transport": {
            "protocol": "http",
            "tls": tls,
            "dial_timeout": "15s",
            "versions": ["1.1"],
            "network_proxy": way,
        },
    }
    routes = [{"match": [{"path": [FLEET]}], "handle": [to_server]}]
    shown = {"certificate": _path(own / "certificate.pem"), "key": _path(own / "key.pem")}
    return _config(f"{LOOPBACK}:{port}", routes, {}, [shown])


def host_of(kit: Kit) -> str:
    """The server's host as it is written in addresses: IPv6 in brackets."""
    return f"[{kit.host}]" if ":" in kit.host else kit.host


def write_leaves(folder: Path, members: Mapping[str, Member]) -> bool:
    """Make a folder hold the certificates of exactly these clients.

    Returns:
        Whether anything changed, so that the gate has to read its configuration again.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    wanted = {f"{name}.pem": pem(own.certificate).encode() for name, own in members.items()}
    there = {path.name: path.read_bytes() for path in folder.glob("*.pem")}
    for name in there.keys() - wanted.keys():
        (folder / name).unlink()
    for name, text in wanted.items():
        if there.get(name) != text:
            write_atomically(folder / name, text)
    return there != wanted


def _config(
    listen: str,
    routes: list[dict[str, Any]],
    policy: Mapping[str, Any],
    shown: list[dict[str, str]],
) -> dict[str, Any]:
    server = {
        "listen": [listen],
        "protocols": ["h1", "h2"],
        "automatic_https": {"disable": True},
        # one policy applies to all names, so another name cannot select a weaker one
        "strict_sni_host": False,
        "tls_connection_policies": [dict(policy)],
        "read_header_timeout": "30s",
        "read_timeout": READ_S,
        "max_header_bytes": 64 * 1024,
        "routes": routes,
    }
    return {
        "admin": {"disabled": True, "config": {"persist": False}},
        "storage": {"module": "file_system", "root": "caddy"},
        "apps": {
            "http": {"servers": {"gate": server}},
            "tls": {
                "certificates": {"load_files": shown},
                # a resumed session would not check again whether its client is still in
                "session_tickets": {"disabled": True},
                "disable_ocsp_stapling": True,
                "disable_storage_clean": True,
            },
        },
    }


def _pinned(certificate: Path) -> dict[str, Any]:
    return {"provider": "file", "pem_files": [_path(certificate)]}


def _path(path: Path) -> str:
    return str(path.absolute())


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
