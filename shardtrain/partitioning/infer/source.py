"""Where in the user's code a traced equation comes from."""

import contextlib
import os
from typing import Any

import flax
import jax
import jaxlib
import numpy as np
import optax


def _folder(module: Any) -> str:
    return os.path.dirname(os.path.abspath(module.__file__)) + os.sep


_OURS = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + os.sep
_OUR_MODELS = os.path.join(_OURS, "models") + os.sep  # a zoo of models is user code here
_STANDARD = os.path.dirname(os.path.abspath(contextlib.__file__)) + os.sep
_LIBRARIES = (*map(_folder, (jax, jaxlib, flax, optax, np)), _OURS)
_TRUSTED = tuple(map(_folder, (jax, jaxlib, optax)))
_TRACE_STARTS = "trace_to_jaxpr"
_CUSTOM_RULES = "custom_derivatives.py"


def is_library(file_name: str) -> bool:
    """Whether a file belongs to Python, JAX, Flax, Optax, NumPy or shardtrain, not to a model."""
    if file_name.startswith(_OUR_MODELS):
        return False
    if file_name.startswith(("<frozen", *_LIBRARIES)):
        return True
    return file_name.startswith(_STANDARD) and "site-packages" not in file_name


def source_line(eqn: Any, outer: str = "<unknown>") -> str:
    """`file.py:line (function)` of the innermost frame that is not library code.

    The search stops where the tracing of the enclosing sub-program began: `jit` caches those, so
    frames further out may belong to an unrelated first caller.

    Args:
      eqn: a jaxpr equation.
      outer: the place of the equation that contains this one, the answer where none is found.

    Returns:
      The place as text.
    """
    for frame in _frames(eqn):
        if not is_library(frame.file_name):
            name = os.path.basename(frame.file_name)
            return f"{name}:{frame.line_num} ({frame.function_name})"
        if frame.function_name.startswith(_TRACE_STARTS):
            return outer
    return outer


def is_trusted_rule(eqn: Any) -> bool:
    """Whether a `custom_jvp`/`custom_vjp` equation wraps a function written in JAX or Optax.

    Only then may its derivative be assumed to act like its value. The body's own frames say who
    wrote it: everything inner to the custom-derivative machinery must be library code.
    """
    body = eqn.params["call_jaxpr"].jaxpr.eqns
    return bool(body) and all(_written_by_library(e) for e in body)


def _written_by_library(eqn: Any) -> bool:
    for frame in _frames(eqn):
        if frame.file_name.endswith(_CUSTOM_RULES):
            return True
        if not frame.file_name.startswith(_TRUSTED):
            return False
    return False


def _frames(eqn: Any) -> list[Any]:
    traceback = eqn.source_info.traceback
    return [] if traceback is None else list(traceback.frames)


def path_string(path: tuple[Any, ...]) -> str:
    """The one spelling of a leaf path used everywhere: `layers/0/mlp/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
