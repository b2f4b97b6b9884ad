"""The ports at which processes meet: two tests that run at once cannot get the same."""

import socket
import struct

import pytest
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from torch.distributed import TCPStore

from tests.ports import held_port

IP_LOCAL_PORT_RANGE = 51


def taken(port: int) -> bool:
    """Whether the kernel has another for who asks for a free port: asked here for one of this port alone."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with socket.socket(family) as asking:
            try:
                asking.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("I", port << 16 | port))
            except OSError:
                pytest.skip("Linux has it from 6.3 on")
            try:
                asking.bind(("", 0))
            except OSError:
                return True
            assert asking.getsockname()[1] == port
    return False


def test_a_held_port_is_given_to_no_one_else():
    with held_port() as port:
        assert taken(port)
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        assert store.port == port
        del store
        assert taken(port)
    assert not taken(port)


def test_lightning_takes_a_held_port_in_every_test():
    """It looks for a free one, closes it, and its first process binds it once torch has been imported in the others."""
    assert taken(find_free_network_port())
