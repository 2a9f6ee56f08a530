"""Where a training's workers are in the network, and how they find each other.

Knows Ray and the machine's interfaces; nothing of trainings. Used by train.py and train_worker.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import WorkerGroupCallback


class MeetOnRaysNetwork(WorkerGroupCallback):  # type: ignore[misc]
    """Lets workers on several machines meet: gloo and NCCL are to listen where Ray does.

    By itself gloo takes the address that the host's name stands for, on Debian 127.0.1.1, and NCCL
    any interface that is up: the others cannot reach it. This hook is called before Ray Train
    joins the workers.
    """

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        ray.get([worker.execute_async(_meet_on_rays_network) for worker in workers])
        return {}


def _meet_on_rays_network() -> None:
    name = interface_of(node_address())
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without "=" a prefix


def node_address() -> str:
    """Of the machine that this worker runs on, as `ray status` and the dashboard have it."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def interface_of(address: str) -> str | None:
    """Name of the network interface with this IPv4 address; None where none has it."""
    ask_address = 0x8915  # SIOCGIFADDR, for the interface's first one
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                request = struct.pack("40s", name.encode())  # struct ifreq
                found = fcntl.ioctl(any_socket, ask_address, request)
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None
