"""Who is there? A bounded, named check before `jax.distributed` is asked to connect.

Design. When a process is missing, JAX aborts the others without saying who. So process 0 first
listens on the coordinator's own port; every process, process 0 included, connects there, says its
index, count and versions, and waits for one verdict that all get. That checks at once that the
address is right and reachable, that indices are unique and counts agree, and it can name who is
missing. Then the port is free again for the coordination service.
"""

import contextlib
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from shardtrain.errors import DistributedError
from shardtrain.monitoring.agreement import disagreements

_PROTOCOL = "shardtrain roll call 1"
_MAX_HELLO_BYTES = 4096
_RETRY_SECONDS = 0.2
_REMIND_SECONDS = 30.0


@dataclass(frozen=True)
class Hello:
    """What a process says about itself. `facts` must be equal everywhere (versions)."""

    process_index: int
    process_count: int
    host: str
    pid: int
    facts: Mapping[str, str]

    def __str__(self) -> str:
        return f"process {self.process_index} (pid {self.pid} on {self.host})"


def roll_call(
    layout_index: int,
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
      layout_index: this process.
      process_count: how many should meet.
      coordinator: "host:port" by which all processes reach process 0.
      bind_address: "host:port" on which process 0 listens.
      facts: e.g. versions, compared between all processes.
      timeout: seconds to wait for all.
      remind: process 0 says every 30 s through this who is still missing.

    Raises:
      DistributedError: on every process that can be told, with the same text.
    """
    hello = Hello(layout_index, process_count, socket.gethostname(), os.getpid(), facts)
    deadline = time.monotonic() + timeout
    if layout_index != 0:
        _answer(hello, coordinator, deadline, timeout)
        return
    with _listen(bind_address, coordinator) as listener:
        # Process 0 calls itself by the public address, like everybody else: proves that it leads
        # here. It does so before it starts to read, so that it cannot miss an early verdict.
        own = _connect(hello, coordinator, deadline, timeout)
        register = _Register(listener, process_count, coordinator, deadline, timeout, remind)
        server = threading.Thread(target=register.run)
        server.start()
        try:
            _obey(_verdict(own, timeout))
        finally:
            server.join()


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
            connection.sendall(json.dumps({**asdict(hello), "is": _PROTOCOL}).encode() + b"\n")
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


class _Register:
    """Process 0's list of who came."""

    def __init__(
        self,
        listener: socket.socket,
        process_count: int,
        coordinator: str,
        deadline: float,
        timeout: float,
        remind: Callable[[str], None],
    ):
        self._listener = listener
        self._count = process_count
        self._coordinator = coordinator
        self._deadline = deadline
        self._timeout = timeout
        self._remind = remind
        self._present: dict[int, Hello] = {}
        self._connections: dict[socket.socket, bytes] = {}

    def run(self) -> None:
        """Collect hellos until all came, one is wrong, or time is over; then tell everybody."""
        selector = selectors.DefaultSelector()
        selector.register(self._listener, selectors.EVENT_READ)
        reminder, error = time.monotonic() + _REMIND_SECONDS, ""
        while not error and len(self._present) < self._count:
            now = time.monotonic()
            if now >= self._deadline:
                error = self._timed_out()
                break
            if now >= reminder:
                reminder = now + _REMIND_SECONDS
                self._remind(self._missing("still waiting"))
            for key, _ in selector.select(timeout=min(self._deadline, reminder) - now):
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if connection is self._listener:
                    self._accept(selector)
                else:
                    error = error or self._read(selector, connection)
        selector.close()
        self._accept_the_rest()
        self._tell(error or self._differences())

    def _accept_the_rest(self) -> None:
        """Guests whose call is waiting must hear the verdict too."""
        self._listener.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._connections[self._listener.accept()[0]] = b""

    def _accept(self, selector: selectors.BaseSelector) -> None:
        connection, _ = self._listener.accept()
        connection.setblocking(False)
        self._connections[connection] = b""
        selector.register(connection, selectors.EVENT_READ)

    def _read(self, selector: selectors.BaseSelector, connection: socket.socket) -> str:
        """Take what a connection sent; returns what is wrong with it, or ''."""
        try:
            chunk = connection.recv(_MAX_HELLO_BYTES)
        except OSError:
            chunk = b""
        content = self._connections[connection] + chunk
        self._connections[connection] = content
        if b"\n" not in content and chunk and len(content) < _MAX_HELLO_BYTES:
            return ""
        selector.unregister(connection)
        hello = _parse(content)
        if hello is None:  # somebody else's connection (a scanner, a health check): not our guest
            del self._connections[connection]
            connection.close()
            return ""
        return self._enter(hello)

    def _enter(self, hello: Hello) -> str:
        if hello.process_count != self._count:
            return (
                f"{hello} was told that there are {hello.process_count} processes, process 0 was "
                f"told {self._count}. All must be started with the same process count."
            )
        if not 0 <= hello.process_index < self._count:
            return f"{hello}: indices run from 0 to {self._count - 1}"
        other = self._present.setdefault(hello.process_index, hello)
        if (other.host, other.pid) != (hello.host, hello.pid):
            return f"two processes have index {hello.process_index}: {other} and {hello}"
        return ""

    def _missing(self, prefix: str) -> str:
        missing = [str(i) for i in range(self._count) if i not in self._present]
        return (
            f"{prefix}: {len(self._present)} of {self._count} processes joined; missing "
            f"{', '.join(missing)}. Coordinator {self._coordinator}."
        )

    def _timed_out(self) -> str:
        return (
            self._missing(f"Timed out after {self._timeout:g} s")
            + " Common causes: the job was not started on that host, or failed there before "
            "st.init_distributed(); it resolved the coordinator to 127.0.0.1; a firewall."
        )

    def _differences(self) -> str:
        found = disagreements([self._present[i].facts for i in range(self._count)])
        return f"the processes differ: {'; '.join(found)}" if found else ""

    def _tell(self, error: str) -> None:
        message = json.dumps({"error": error}).encode() + b"\n"
        for connection in self._connections:
            try:
                connection.settimeout(5.0)
                connection.sendall(message)
                # The guest closes first, so that no socket of ours lingers on the port; and what
                # it sent is read, for closing on unread bytes would discard our message.
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(_MAX_HELLO_BYTES):
                    pass
            except OSError:
                pass
            connection.close()


def _parse(content: bytes) -> Hello | None:
    try:
        fields = json.loads(content.partition(b"\n")[0])
        if fields.pop("is") != _PROTOCOL:
            return None
        hello = Hello(**fields)
        numbers = (hello.process_index, hello.process_count, hello.pid)
        return hello if all(isinstance(number, int) for number in numbers) else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
