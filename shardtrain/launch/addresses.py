"""Where processes meet: parse, check and choose addresses."""

import ipaddress
import socket

from shardtrain.errors import DistributedError
from shardtrain.launch.environment import ProcessLayout


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[v6]:port".

    Example:
      >>> split_address("[::1]:8476")
      ('::1', 8476)
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or not host:
        raise DistributedError(f"address {address!r} is not host:port, for example 10.0.0.4:8476")
    return host.strip("[]"), int(port)


def refuse_loopback(layout: ProcessLayout) -> None:
    """A loopback coordinator cannot be reached from another host: every process would wait.

    Raises:
      DistributedError: processes are on several hosts and the coordinator is loopback, or resolves
        to loopback on a host that is not the first.
    """
    assert layout.coordinator is not None
    several = layout.host_count is not None and layout.host_count > 1
    host, _ = split_address(layout.coordinator)
    if not several or not is_loopback(host):
        return
    literal = host == "localhost" or _is_address(host)
    if literal or layout.on_first_host is False:
        what = "is" if literal else "resolves here to"
        raise DistributedError(
            f"{layout.process_count} processes run on {layout.host_count} hosts, but the "
            f"coordinator {layout.coordinator} {what} a loopback address: each host would wait "
            "for itself. Use a name or address of the first host that the others can reach; check "
            "/etc/hosts for a line that maps the host name to 127.0.1.1."
        )


def require_own_name(host: str) -> None:
    """Gloo, which joins CPU devices, listens on what this machine's own name resolves to.

    Raises:
      DistributedError: the name does not resolve; gloo would fail with a bare number.
    """
    if _resolve(host) is None:
        raise DistributedError(
            f"this machine's own name {host!r} does not resolve, and CPU processes are joined "
            f"through it. Add a line to /etc/hosts: 127.0.0.1 {host}"
        )


def default_bind_address(layout: ProcessLayout) -> str:
    """Where process 0 listens: as little exposed as the layout allows.

    Loopback if all processes are known to share this machine; else the address the coordinator's
    name resolves to; all interfaces only if that is loopback (a common /etc/hosts entry).
    """
    assert layout.coordinator is not None
    host, port = split_address(layout.coordinator)
    if layout.process_index != 0:
        return layout.coordinator  # never used: only process 0 listens
    if layout.host_count == 1 or host == "localhost" or (_is_address(host) and is_loopback(host)):
        return f"127.0.0.1:{port}"
    address = _resolve(host)
    if address is None or ipaddress.ip_address(address).is_loopback:
        return f"[::]:{port}"
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def is_loopback(host: str) -> bool:
    """Whether the host name or address leads back to this machine's loopback interface."""
    address = _resolve(host)
    return address is not None and ipaddress.ip_address(address).is_loopback


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _resolve(host: str) -> str | None:
    """First address of a host, None if it is unknown (yet: pods get their names late)."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None
