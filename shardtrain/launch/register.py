"""The side of process 0 in the roll call: collects who came and gives the verdict."""

import contextlib
import json
import selectors
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from shardtrain.monitoring.agreement import disagreements

PROTOCOL = "shardtrain roll call 1"
_MAX_HELLO_BYTES = 4096
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


class Register:
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
        if fields.pop("is") != PROTOCOL:
            return None
        hello = Hello(**fields)
        numbers = (hello.process_index, hello.process_count, hello.pid)
        return hello if all(isinstance(number, int) for number in numbers) else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
