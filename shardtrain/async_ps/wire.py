"""How the processes call each other: `multiprocessing.managers`, one thread per connection.

Only processes that know the run's key can connect.
"""

from multiprocessing.managers import BaseManager
from typing import Any

Address = tuple[str, int]


class Directory(BaseManager):
    """Serves one object of this process to the others."""


def serve(name: str, served: Any, key: bytes) -> tuple[Any, Address]:
    """A server for one object, not yet running, and where it listens."""

    class Serving(BaseManager):
        pass

    Serving.register(name, callable=lambda: served)
    server: Any = Serving(address=("127.0.0.1", 0), authkey=key).get_server()
    return server, server.address


def connect(name: str, address: Address, key: bytes) -> Any:
    """The object that another process serves; its methods are calls over the connection."""
    Directory.register(name)
    directory = Directory(address=address, authkey=key)
    directory.connect()
    return getattr(directory, name)()
