"""Which IP addresses may be connected to: public ones, and no spelling of any other.

The lists are the IANA special-purpose registries (RFC 6890 and its updates), not what Python's ipaddress calls global: that
changed between patch releases. IPv6 is allowed inside 2000::/3 only, so every form that embeds an IPv4 address (mapped,
compatible, NAT64, 6to4, Teredo, ISATAP under a special prefix) is refused whatever it embeds.
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_FORBIDDEN_V4 = tuple(
    (ipaddress.IPv4Network(network), what)
    for network, what in (
        ("0.0.0.0/8", "this network"),
        ("10.0.0.0/8", "private"),
        ("100.64.0.0/10", "carrier-grade NAT"),  # 100.100.100.200 is a cloud's metadata
        ("127.0.0.0/8", "loopback"),
        ("168.63.129.16/32", "metadata"),  # a public address that Azure answers inside its machines
        ("169.254.0.0/16", "link-local"),  # 169.254.169.254 and its like
        ("172.16.0.0/12", "private"),
        ("192.0.0.0/24", "protocol assignments"),  # 192.0.0.192 is a cloud's metadata
        ("192.0.2.0/24", "documentation"),
        ("192.31.196.0/24", "AS112"),
        ("192.52.193.0/24", "AMT"),
        ("192.88.99.0/24", "6to4 relay"),
        ("192.168.0.0/16", "private"),
        ("192.175.48.0/24", "AS112"),
        ("198.18.0.0/15", "benchmarking"),
        ("198.51.100.0/24", "documentation"),
        ("203.0.113.0/24", "documentation"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved"),
    )
)
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_FORBIDDEN_V6 = tuple(
    (ipaddress.IPv6Network(network), what)
    for network, what in (
        ("2001::/23", "protocol assignments"),  # Teredo 2001::/32, ORCHID, benchmarking
        ("2001:db8::/32", "documentation"),
        ("2002::/16", "6to4"),
        ("2620:4f:8000::/48", "AS112"),
        ("3fff::/20", "documentation"),
    )
)
_ISATAP = (0x00005EFE, 0x02005EFE)  # RFC 5214: the upper half of an interface identifier that ends in an IPv4 address


@dataclass(frozen=True)
class AddressGuard:
    """Judges addresses. networks: those that are allowed although they are not public."""

    networks: tuple[IPNetwork, ...] = ()

    def refusal(self, address: str) -> str:
        """Why this address may not be connected to, "" when it may. Anything but the plain form of one is refused."""
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return "not an address"
        if isinstance(parsed, ipaddress.IPv6Address) and parsed.scope_id is not None:
            return "scoped"
        if any(parsed in network for network in self.networks):
            return ""
        return _refusal_v4(parsed) if isinstance(parsed, ipaddress.IPv4Address) else _refusal_v6(parsed)


def address_guard(allowed_addresses: Sequence[str]) -> AddressGuard:
    """A guard that also lets these networks pass."""
    return AddressGuard(tuple(ipaddress.ip_network(network) for network in allowed_addresses))


def _refusal_v4(address: ipaddress.IPv4Address) -> str:
    return next((what for network, what in _FORBIDDEN_V4 if address in network), "")


def _refusal_v6(address: ipaddress.IPv6Address) -> str:
    if address not in _GLOBAL_V6:
        return "not global"
    if (int(address) >> 32) & 0xFFFFFFFF in _ISATAP:
        return "ISATAP"
    return next((what for network, what in _FORBIDDEN_V6 if address in network), "")
