"""The proxy through which a client reaches its server: decided once, for `join` and `doctor` alike.

The two use different programs, Caddy and Python, which read the same variables differently: which
of two spellings comes first, and what NO_PROXY may hold. So both are told the result.
"""

import ipaddress
import os
import urllib.request

from silotune.core.errors import ConfigError

NAMES = ("https_proxy", "HTTPS_PROXY")
SCHEMES = ("http://", "https://")


def proxy_for(host: str, port: int) -> str | None:
    """The URL of the proxy to a server; None: connect directly.

    Args:
        host: The server's name or address, IPv6 without brackets.
        port: The server's port.

    Returns:
        What HTTPS_PROXY or https_proxy says, unless NO_PROXY or no_proxy exempts the host: by name,
        by a name above it, as host:port, as a network (10.0.0.0/8), or "*". Never for this machine.

    Raises:
        ConfigError: It is a kind of proxy that was not tried.
    """
    found = next((os.environ[name] for name in NAMES if os.environ.get(name)), "")
    if not found or _is_here(host) or _is_exempt(host, port):
        return None
    if "://" not in found:
        found = f"http://{found}"
    if not found.lower().startswith(SCHEMES):
        raise ConfigError(
            f"the proxy in HTTPS_PROXY begins with {found.split('://')[0]}://, which is not "
            "supported.\n  Give one that takes CONNECT: http://proxy.example.org:3128"
        )
    return found


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_exempt(host: str, port: int) -> bool:
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if urllib.request.proxy_bypass_environment(address, {"no": given}):  # pyright: ignore[reportAttributeAccessIssue]
        return True
    return any(_holds(part.strip(), host) for part in given.split(","))


def _holds(network: str, host: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(network, strict=False)
    except ValueError:  # a name, or nothing
        return False
