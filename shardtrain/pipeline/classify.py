"""Sort a traced loss around its blocks into the functions and leaves a pipeline needs."""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax.extend.core as jex
import jax.numpy as jnp

from shardtrain.errors import StageSplitError
from shardtrain.pipeline.blocks import BlockSet, Stacked
from shardtrain.pipeline.jaxprs import (
    backward_slice,
    build,
    casts,
    depends,
    is_literal,
    type_of,
    variables,
)
from shardtrain.pipeline.markers import BlockGroup
from shardtrain.pipeline.stages import LayerLeaf, unique_names

if TYPE_CHECKING:
    from shardtrain.pipeline.extract import Trace

Flat = Callable[..., list[Any]]


@dataclasses.dataclass(frozen=True)
class Extracted:
    """A model's loss in pipeline pieces; see `extract` for what each piece is.

    The functions take and return flat lists. `outer` means: the values of `outer_params`, then of
    `outer_variables`, the batch leaves, the key.

    Attributes:
        count: number of blocks (layers) in the pipeline.
        params: the blocks' parameters.
        param_dtypes: dtypes in which the block reads them (mixed precision casts every parameter).
        states: the blocks' variables that change (BatchNorm, rng counters).
        outer_params, outer_variables: paths of all other leaves.
        pre: outer -> first carry.
        sides: outer -> shared values, then one `[count, ...]` array per per-layer value.
        block: (params, states, per-layer, shared, carry) of one layer -> carry, states, collected.
        post: outer, carry, `[count, ...]` collected values -> outputs, then `post_state`.
        pre_state: outer -> new values of `pre_state` paths.
        num_shared, num_per_layer: lengths of the two parts of `sides`.
        side_grads: for every value of `sides`, whether parameters influence it.
        carry: abstract carry of one microbatch.
        collected: abstract per-layer results that `post` reads (auxiliary losses).
        output_tree: tree of the outputs, a `LossOutput`.
        note: what was found, for people.
        remat: arguments of `jax.checkpoint` around every block, or None.
        group: the modules that are the blocks; None: the body of a scan.
    """

    count: int
    params: tuple[LayerLeaf, ...]
    param_dtypes: tuple[Any, ...]
    states: tuple[LayerLeaf, ...]
    outer_params: tuple[str, ...]
    outer_variables: tuple[str, ...]
    pre: Flat
    sides: Flat
    block: Flat
    post: Flat
    pre_state_fn: Flat
    pre_state: tuple[str, ...]
    post_state: tuple[str, ...]
    num_shared: int
    num_per_layer: int
    side_grads: tuple[bool, ...]
    carry: tuple[Any, ...]
    collected: tuple[Any, ...]
    output_tree: Any
    note: str
    remat: dict[str, Any] | None
    group: BlockGroup | None = None


@dataclasses.dataclass
class _Slots:
    """Slot variables by what feeds them, with their operands."""

    params: list[tuple[jex.Var, LayerLeaf]] = dataclasses.field(default_factory=list)
    states: list[tuple[jex.Var | None, LayerLeaf, Any]] = dataclasses.field(default_factory=list)
    per_layer: list[tuple[jex.Var, Any]] = dataclasses.field(default_factory=list)
    shared: list[tuple[jex.Var, Any]] = dataclasses.field(default_factory=list)


def classify(trace: "Trace", blocks: BlockSet) -> Extracted:
    """Sort everything around `blocks`.

    Raises:
        StageSplitError: something outside reads what only a stage has (hidden states of every
            layer), or the block's output type differs from its input.
    """
    _same_carry_types(blocks)
    states = _state_groups(trace, blocks)
    collected = _collected(trace, blocks, states)
    slots = _sort_slots(trace, blocks, states)
    taken = {p for _, leaf in slots.params for p in leaf.paths}
    held = {p for _, leaf, _ in slots.states for p in leaf.paths}
    outer_params = {p: v for p, v in trace.params.items() if p not in taken}
    outer_vars = {p: v for p, v in trace.variables.items() if p not in held}
    outer = [*outer_params.values(), *outer_vars.values(), *trace.batch, trace.key]
    carry_slots = list(blocks.carries)
    pre_state, post_state = _outer_state(trace, blocks, outer_vars)

    def make(outputs: Sequence[Any], extra: Sequence[Any] = ()) -> Flat:
        return build(blocks.rest, [*outer, *extra], outputs, blocks.consts)

    side_atoms = [atom for _, atom in slots.shared] + [
        atom
        for _, atoms in slots.per_layer
        for atom in (atoms if isinstance(atoms, tuple) else [atoms.var])
    ]
    final = [blocks.final.get(source, source) for source, _ in blocks.carries.values()]
    flat_collected = [var for _, each in collected for var in each.values()]
    outputs = [*trace.output, *(trace.new_variables[p] for p in post_state)]
    results = [
        *(source for source, _ in blocks.carries.values()),
        *(new for _, _, new in slots.states),
        *(base for base, _ in collected),
    ]
    placeholders = [s or jex.Var(new.aval) for s, _, new in slots.states]
    block_inputs = [
        *(s for s, _ in slots.params),
        *placeholders,
        *(s for s, _ in slots.per_layer),
        *(s for s, _ in slots.shared),
        *carry_slots,
    ]
    reached = depends(blocks.rest, outer_params.values())
    return Extracted(
        count=blocks.count,
        params=tuple(leaf for _, leaf in slots.params),
        param_dtypes=tuple(type_of(slot).dtype for slot, _ in slots.params),
        states=tuple(leaf for _, leaf, _ in slots.states),
        outer_params=tuple(outer_params),
        outer_variables=tuple(outer_vars),
        pre=make([first for _, first in blocks.carries.values()]),
        sides=_stack_sides(make(side_atoms), slots, blocks.count),
        block=build(blocks.eqns, block_inputs, results, blocks.consts),
        post=_unstack_collected(make(outputs, [*final, *flat_collected]), collected),
        pre_state_fn=make([trace.new_variables[p] for p in pre_state]),
        pre_state=pre_state,
        post_state=post_state,
        num_shared=len(slots.shared),
        num_per_layer=len(slots.per_layer),
        side_grads=tuple(
            any(not is_literal(a) and a in reached for a in atoms)
            and jnp.issubdtype(type_of(slot).dtype, jnp.inexact)
            for slot, atoms in _side_operands(slots)
        ),
        carry=tuple(slot.aval for slot in carry_slots),
        collected=tuple(base.aval for base, _ in collected),
        output_tree=trace.output_tree,
        note=blocks.note,
        remat=blocks.remat,
    )


def _side_operands(slots: _Slots) -> list[tuple[jex.Var, Sequence[Any]]]:
    shared = [(slot, (atom,)) for slot, atom in slots.shared]
    layered = [
        (slot, atoms if isinstance(atoms, tuple) else (atoms.var,))
        for slot, atoms in slots.per_layer
    ]
    return shared + layered


def _same_carry_types(blocks: BlockSet) -> None:
    for slot, (source, first) in blocks.carries.items():
        kinds = [(type_of(a).shape, type_of(a).dtype) for a in (slot, source, first)]
        if kinds[0] != kinds[1] or kinds[0] != kinds[2]:
            raise StageSplitError(
                f"a block gets {first.aval.str_short()} and returns {source.aval.str_short()}: the "
                "output of a pipelined block must have the type of its input"
            )


def _uses(trace: "Trace", blocks: BlockSet) -> tuple[set, set]:
    """Variables that equations outside the blocks read, and those that are outputs."""
    outputs = [*trace.output, *trace.new_variables.values()]
    firsts = [first for _, first in blocks.carries.values()]
    sides = [
        a
        for atoms in blocks.slots.values()
        for a in (atoms if isinstance(atoms, tuple) else [atoms.var])
    ]
    inputs = {*trace.params.values(), *trace.variables.values()}
    whole = casts(blocks.rest, trace.params.values())
    sides = [a for a in sides if is_literal(a) or whole.get(a, a) not in inputs]
    needed = [a for a in [*outputs, *firsts, *sides] if is_literal(a) or a not in inputs]
    kept = backward_slice(blocks.rest, needed)
    return {v for eqn in kept for v in variables(eqn.invars)}, set(variables(outputs))


def _state_groups(trace: "Trace", blocks: BlockSet) -> dict[jex.Var, LayerLeaf]:
    """Block results that are new values of one variable per layer."""
    read, _ = _uses(trace, blocks)
    path_of = {v: p for p, v in trace.new_variables.items() if not is_literal(v)}
    groups = {}
    for base, each in blocks.results.items():
        if isinstance(each, Stacked):
            if each.var in path_of and each.var not in read:
                groups[base] = LayerLeaf.of((path_of[each.var],), stacked=True)
        elif all(v in path_of and v not in read for v in each):
            groups[base] = LayerLeaf.of(tuple(path_of[v] for v in each), stacked=False)
    return groups


def _collected(
    trace: "Trace", blocks: BlockSet, states: dict
) -> list[tuple[jex.Var, dict[int | None, Any]]]:
    """Block results that the rest of the program reads: result -> {layer: variable}."""
    read, outputs = _uses(trace, blocks)
    carried = {source for source, _ in blocks.carries.values()}
    found = []
    for base, each in blocks.results.items():
        if base in states:
            continue
        layers = {None: each.var} if isinstance(each, Stacked) else dict(enumerate(each))
        used = {n: v for n, v in layers.items() if v in read or v in outputs}
        if base in carried:
            used.pop(blocks.count - 1, None)
        if used:
            _refuse_large(base, blocks, used)
            found.append((base, used))
    return found


def _refuse_large(base: jex.Var, blocks: BlockSet, used: dict) -> None:
    size, carry = type_of(base).size, sum(type_of(slot).size for slot in blocks.carries)
    if size > 64 and 16 * size > carry:
        raise StageSplitError(
            f"{base.aval.str_short()} of {len(used)} blocks is read after the last block (hidden "
            "states used by the head). A pipeline would have to send all of them along"
        )


def _sort_slots(trace: "Trace", blocks: BlockSet, states: dict[jex.Var, LayerLeaf]) -> _Slots:
    read, _ = _uses(trace, blocks)
    param_of = {v: p for p, v in trace.params.items()}
    variable_of = {v: p for p, v in trace.variables.items()}
    by_paths = {leaf.paths: (base, leaf) for base, leaf in states.items()}
    operands = collections.Counter(
        a
        for atoms in blocks.slots.values()
        for a in set(variables(atoms if isinstance(atoms, tuple) else [atoms.var]))
    )
    found = _Slots()
    seen = set()
    whole = casts(blocks.rest, trace.params.values())
    for slot, atoms in blocks.slots.items():
        each = (atoms.var,) if isinstance(atoms, Stacked) else atoms
        stacked = isinstance(atoms, Stacked)
        given, each = each, tuple(a if is_literal(a) else whole.get(a, a) for a in each)
        known = tuple(variable_of.get(a, "") if not is_literal(a) else "" for a in each)
        alone = all(not is_literal(a) and a not in read for a in each)
        alone = alone and all(operands[a] == 1 for a in given)
        if known in by_paths:
            base, leaf = by_paths[known]
            found.states.append((slot, leaf, base))
            seen.add(base)
        elif not stacked and all(a is given[0] for a in given):
            found.shared.append((slot, given[0]))
        elif alone and all(a in param_of for a in each):
            paths = tuple(param_of[a] for a in each)
            found.params.append((slot, LayerLeaf.of(paths, stacked=stacked)))
        else:
            found.per_layer.append((slot, atoms))
    found.states += [(None, leaf, base) for base, leaf in states.items() if base not in seen]
    named = unique_names([leaf for _, leaf in found.params] + [leaf for _, leaf, _ in found.states])
    found.params = [(slot, named[leaf.paths]) for slot, leaf in found.params]
    found.states = [(slot, named[leaf.paths], base) for slot, leaf, base in found.states]
    return found


def _outer_state(
    trace: "Trace", blocks: BlockSet, outer_vars: dict[str, jex.Var]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths of changing outer variables: known before the blocks, or only after them."""
    results = [
        v
        for each in blocks.results.values()
        for v in (each if isinstance(each, list) else [each.var])
    ]
    late = depends(blocks.rest, [*results, *blocks.final.values()])
    changed = {
        p: trace.new_variables[p] for p, v in outer_vars.items() if trace.new_variables[p] is not v
    }
    after = tuple(p for p, v in changed.items() if not is_literal(v) and v in late)
    before = tuple(p for p in changed if p not in after)
    early = [eqn for eqn in blocks.rest if not late.intersection(eqn.outvars)]
    for path in after:
        if any(outer_vars[path] in variables(eqn.invars) for eqn in early):
            raise StageSplitError(
                f"variable {path} changes after the last block but is read before or in the blocks "
                "of the next microbatch"
            )
    return before, after


def _stack_sides(flat: Flat, slots: _Slots, count: int) -> Flat:
    """Per-layer values stacked `[count, ...]`; shared ones as they are."""
    layered = [isinstance(atoms, tuple) for _, atoms in slots.per_layer]

    def sides(*outer: Any) -> list[Any]:
        values = flat(*outer)
        out, at = values[: len(slots.shared)], len(slots.shared)
        for is_list in layered:
            width = count if is_list else 1
            part = values[at : at + width]
            out.append(jnp.stack(part) if is_list else part[0])
            at += width
        return out

    return sides


def _unstack_collected(flat: Flat, collected: list) -> Flat:
    """`post` gets one `[count, ...]` array per collected result and picks the layers it reads."""

    def post(*args: Any) -> list[Any]:
        split = len(args) - len(collected)
        picked = [
            array if layer is None else array[layer]
            for array, (_, used) in zip(args[split:], collected, strict=True)
            for layer in used
        ]
        return flat(*args[:split], *picked)

    return post
