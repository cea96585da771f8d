"""Which module's output stops being finite first: a look at every call while the model is traced.

Design: modules are wrapped for the time of one trace (Linen by its interceptors, NNX by replacing
the classes' `__call__`), and each wrapped call sends two booleans to the host. Callbacks work
inside scan, remat and vmap, where a value could not be handed out.
"""

import contextlib
import functools
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from shardtrain.modules import ModelForm


@dataclass
class CallRecord:
    """One call of a module in the program; a loop may run it several times.

    Args:
      path: Of the module, e.g. `layers/3/mlp`.
      inputs_finite: Whether all its inputs were, every time.
      output_finite: Whether its output was, every time.
    """

    path: str
    inputs_finite: bool = True
    output_finite: bool = True


@dataclass
class ModuleChecks:
    """The calls of a model in the order in which they return; filled while the program runs."""

    calls: list[CallRecord] = field(default_factory=list)

    def first_bad(self) -> CallRecord | None:
        """The first call whose output is not finite: of the innermost module, from finite inputs.

        If every bad call had bad inputs already, the first of those.
        """
        jax.effects_barrier()
        bad = [call for call in self.calls if not call.output_finite]
        began = [call for call in bad if call.inputs_finite]
        return next(iter(began or bad), None)

    def note(self, path: str, inputs: Any, output: Any) -> None:
        """Called while tracing, as a module's call returns."""
        record = CallRecord(path)
        self.calls.append(record)
        jax.debug.callback(functools.partial(_fill, record), _finite(inputs), _finite(output))


@contextlib.contextmanager
def checked(form: ModelForm) -> Generator[ModuleChecks]:
    """Watch the calls of a model that is traced inside this context."""
    checks = ModuleChecks()
    with contextlib.ExitStack() as stack:
        if form.kind == "linen":
            stack.enter_context(nn.intercept_methods(_linen(checks)))
        if form.kind == "nnx":
            inside: dict[int, str] = {}
            for kind in _classes(form):
                watched = _nnx(checks, kind.__call__, inside)
                stack.enter_context(mock.patch.object(kind, "__call__", watched))
        yield checks


def _linen(checks: ModuleChecks) -> Callable[..., Any]:
    def watch(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output = next_fun(*args, **kwargs)
        if context.method_name == "__call__":
            path = "/".join(context.module.path) or type(context.module).__name__
            checks.note(path, (args, kwargs), output)
        return output

    return watch


def _nnx(
    checks: ModuleChecks, original: Callable[..., Any], names: dict[int, str]
) -> Callable[..., Any]:
    """`original`, watched; `names` (id -> path) is filled by the outermost call and shared."""

    def call(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        outermost = not names
        if outermost:
            names.update({id(m): "/".join(map(str, p)) for p, m in nnx.iter_modules(self)})
        try:
            output = original(self, *args, **kwargs)
            path = names.get(id(self)) or type(self).__name__
            checks.note(path, (args, kwargs), output)
        finally:
            if outermost:
                names.clear()
        return output

    return call


def _classes(form: ModelForm) -> set[type]:
    """Classes of the model's modules that are called; their values are not looked at."""
    model = form.model
    if not isinstance(model, nnx.Module):
        with nnx.use_eager_sharding(False):
            model = nnx.eval_shape(lambda: form.model(nnx.Rngs(0)))
    kinds = {type(module) for _, module in nnx.iter_modules(model)}
    return {kind for kind in kinds if callable(getattr(kind, "__call__", None))}  # noqa: B004


def _finite(tree: Any) -> jax.Array:
    leaves = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    floats = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats])) if floats else jnp.bool(1)


def _fill(record: CallRecord, inputs: Any, output: Any) -> None:
    record.inputs_finite &= bool(inputs)
    record.output_finite &= bool(output)
