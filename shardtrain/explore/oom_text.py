"""XLA's out-of-memory reports as figures: what was asked for, what there is, the largest arrays.

Four kinds of text are known (seen with jaxlib 0.3 to 0.10): the TPU compiler's ("Used 63.80G of
30.75G hbm", numbered allocations), the TPU runtime's ("Attempting to reserve 10.51G ... There are
8.97G free"), the GPU's ("while trying to allocate 4770354232 bytes", peak buffers) and the CPU's
("Out of memory allocating 4398046511104 bytes").
"""

import re
from dataclasses import dataclass

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?"

_NEEDED = tuple(re.compile(p.replace("SIZE", _SIZE)) for p in (
    r"Used SIZE of SIZE hbm",
    r"Attempting to (?:reserve|allocate) SIZE\b.*?There are SIZE free",
))  # fmt: skip
_ALLOCATE = re.compile(r"(?:trying to allocate|Out of memory allocating) " + _SIZE + r"(?:ytes)?")
_STATS = re.compile(
    r"^\s*(parameter|constant|maybe_live_out|preallocated temp|total) allocation:\s*" + _SIZE,
    re.MULTILINE,
)
_TPU_STATS = re.compile(r"^\s*(reserved|program|arguments|HLO temp|global|scoped)\s+" + _SIZE
                        + r"(?:\s|$)", re.MULTILINE)  # fmt: skip
_BLOCK = re.compile(r"(?:^\s*\d+\.\s+Size:|^\s*Buffer \d+:\s*\n\s*Size:)\s*" + _SIZE
                    + r"\s*\n(.*?)(?=={10,}|\Z)", re.MULTILINE | re.DOTALL)  # fmt: skip
_OPERATOR = re.compile(r'op_name="([^"]*)"')
_SOURCE = re.compile(r'source_file="([^"]*)" source_line=(\d+)')
_SHAPE = re.compile(r"(?:Shape|Entry Parameter Subshape|Subshape): (\w+\[[\d,]*\])")


@dataclass(frozen=True)
class Allocation:
    """One array of the report.

    Attributes:
        bytes: on one device.
        operation: JAX's name of the operation that makes it; "" for an argument.
        shape: as XLA prints it, `f32[32,4096,4096]`.
        source: file and line.
        is_argument: a parameter of the program: weights, optimizer state, batch.
        count: how many arrays of this shape from the same operation in different layers.
    """

    bytes: int
    operation: str
    shape: str
    source: str = ""
    is_argument: bool = False
    count: int = 1


@dataclass(frozen=True)
class OomText:
    """What a report says; None where it does not say.

    Attributes:
        needed: bytes asked for, of the whole program or of one allocation.
        available: bytes there were.
        is_whole: `needed` is the whole program's, not one allocation's.
        classes: bytes by class, as the compiler names them.
        allocations: the largest arrays, equal ones of repeated layers together.
    """

    needed: int | None
    available: int | None
    is_whole: bool
    classes: dict[str, int]
    allocations: tuple[Allocation, ...]

    @property
    def shortfall(self) -> int | None:
        """Bytes that are missing."""
        if self.needed is None or self.available is None:
            return None
        return max(0, self.needed - self.available)


def read_oom(text: str) -> OomText:
    """Read a report.

    Args:
        text: the error's message, with what the compiler appended.

    Example:
        >>> found = read_oom("RESOURCE_EXHAUSTED: Used 21.95G of 15.48G hbm.")
        >>> round(found.shortfall / 2**30, 2)
        6.47
    """
    needed = available = None
    is_whole = False
    for number, pattern in enumerate(_NEEDED):
        if match := pattern.search(text):
            needed, available = _bytes(*match.groups()[:2]), _bytes(*match.groups()[2:])
            is_whole = number == 0
            break
    if needed is None and (match := _ALLOCATE.search(text)):
        needed = _bytes(*match.groups())
    pattern = _STATS if _STATS.search(text) else _TPU_STATS
    classes = {name: _bytes(size, unit) for name, size, unit in pattern.findall(text)}
    blocks = [_allocation(_bytes(size, unit), body) for size, unit, body in _BLOCK.findall(text)]
    return OomText(needed, available, is_whole, classes, _together(blocks))


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * _UNITS[unit])


def _allocation(size: int, body: str) -> Allocation:
    operator, source, shape = _OPERATOR.search(body), _SOURCE.search(body), _SHAPE.search(body)
    is_argument = "Parameter Subshape" in body or "Allocation type: Argument" in body
    return Allocation(
        size, operator.group(1) if operator else "", shape.group(1) if shape else "",
        f"{source.group(1)}:{source.group(2)}" if source else "", is_argument,
    )  # fmt: skip


def _together(found: list[Allocation]) -> tuple[Allocation, ...]:
    """Arrays of repeated layers (numbers in the operation differ) as one row, largest first."""
    groups: dict[tuple[str, str, bool], list[Allocation]] = {}
    for one in found:
        where = re.sub(r"\d+", "*", short_operation(one.operation))
        groups.setdefault((where, one.shape, one.is_argument), []).append(one)
    rows = [
        Allocation(sum(a.bytes for a in group), group[0].operation, group[0].shape,
                   group[0].source, group[0].is_argument, len(group))
        for group in groups.values()
    ]  # fmt: skip
    return tuple(sorted(rows, key=lambda a: -a.bytes))


def short_operation(name: str) -> str:
    """The path within the model: `transformer/h/0/self_attention/dot_general`.

    Example:
        >>> short_operation("jit(step)/jvp(Net)/h/0/attention/dot_general[precision=None]")
        'Net/h/0/attention/dot_general'
    """
    name = name.partition("[")[0]
    parts = [re.sub(r"^(?:jvp|transpose)\((?:jvp\()?(.*?)\)*$", r"\1", p) for p in name.split("/")]
    return "/".join(p for p in parts if p and not re.match(r"p?jit\(|jit_", p))
