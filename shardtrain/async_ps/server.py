"""A parameter server: owns some of the arrays, applies each step's gradient to them once."""

import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from shardtrain.async_ps.wire import serve

Arrays = dict[str, np.ndarray]


class Shard:
    """Parameters, optimizer state, and which steps are in them.

    Args:
      params: Path -> array, those this server owns.
      optimizer: Sees the arrays of this server only.
    """

    def __init__(self, params: Arrays, optimizer: optax.GradientTransformation):
        self._lock = threading.Lock()
        self._params: Any = params
        self._state = optimizer.init(params)
        self._applied: dict[int, int] = {}

        def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self._update = jax.jit(update)

    def pull(self) -> tuple[int, Arrays]:
        """How many updates were applied, and the parameters with them."""
        with self._lock:
            return len(self._applied), self._host()

    def push(self, step: int, version: int, grads: Arrays) -> int:
        """Apply a step's gradient, unless it already was (its first worker died in between).

        Args:
          step: Its number.
          version: What `pull` said when the gradient's parameters were pulled.
          grads: Path -> mean gradient.

        Returns:
          Updates applied since then.
        """
        with self._lock:
            if step not in self._applied:
                self._applied[step] = len(self._applied) - version
                self._params, self._state = self._update(self._params, self._state, grads)
            return self._applied[step]

    def applied(self) -> list[int]:
        """Steps that were applied, in order."""
        with self._lock:
            return list(self._applied)

    def _host(self) -> Arrays:
        return {path: np.asarray(x) for path, x in self._params.items()}


def divide(params: Arrays, count: int) -> list[list[str]]:
    """Paths for each of `count` servers, about equally many numbers for each.

    Example:
      >>> divide({"a": np.zeros(9), "b": np.zeros(4), "c": np.zeros(4)}, 2)
      [['a'], ['b', 'c']]
    """
    owned: list[list[str]] = [[] for _ in range(count)]
    held = [0] * count
    for path in sorted(params, key=lambda p: (-params[p].size, p)):
        least = held.index(min(held))
        owned[least].append(path)
        held[least] += params[path].size
    return owned


def run_server(make_job: Callable[[], Any], params: Arrays, key: bytes, ready: Any) -> None:
    """A server process: says where it listens, then serves until it is ended."""
    server, address = serve("shard", Shard(params, make_job().optimizer), key)
    ready.send(address)
    server.serve_forever()
