"""One communication of a compiled step, as data."""

from dataclasses import dataclass

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)
UNKNOWN_AXES = ("?",)


@dataclass(frozen=True)
class Collective:
    """One communication of a compiled step, as one device sees it.

    Attributes:
        kind: HLO name: `all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all`,
            `collective-permute`, `ragged-all-to-all`, `collective-broadcast`.
        bytes: payload of one execution on one device: all-reduce, the array reduced; all-gather,
            the gathered *result*; reduce-scatter, the unscattered *input*; all-to-all, the array
            exchanged; permute and broadcast, the array sent; ragged-all-to-all, the input buffer
            (what is really sent depends on data). Combined collectives: the sum. What the wires
            carry: `wire_bytes`.
        axes: names of the mesh axes it runs over, in mesh order; `("?",)` when its groups are not
            all devices along some axes (see `within`).
        count: executions per step, loop trip counts multiplied out.
        is_async: the program starts it and waits for it in two instructions.
        overlapped_flops: operations of products scheduled between its start and its end, per step.
        source: `file:line` of the line of code it came from, or "".
        parameter: the program argument it moves or, for a reduction, updates (a path such as
            `params['w']`; several joined with ` + `); "" when there is none or it is not clear.
            Of a combined reduction, those that are clear.
        operation_name: scopes it was traced under, from JAX; of the first of merged rows.
        group_size: devices that take part in one group.
        num_operands: arrays combined into it.
        is_exact: False when `count` assumes one pass of a data-dependent loop, or that the branch
            of a conditional is taken.
        in_loop: it runs in the body of a loop.
        is_loop_invariant: in a loop, an all-gather of the same program argument in each iteration.
        is_only_sliced: an all-reduce of whose result each device reads only its own part.
        is_sum_of_pieces: an all-reduce of pieces that do not overlap: a gather in effect.
        every: it runs in one of so many steps, as a scope named `every_N_steps` around it says.
        within: the mesh axes along which its groups vary; differs from `axes` only where that is
            `("?",)`.
    """

    kind: str
    bytes: int
    axes: tuple[str, ...]
    count: int = 1
    is_async: bool = False
    source: str = ""
    parameter: str = ""
    operation_name: str = ""
    group_size: int = 0
    num_operands: int = 1
    is_exact: bool = True
    in_loop: bool = False
    is_loop_invariant: bool = False
    is_only_sliced: bool = False
    is_sum_of_pieces: bool = False
    within: tuple[str, ...] = ()
    overlapped_flops: int = 0
    every: int = 1
