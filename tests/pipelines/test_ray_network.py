"""Which interface a worker meets the others on. That they meet: cluster/try_ray_up.py."""

import psutil
import pytest

from pipelines.ray_network import interface_of


def first_addresses():
    """Oracle: psutil's list, the first IPv4 address of every interface."""
    for name, addresses in psutil.net_if_addrs().items():
        found = [each.address for each in addresses if each.family.name == "AF_INET"]
        if found:
            yield name, found[0]


@pytest.mark.parametrize(("name", "address"), list(first_addresses()))
def test_an_address_of_this_machine_names_its_interface(name, address):
    assert interface_of(address) == name


def test_loopback_is_found_and_a_foreign_address_is_not():
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.9") is None  # kept for documentation: nobody has it
