"""Compiled programs on disk, so that the second run of a program starts at once."""

import os
from pathlib import Path
from typing import Any

import jax


def use_compile_cache() -> str | None:
    """Keep compiled programs on disk from here on; does nothing the second time.

    A directory that JAX was told to use (`jax_compilation_cache_dir`) stays. Otherwise it is
    `$XDG_CACHE_HOME/shardtrain/xla`, by default under `~/.cache`.

    Returns:
      The directory, or None where `jax_enable_compilation_cache` is off.

    Example:
      >>> use_compile_cache() == use_compile_cache()
      True
    """
    if not _setting("jax_enable_compilation_cache"):
        return None
    chosen = _setting("jax_compilation_cache_dir")
    if not chosen:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        chosen = str(Path(home, "shardtrain", "xla"))
        jax.config.update("jax_compilation_cache_dir", chosen)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return str(chosen)


def _setting(name: str) -> Any:
    return getattr(jax.config, name)
