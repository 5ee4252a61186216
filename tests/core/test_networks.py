"""Lists of networks, against what `ipaddress` says of each."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portero_py.core.networks import Networks

# Few of them, so that addresses and networks meet.
v4 = st.integers(0, 255).map(lambda low: IPv4Address((10 << 24) + low))
v6 = st.integers(0, 255).map(lambda low: IPv6Address((0x20010DB8 << 96) + low))
networks = st.one_of(
    st.tuples(v4, st.integers(0, 32)).map(lambda pair: f"{pair[0]}/{pair[1]}"),
    st.tuples(v6, st.integers(0, 128)).map(lambda pair: f"{pair[0]}/{pair[1]}"),
)


@given(st.lists(networks, max_size=6), st.lists(st.one_of(v4, v6), min_size=1, max_size=6))
def test_an_address_is_in_the_list_when_it_is_in_one_of_its_networks(
    listed: list[str], addresses: list[IPv4Address | IPv6Address]
) -> None:
    found = Networks(listed, max_known=2)
    for address in addresses * 2:
        expected = any(
            address in network
            for network in (ip_network(text, strict=False) for text in listed)
            if network.version == address.version
        )
        assert (str(address) in found) is expected


def test_ipv4_written_as_ipv6_is_ipv4() -> None:
    found = Networks(["::ffff:10.0.0.0/104", "192.0.2.0/24", "::/0"])
    assert "10.1.2.3" in found
    assert "::ffff:10.1.2.3" in found
    assert "::ffff:c000:0207" in found  # 192.0.2.7
    assert "198.51.100.1" not in found
    assert "::ffff:198.51.100.1" not in found
    assert "2001:db8::1" in found
    assert "::1:2:3" in Networks(["::1:2:0/112"])


def test_what_is_no_address_is_in_none() -> None:
    found = Networks(["0.0.0.0/0", "::/0"])
    assert "unknown" not in found
    assert "" not in found
    assert "fe80::1%eth0" in found


def test_what_is_no_network_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not appear"):
        Networks(["10.0.0.0/33"])


def test_a_list_of_ten_thousand_networks_is_asked_once_for_each_length() -> None:
    found = Networks([f"10.{high}.{low}.0/24" for high in range(40) for low in range(250)] + ["192.0.2.7"])
    assert sum(len(lengths) for lengths in found._lengths.values()) == 2
    assert "10.39.249.17" in found
    assert "10.40.0.1" not in found
    assert "192.0.2.7" in found
