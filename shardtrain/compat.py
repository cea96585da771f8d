"""The only place that looks below JAX's public API; each use is probed and says where it was seen.

Seen on jax 0.10.2 and 0.12.0.
"""

import importlib
from collections.abc import Mapping
from typing import Any


def backends_started() -> bool:
    """Whether JAX has already initialised a backend (devices are then fixed).

    There is no public question for this; `jax._src.xla_bridge.backends_are_initialized` is used
    where it exists, else the answer is the safe one (True: treat devices as fixed).
    """
    bridge = importlib.import_module("jax._src.xla_bridge")
    probe = getattr(bridge, "backends_are_initialized", None)
    return bool(probe()) if probe is not None else True


def clear_backends() -> None:
    """Drop all live arrays, compiled functions and backends of this process."""
    import jax
    import jax.extend.backend

    jax.clear_caches()
    jax.extend.backend.clear_backends()


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many constants, and then how many carried values, a `scan` equation takes.

    The parameters of primitives are not a public interface: jax 0.10 writes two numbers, jax 0.12
    the structures of the three groups of operands.
    """
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)
