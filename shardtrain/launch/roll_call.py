"""Who is there? A bounded, named check before `jax.distributed` is asked to connect.

Design. When a process is missing, JAX aborts the others without saying who. So process 0 first
listens on the coordinator's own port; every process, process 0 included, connects there, says its
index, count and versions, and waits for one verdict that all get. That checks at once that the
address is right and reachable, that indices are unique and counts agree, and it can name who is
missing. Then the port is free again for the coordination service.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict

from shardtrain.errors import DistributedError
from shardtrain.launch.addresses import split_address
from shardtrain.launch.register import PROTOCOL, Hello, Register

_RETRY_SECONDS = 0.2


def roll_call(
    process_index: int,
    process_count: int,
    coordinator: str,
    bind_address: str,
    *,
    facts: Mapping[str, str],
    timeout: float,
    remind: Callable[[str], None] = print,
) -> None:
    """Meet all other processes. Collective; ends within about `timeout` seconds everywhere.

    Args:
      process_index: this process.
      process_count: how many should meet.
      coordinator: "host:port" by which all processes reach process 0.
      bind_address: "host:port" on which process 0 listens.
      facts: e.g. versions, compared between all processes.
      timeout: seconds to wait for all.
      remind: process 0 says every 30 s through this who is still missing.

    Raises:
      DistributedError: on every process that can be told, with the same text.
    """
    hello = Hello(process_index, process_count, socket.gethostname(), os.getpid(), facts)
    deadline = time.monotonic() + timeout
    if process_index != 0:
        _answer(hello, coordinator, deadline, timeout)
        return
    with _listen(bind_address, coordinator) as listener:
        # Process 0 calls itself by the public address, like everybody else: proves that it leads
        # here. It does so before it starts to read, so that it cannot miss an early verdict.
        own = _connect(hello, coordinator, deadline, timeout)
        register = Register(listener, process_count, coordinator, deadline, timeout, remind)
        server = threading.Thread(target=register.run)
        server.start()
        try:
            _obey(_verdict(own, timeout))
        finally:
            server.join()


def _listen(bind_address: str, coordinator: str) -> socket.socket:
    host, port = split_address(bind_address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise DistributedError(
            f"process 0 cannot listen on {bind_address} (coordinator {coordinator}): "
            f"{error.strerror}. Is another process 0 or another job using the port, or is the "
            "address not of this machine?"
        ) from error


def _answer(hello: Hello, coordinator: str, deadline: float, timeout: float) -> None:
    """Say hello and obey the verdict; call again if process 0 goes away without one."""
    verdict = None
    while verdict is None:
        connection = _connect(hello, coordinator, deadline, timeout)
        verdict = _verdict(connection, deadline - time.monotonic())
    _obey(verdict)


def _connect(hello: Hello, coordinator: str, deadline: float, timeout: float) -> socket.socket:
    """A connection on which `hello` has been said; tries until process 0 is up."""
    address, problem = split_address(coordinator), "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection(address, timeout=max(min(left, 5.0), 0.1))
            connection.sendall(json.dumps({**asdict(hello), "is": PROTOCOL}).encode() + b"\n")
        except OSError as error:
            problem = str(error)
            time.sleep(_RETRY_SECONDS)
        else:
            return connection
    raise DistributedError(
        f"process {hello.process_index} on {hello.host} could not reach process 0 at the "
        f"coordinator address {coordinator} within {timeout:g} s: {problem}. Common causes: "
        "process 0 was not started; the address is of another machine or of loopback; a firewall."
    )


def _verdict(connection: socket.socket, left: float) -> dict[str, str] | None:
    """What process 0 decided; None if the connection broke before."""
    # Process 0 speaks at its own deadline: wait a little longer.
    connection.settimeout(max(left, 0.0) + 5.0)
    try:
        with connection, connection.makefile("rb") as stream:
            return json.loads(stream.readline() or b"null")
    except (OSError, ValueError):
        return None


def _obey(verdict: dict[str, str] | None) -> None:
    if verdict is None:
        raise DistributedError("process 0 lost the connection to itself while others joined")
    if verdict["error"]:
        raise DistributedError(verdict["error"])
