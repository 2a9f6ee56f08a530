"""Machines to try a cluster on: Linux namespaces of this one, with an ssh server each, on a bridge.

    computer (192.0.2.1) ── bridge ──┬── 192.0.2.10 ── sshd, user dpdl, home, /tmp, /dev/shm
                                     ├── 192.0.2.11 ── ...

A machine has its own network, processes, host name, /etc/hosts as Debian writes it, and a user who
is not root and whom one key lets in. Disk, memory, cores and clock are this computer's. It has the
packages of the Python that runs this, where a prepared .venv finds them, and nothing else of ours.
There is no way out of the network, and no default route.
Knows nothing of Ray. Needs root, and namespaces of the caller's own around it (try_ray_up.py).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

USER, UID = "dpdl", 4200
COMPUTER = "192.0.2.1"
"""Where the caller is in the network."""
TOOLS = ("/usr/sbin/sshd", "ssh", "ssh-keygen", "rsync", "unshare", "ip", "mount")
BOOT_S = 10.0

_BRIDGE = "bridge0"
_BOOT = """
set -e
python=$1 packages=$2 name=$3
hostname "$name"
mount -t tmpfs -o mode=755 mnt /mnt
mkdir /mnt/python /mnt/packages
mount --bind "$python" /mnt/python
mount --bind "$packages" /mnt/packages
mount -t tmpfs -o mode=755 root /root
case "$python" in /root/*) mkdir -p "$python"; mount --bind /mnt/python "$python";; esac
for file in passwd group shadow hosts hostname ssh; do mount --bind "etc/$file" "/etc/$file"; done
mount -t tmpfs -o mode=755 home /home
mkdir /home/dpdl
mount --bind home /home/dpdl
mount -t tmpfs -o mode=755 run /run
mkdir /run/sshd
mount -t tmpfs shm /dev/shm
mount --bind tmp /tmp
/usr/sbin/sshd -D -e
exit $?
"""
"""The first process of a machine. It stays, and collects orphans: `ray stop` waits for that."""


class Machine:
    """One machine: started, cut off, started again."""

    def __init__(self, folder: Path, name: str, address: str, key: Path) -> None:
        """key: the public key of who may log in."""
        self.name, self.address = name, address
        self.folder = folder
        self.home = folder / "home"
        self.log = folder / "console.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._lay_out(key)
        _ip("netns", "add", name)
        _ip("link", "add", "name", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", name, "master", _BRIDGE)
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", name, "link", "set", device, "up")

    def start(self) -> None:
        """Boot: returns when its ssh server answers."""
        _ip("link", "set", self.name, "up")
        own = ["--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        places = [sys.base_prefix, sysconfig.get_path("purelib"), self.name]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, "unshare", *own]
                + ["bash", "-c", _BOOT, "boot", *places],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
            )
        deadline = time.monotonic() + BOOT_S
        while b"Server listening" not in self.log.read_bytes():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{self.name} did not start: {self.log.read_text()}")
            time.sleep(0.05)

    def lose(self) -> None:
        """As when its power fails: the network says nothing any more, and all its processes end."""
        _ip("link", "set", self.name, "down")
        self.stop()

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)  # of unshare, which takes the rest along
            self._process.wait(BOOT_S)
            self._process = None
        self.log.unlink(missing_ok=True)

    def _lay_out(self, key: Path) -> None:
        ssh = self.folder / "etc" / "ssh"
        for path in (ssh, self.folder / "tmp"):
            path.mkdir(parents=True)
        (self.folder / "tmp").chmod(0o1777)
        for file, line in (
            ("passwd", f"{USER}:x:{UID}:{UID}::/home/{USER}:/bin/bash"),
            ("group", f"{USER}:x:{UID}:"),
            ("shadow", f"{USER}:*:20000::::::"),
        ):
            text = Path("/etc", file).read_text().rstrip("\n")
            (self.folder / "etc" / file).write_text(f"{text}\n{line}\n")
        (self.folder / "etc" / "hostname").write_text(f"{self.name}\n")
        # As Debian's installer writes it: the machine's own name is a loopback address.
        hosts = f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n"
        (self.folder / "etc" / "hosts").write_text(hosts)
        _new_key(ssh / "ssh_host_ed25519_key")
        (ssh / "sshd_config").write_text(
            f"ListenAddress {self.address}\nHostKey /etc/ssh/ssh_host_ed25519_key\nUsePAM no\n"
            f"PasswordAuthentication no\nPermitRootLogin no\nAllowUsers {USER}\nPidFile none\n"
        )
        shutil.copytree("/etc/skel", self.home)
        keys = self.home / ".ssh" / "authorized_keys"
        keys.parent.mkdir(mode=0o700)
        shutil.copyfile(key, keys)
        keys.chmod(0o600)
        give(self.home)


@contextlib.contextmanager
def network(folder: Path, addresses: Sequence[str], key: Path) -> Iterator[list[Machine]]:
    """Machines dpdl-0, dpdl-1, ... at these addresses, started, that let the owner of `key` in."""
    _ip("link", "add", "name", _BRIDGE, "type", "bridge")
    _ip("addr", "add", f"{COMPUTER}/24", "dev", _BRIDGE)
    _ip("link", "set", _BRIDGE, "up")
    machines: list[Machine] = []
    try:
        for i, address in enumerate(addresses):
            machines.append(Machine(folder / f"dpdl-{i}", f"dpdl-{i}", address, key))
            machines[-1].start()
        yield machines
    finally:
        for machine in machines:
            machine.stop()


def new_login(folder: Path) -> Path:
    """A key as `ssh-keygen` leaves it in ~/.ssh, for a home folder; the public half."""
    (folder / ".ssh").mkdir(mode=0o700)
    return _new_key(folder / ".ssh" / "id_ed25519")


def prepare_environment(machine: Machine, checkout: str) -> None:
    """~/CHECKOUT/.venv, as `make setup` would leave it: packages of this Python, the code of
    ~/CHECKOUT, and no download."""
    venv = machine.home / checkout / ".venv"
    there = f"/home/{USER}/{checkout}/.venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    site = next(venv.glob("lib/python*/site-packages"))
    (site / "dpdl.pth").write_text(f"/home/{USER}/{checkout}\n/mnt/packages\n")
    for name, module in (("ray", "ray.scripts.scripts"), ("dpdl", "cluster.cli")):
        script = venv / "bin" / name
        script.write_text(f"#!{there}/bin/python\nimport sys\nfrom {module} import main\nmain()\n")
        script.chmod(0o755)
    # Newer than what `make setup` compares it with.
    (venv / ".installed").touch()
    give(venv.parent)


def give(folder: Path) -> None:
    """To the machines' user, with all that is in it."""
    subprocess.run(["chown", "-R", "--no-dereference", f"{UID}:{UID}", str(folder)], check=True)


def processes() -> list[str]:
    """Command lines of all that runs for the machines' user, ssh's own aside."""
    found = subprocess.run(
        ["ps", "-U", str(UID), "-o", "comm=,args="], capture_output=True, text=True
    ).stdout
    return [line for line in found.splitlines() if not line.startswith(("ssh", "sftp"))]


def _new_key(path: Path) -> Path:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", USER, "-f", str(path)]
    subprocess.run(command, check=True)
    return path.with_name(path.name + ".pub")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, env=os.environ | {"LANG": "C"})
