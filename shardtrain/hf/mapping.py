"""From names of tensors to parameters of a model, as views of the files."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardtrain.errors import CheckpointError
from shardtrain.hf.pieces import Pieces, reshaped, single, stacked

_OPERATIONS = ("transpose",)


@dataclass(frozen=True)
class Rule:
    """What becomes of the tensors that a name matches.

    Args:
      name: Name of tensors; `*` stands for one part of it.
      paths: Parameters; several share the tensor along its last dim. None: it is left out.
      transpose: The dims of the tensor are reversed first.
    """

    name: str
    paths: tuple[str, ...]
    transpose: bool

    def matched(self, tensor: str) -> tuple[str, ...] | None:
        """What stands for each `*`, or None."""
        parts = [re.escape(p) for p in self.name.split("*")]
        found = re.fullmatch(r"([^.]*)".join(parts), tensor)
        return None if found is None else found.groups()


def parse(mapping: Mapping[str, Any]) -> tuple[Rule, ...]:
    """Rules as they are written.

    Args:
      mapping: Name of tensors -> `"path"`, `("path", "transpose")`, `(("path", "path"),
        "transpose")` for a tensor that several parameters share, or None: left out. A `*` in the
        name stands in the path too; a path without one is a stack of layers.

    Raises:
      CheckpointError: A rule is none of these.
    """
    rules = []
    for name, given in mapping.items():
        target, *operations = given if isinstance(given, tuple) else (given,)
        paths = target if isinstance(target, tuple) else (target,) if target is not None else ()
        if not (set(operations) <= set(_OPERATIONS) and all(isinstance(p, str) for p in paths)):
            raise CheckpointError(
                f"mapping[{name!r}] = {given!r}: expected a path, (path, 'transpose'), "
                "((path, path, ...), 'transpose') or None"
            )
        stars = {p.count("*") for p in paths} - {0, name.count("*")}
        if stars or (name.count("*") > 1 and any("*" not in p for p in paths)):
            raise CheckpointError(f"mapping[{name!r}] = {given!r}: each * needs one in the path")
        rules.append(Rule(name, paths, "transpose" in operations))
    return tuple(rules)


@dataclass(frozen=True)
class _Share:
    """A parameter's share of one tensor.

    Args:
      tensor: Name.
      view: Its columns that are the parameter's, transposed if the rule says so.
      layer: Which layer of a stack it is; None: it is the whole parameter.
    """

    tensor: str
    view: np.ndarray
    layer: str | None


def bind(
    rules: tuple[Rule, ...], tensors: Mapping[str, np.ndarray], wanted: Mapping[str, Any]
) -> dict[str, list[Pieces]]:
    """Parameter path -> its values as views of the files; several if they are there repeatedly.

    Args:
      rules: From `parse`.
      tensors: Name -> view of a file.
      wanted: Path -> shape and dtype of the model's parameter.

    Raises:
      CheckpointError: Everything that is missing, too much or of another shape, in one message.
    """
    shares, unexpected = _shares(rules, tensors, wanted)
    problems = unexpected + [
        f"  missing: {path} {list(wanted[path].shape)}" + _hint(rules, path)
        for path in wanted
        if path not in shares
    ]
    found: dict[str, list[Pieces]] = {}
    for path, parts in shares.items():
        try:
            found[path] = list(_views(path, parts, tuple(wanted[path].shape)))
        except CheckpointError as error:
            problems.append(f"  {error}")
    if problems:
        raise CheckpointError(
            f"{len(problems)} tensors and parameters do not fit:\n"
            + "\n".join(problems)
            + "\nIn a mapping, None leaves a tensor out"
        )
    return {path: found[path] for path in wanted}


def _shares(
    rules: tuple[Rule, ...], tensors: Mapping[str, np.ndarray], wanted: Mapping[str, Any]
) -> tuple[dict[str, list[_Share]], list[str]]:
    shares: dict[str, list[_Share]] = {}
    unexpected = []
    for tensor, view in tensors.items():
        hits = [(r, stars) for r in rules if (stars := r.matched(tensor)) is not None]
        if not hits:
            unexpected.append(f"  unexpected: {tensor} {list(view.shape)}")
            continue
        rule, stars = hits[0]
        paths = [_filled(path, stars) for path in rule.paths]
        strange = [path for path in paths if path not in wanted]
        if strange:
            there = f"{tensor} {list(view.shape)}: the model has no {', '.join(strange)}"
            unexpected.append(f"  unexpected: {there}")
            continue
        layers = [stars[0] if stars and "*" not in path else None for path in rule.paths]
        columns = _columns(view.T if rule.transpose else view, paths, layers, wanted)
        for path, layer, part in zip(paths, layers, columns, strict=True):
            shares.setdefault(path, []).append(_Share(tensor, part, layer))
    return shares, unexpected


def _columns(
    view: np.ndarray, paths: list[str], layers: list[str | None], wanted: Mapping[str, Any]
) -> Iterator[np.ndarray]:
    """One after the other, each parameter's part of the last dim; the last one gets the rest."""
    rows, start = max(math.prod(view.shape[:-1]), 1), 0
    for path, layer in zip(paths[:-1], layers, strict=False):
        shape = wanted[path].shape
        stop = start + math.prod(shape if layer is None else shape[1:]) // rows
        yield view[..., start:stop]
        start = stop
    for _ in paths[-1:]:
        yield view[..., start:] if start else view


def _filled(path: str, stars: tuple[str, ...]) -> str:
    for star in stars if "*" in path else ():
        path = path.replace("*", star, 1)
    return path


def _hint(rules: tuple[Rule, ...], path: str) -> str:
    generic = re.sub(r"(?<=/)\d+(?=/)", "*", path)
    names = [r.name for r in rules if {path, generic} & set(r.paths)]
    return f", from {' or '.join(names)}" if names else ": no rule of the mapping leads there"


def _views(path: str, shares: list[_Share], shape: tuple[int, ...]) -> Iterator[Pieces]:
    if shares[0].layer is None:
        if len(shares) > 2:
            names = ", ".join(share.tensor for share in shares)
            raise CheckpointError(f"{len(shares)} tensors lead to {path}: {names}")
        for share in shares:
            yield single(_view(path, share, shape))
        return
    layers = {share.layer: share for share in shares}
    if set(layers) != {str(n) for n in range(shape[0])} or len(layers) != len(shares):
        raise CheckpointError(
            f"{path} {list(shape)} is a stack of {shape[0]} layers, and these are there: "
            + ", ".join(share.tensor for share in shares)
        )
    each = (layers[str(n)] for n in range(shape[0]))
    yield stacked([single(_view(path, share, shape[1:])) for share in each])


def _view(path: str, share: _Share, shape: tuple[int, ...]) -> np.ndarray:
    return reshaped(share.view, shape, f"{share.tensor} for {path}")


def left_out(rules: tuple[Rule, ...], tensors: Iterable[str]) -> list[str]:
    """Tensors that belong to no parameter."""
    hit = lambda name: next(r for r in rules if r.matched(name) is not None)
    return [name for name in tensors if not hit(name).paths]


def casts(
    found: Mapping[str, list[Pieces]], wanted: Mapping[str, Any]
) -> dict[tuple[np.dtype, np.dtype], list[str]]:
    """(dtype in the file, dtype of the model) -> paths of the parameters where they differ."""
    out: dict[tuple[np.dtype, np.dtype], list[str]] = {}
    for path, pieces in found.items():
        have, want = pieces[0].dtype, np.dtype(wanted[path].dtype)
        if have != want:
            out.setdefault((have, want), []).append(path)
    return out
