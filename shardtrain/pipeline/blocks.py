"""The repeated block of a flat program: from markers around calls, or from a scan.

Both give a `BlockSet`: one template with *slots*; a slot holds one operand per block.
"""

import dataclasses
import itertools
from typing import Any

import jax.extend.core as jex

from shardtrain.compat import scan_counts
from shardtrain.pipeline.antiunify import anti_unify
from shardtrain.pipeline.jaxprs import Program, casts, depends, is_literal, type_of, variables
from shardtrain.pipeline.markers import BlockGroup


@dataclasses.dataclass
class Stacked:
    """Slot operands that are one array with the blocks along axis 0 (a scan's `xs`)."""

    var: Any


@dataclasses.dataclass
class BlockSet:
    """The pipelined blocks of a program.

    Attributes:
        count: number of blocks.
        eqns: equations of one block, over slot variables.
        slots: slot variable -> a tuple with one operand per block, or `Stacked`.
        carries: slot variable -> (template result that feeds it in the next block, first operand).
        results: template result -> the program's variable per block (or `Stacked`).
        final: template result -> the program's variable after the last block.
        rest: the program's other equations (and those of blocks that need no other block).
        remat: parameters of `jax.checkpoint` around every block, or None.
        consts: constants of the template.
        note: what the user should know about the split.
    """

    count: int
    eqns: list[jex.JaxprEqn]
    slots: dict[jex.Var, Any]
    carries: dict[jex.Var, tuple[Any, Any]]
    results: dict[jex.Var, Any]
    final: dict[jex.Var, jex.Var]
    rest: list[jex.JaxprEqn]
    remat: dict[str, Any] | None
    consts: dict[jex.Var, Any]
    note: str = ""


def from_marks(program: Program, group: BlockGroup, num_chunks: int) -> BlockSet | str:
    """Blocks from the markers of `group`, or why not.

    If neighbouring blocks differ, longer periods are tried (blocks that alternate), and leading
    blocks are moved to `pre` (a different first block, a remainder).
    """
    marks = [m for m in program.marks if m.name.partition(":")[2].startswith(("enter", "exit"))]
    names = [m.name.split(":", 1)[1] for m in marks]
    total = len(names) // 2
    if not names:
        return "its modules are not called where the pipeline can see them (inside scan or vmap?)"
    order = [int(n.split(":")[1]) for n in names[::2]]
    if names != [f"{what}:{i}" for i in order for what in ("enter", "exit")] or len(
        set(order)
    ) != len(order):
        return "a block is called twice, inside another, or returns no array"
    if total < num_chunks:
        return f"{total} blocks are fewer than {num_chunks} stages"
    first_reason = ""
    for period in range(1, total // num_chunks + 1):
        for prefix in range(total % (num_chunks * period), total // 2 + 1, num_chunks * period):
            found = _try(program, marks, prefix, period)
            if not isinstance(found, str):
                found.note = _note(group, total, prefix, period)
                return found
            first_reason = first_reason or found
    return first_reason


def _note(group: BlockGroup, total: int, prefix: int, period: int) -> str:
    said = f"{total} blocks at {group.pattern}"
    if period > 1:
        said += f", {period} consecutive ones repeat together"
    if prefix:
        said += f"; the first {prefix} run before the pipeline, on every stage"
    return said


def _try(program: Program, marks: list, prefix: int, period: int) -> BlockSet | str:
    enters, exits = marks[2 * prefix :: 2], marks[2 * prefix + 1 :: 2]
    carried = depends(program.eqns, {v for mark in exits for v in variables(mark.atoms)})
    pieces = _pieces(program, enters, exits, carried, period)
    grouped = [
        list(itertools.chain(*pieces[n : n + period])) for n in range(0, len(pieces), period)
    ]
    template = anti_unify(grouped)
    if isinstance(template, tuple):
        index, mismatch = template
        return f"block {prefix + index * period} {mismatch.reason}"
    return _wire(program, template, grouped, carried, marks[2 * prefix].name)


def _pieces(program: Program, enters: list, exits: list, carried: set, period: int) -> list[list]:
    """Per block: its own equations and the glue after it that works on its results.

    After the last block only as much counts as glue as after the block one period earlier.
    """
    ends = [*(mark.position for mark in enters[1:]), len(program.eqns)]
    glue = [
        [e for e in program.eqns[leave.position : end] if carried.intersection(variables(e.invars))]
        for leave, end in zip(exits, ends, strict=True)
    ]
    if len(glue) > period:
        glue[-1] = glue[-1][: len(glue[-1 - period])]
    return [
        [*program.eqns[enter.position : leave.position], *after]
        for enter, leave, after in zip(enters, exits, glue, strict=True)
    ]


def _wire(program: Program, template: Any, pieces: list, carried: set, mark: str) -> BlockSet | str:
    home = {v: n for n, piece in enumerate(pieces) for eqn in piece for v in eqn.outvars}
    carries: dict[jex.Var, tuple[Any, Any]] = {}
    slots: dict[jex.Var, Any] = {}
    for slot, atoms in template.slots.items():
        later = atoms[1:]
        if not any(not is_literal(a) and a in carried for a in later):
            slots[slot] = atoms
            continue
        sources = []
        for n, atom in enumerate(later, start=1):
            if is_literal(atom) or home.get(atom) != n - 1:
                where = "outside the blocks" if is_literal(atom) else f"block {home.get(atom)}"
                return f"block {n} reads a {slot.aval.str_short()} of {where}: a skip connection"
            sources.append(template.maps[n - 1][atom])
        if any(source is not sources[0] for source in sources):
            return f"blocks read different results of their predecessors ({slot.aval.str_short()})"
        carries[slot] = (sources[0], atoms[0])
    core = _core(pieces, carried)
    inside = {id(piece[n]) for piece in pieces for n in core}
    results: dict[jex.Var, list] = {}
    for n in core:
        for v, base in enumerate(pieces[0][n].outvars):
            results[base] = [piece[n].outvars[v] for piece in pieces]
    return BlockSet(
        count=len(pieces),
        eqns=template.eqns,
        slots=slots,
        carries=carries,
        results=results,
        final={base: each[-1] for base, each in results.items()},
        rest=[eqn for eqn in program.eqns if id(eqn) not in inside],
        remat=program.remat.get(mark),
        consts=program.consts,
    )


def _core(pieces: list, carried: set) -> list[int]:
    """Positions of equations that depend on the block's input in any block."""
    seeds = set(carried)
    core = []
    for n, column in enumerate(zip(*pieces, strict=True)):
        if any(seeds.intersection(variables(eqn.invars)) for eqn in column):
            seeds.update(v for eqn in column for v in eqn.outvars)
            core.append(n)
    return core


def from_scan(program: Program, params: set[jex.Var], num_chunks: int) -> BlockSet | str:
    """Blocks from the `lax.scan` that runs over most stacked parameters, or why not."""
    scans = []
    whole = casts(program.eqns, params)
    for eqn in program.eqns:
        if eqn.primitive.name == "scan":
            skip = sum(scan_counts(eqn.params))
            stacked = [v for v in variables(eqn.invars[skip:]) if whole.get(v, v) in params]
            scans.append((sum(type_of(v).size for v in stacked), len(scans), eqn))
    weight, _, eqn = max(scans, default=(0, 0, None), key=lambda s: s[:2])
    if not weight or eqn is None:
        return "no scan over stacked parameters"
    count, closed = eqn.params["length"], eqn.params["jaxpr"]
    if eqn.params["reverse"]:
        return "the scan over the layers runs in reverse"
    if count % num_chunks:
        return f"{count} scanned layers are not divisible by {num_chunks} stages"
    consts, carry = scan_counts(eqn.params)
    body, ins = closed.jaxpr, eqn.invars
    inner = body.invars
    slots: dict[jex.Var, Any] = {
        **{inner[n]: (ins[n],) * count for n in range(consts)},
        **{inner[n]: Stacked(ins[n]) for n in range(consts + carry, len(ins))},
    }
    outs = body.outvars
    carries = {inner[consts + n]: (outs[n], ins[consts + n]) for n in range(carry)}
    results = {
        out: Stacked(eqn.outvars[carry + n])
        for n, out in enumerate(outs[carry:])
        if not is_literal(out)
    }
    final = {out: eqn.outvars[n] for n, out in enumerate(outs[:carry]) if not is_literal(out)}
    return BlockSet(
        count, list(body.eqns), slots, carries, results, final,
        [e for e in program.eqns if e is not eqn], None,
        {**program.consts, **dict(zip(body.constvars, closed.consts, strict=True))},
        note=f"{count} scanned layers",
    )  # fmt: skip
