"""Where a caller comes from, as limits count it."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from urllib.parse import unquote

_NETWORK_BITS = 64
"""A caller with IPv6 has as many addresses as it likes within a network of that many bits."""


def source_of(peer: str) -> str:
    """The address in a peer as gRPC names it, without its port: an IPv4 address, the /64 of an
    IPv6 address, or what it says of a Unix socket.
    """
    kind, _, place = unquote(peer).partition(":")
    if kind not in {"ipv4", "ipv6"}:
        return kind
    host = place.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        address = ip_address(host)
    except ValueError:
        return place
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if isinstance(address, IPv4Address):
        return str(address)
    return str(IPv6Network((address, _NETWORK_BITS), strict=False))
