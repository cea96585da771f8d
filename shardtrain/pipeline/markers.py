"""Find a model's repeated block and bracket every call of it in the trace.

A marker is `jax.ad_checkpoint.checkpoint_name`, an identity: `shardtrain:enter:3` on the arrays
block 3 is called with, `shardtrain:exit:3` on those it returns.

Blocks are sibling modules: their parameters' paths differ in one number (`layers/3`, `layer_3`).
Only outermost calls count. The group with most parameters is tried first.
"""

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Callable, Generator, Iterator
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from shardtrain.errors import StageSplitError
from shardtrain.pipeline.jaxprs import MARK
from shardtrain.pytree import leaves_by_path, nbytes


@dataclasses.dataclass(frozen=True)
class BlockGroup:
    """Sibling modules that repeat: `pattern` has `*` where their names differ."""

    pattern: str
    paths: tuple[str, ...]
    param_bytes: int


def mark(tree: Any, name: str) -> Any:
    """Put a marker on every array of a tree; other leaves (modules, None) pass."""

    def put(leaf: Any) -> Any:
        plain = isinstance(leaf, jax.Array) and not jax.dtypes.issubdtype(
            leaf.dtype, jax.dtypes.extended
        )
        return checkpoint_name(leaf, MARK + name) if plain else leaf

    return jax.tree.map(put, tree, is_leaf=lambda x: isinstance(x, nnx.Module | nnx.Variable))


def find_groups(params: Any) -> list[BlockGroup]:
    """Groups of sibling modules that could be pipeline blocks, most parameters first.

    Args:
        params: the (abstract) parameters; siblings are told by their paths.
    """
    sizes = {path: nbytes(leaf) for path, leaf in leaves_by_path(params).items()}
    prefixes = {path.rsplit("/", n)[0] for path in sizes for n in range(1, path.count("/") + 1)}
    groups: dict[str, list[tuple[int, str]]] = {}
    for path in prefixes:
        parent, _, name = path.rpartition("/")
        number = re.search(r"\d+$", name)
        if number:
            pattern = f"{parent}/" * bool(parent) + name[: number.start()] + "*"
            groups.setdefault(pattern, []).append((int(number[0]), path))
    found = []
    for pattern, members in groups.items():
        paths = tuple(path for _, path in sorted(members))
        total = sum(size for p, size in sizes.items() if any(p.startswith(f"{m}/") for m in paths))
        if len(paths) > 1:
            found.append(BlockGroup(pattern, paths, total))
    return sorted(found, key=lambda g: (-g.param_bytes, g.pattern))


def candidates(groups: list[BlockGroup], block: str | None) -> list[BlockGroup]:
    """All groups, or only the one a user pointed at (`layers`, `layers/*`, `layer_*`).

    Raises:
        StageSplitError: nothing in the model has the path the user gave.
    """
    if block is None:
        return groups
    stem = block.rstrip("*").rstrip("/_")
    chosen = [g for g in groups if g.pattern in (block, f"{stem}*", f"{stem}/*", f"{stem}_*")]
    if not chosen:
        known = ", ".join(group.pattern for group in groups) or "none"
        raise StageSplitError(f"no repeated block at {block!r}; repeated blocks found: {known}")
    return chosen


def marked(fn: Callable[..., Any], kind: str, group: BlockGroup | None) -> Callable[..., Any]:
    """`fn(model, *args)` with every outermost call of a block of `group` bracketed by markers."""
    if group is None:
        return fn

    def run(model: Any, *args: Any, **kwargs: Any) -> Any:
        with _nnx_marks(model, group) if kind == "nnx" else _linen_marks(group):
            return fn(model, *args, **kwargs)

    return run


class _Bracket:
    """Calls a block between its markers, unless it is already inside one (remat calls twice)."""

    def __init__(self) -> None:
        self.inside = False

    def __call__(
        self, index: int | None, call: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        if self.inside:
            return call(*args, **kwargs)
        self.inside = True
        try:
            args, kwargs = mark((args, kwargs), f"enter:{index}")
            return mark(call(*args, **kwargs), f"exit:{index}")
        finally:
            self.inside = False


@contextlib.contextmanager
def _nnx_marks(model: Any, group: BlockGroup) -> Generator[None]:
    by_path = {"/".join(map(str, path)): m for path, m in nnx.iter_modules(model)}
    blocks = [by_path[path] for path in group.paths]
    index = {id(block): n for n, block in enumerate(blocks)}
    classes, bracket = {type(block) for block in blocks}, _Bracket()
    # nnx.remat hands the block's method a copy. If nothing else in the model has the class, a copy
    # is one of the blocks and the order of calls tells which.
    elsewhere = any(type(m) in classes and id(m) not in index for m in by_path.values())
    copies = None if elsewhere else itertools.count()
    with contextlib.ExitStack() as stack:
        for cls in classes:
            call = _bracketed(cls.__call__, index, copies, bracket)
            stack.enter_context(mock.patch.object(cls, "__call__", call))
        yield


def _bracketed(
    original: Any, index: dict[int, int], copies: Iterator[int] | None, bracket: _Bracket
) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = lambda *a, **k: original(self, *a, **k)
        number = index.get(id(self))
        if bracket.inside or (number is None and copies is None):
            return bound(*args, **kwargs)
        if number is None and copies is not None:
            number = next(copies)
        return bracket(number, bound, args, kwargs)

    return call


@contextlib.contextmanager
def _linen_marks(group: BlockGroup) -> Generator[None]:
    index = {path: n for n, path in enumerate(group.paths)}
    bracket = _Bracket()

    def intercept(call: Any, args: tuple, kwargs: dict, context: Any) -> Any:
        path = "/".join(context.module.path)
        if path not in index or context.method_name != "__call__":
            return call(*args, **kwargs)
        return bracket(index[path], call, args, kwargs)

    with nn.intercept_methods(intercept):
        yield
