"""`explain_oom`: from an out-of-memory error to who owns the memory and what would fix it."""

from dataclasses import dataclass
from typing import Any

from shardtrain.errors import ShardtrainError
from shardtrain.explore.oom_text import Allocation, OomText, read_oom, short_operation
from shardtrain.plan import Plan
from shardtrain.planner.traffic import format_bytes
from shardtrain.tables import Table


@dataclass(frozen=True)
class Change:
    """A change of the strategy.

    Attributes:
        change: `remat=full`.
        strategy: the whole strategy with it.
        saves: bytes on each device, by the plan's own count.
        fits: whether that is enough; None where the report does not say how much is missing.
    """

    change: str
    strategy: str
    saves: int
    fits: bool | None


@dataclass(frozen=True)
class OomReport:
    """What an out-of-memory error means for a plan.

    Attributes:
        text: the figures of the report.
        owners: (who, bytes) on one device, largest first.
        changes: what would help, cheapest in time first.
        refused: (change, why `st.plan` does not allow it).
    """

    text: OomText
    owners: tuple[tuple[str, int], ...]
    changes: tuple[Change, ...]
    refused: tuple[tuple[str, str], ...] = ()

    @property
    def fix(self) -> Change | None:
        """The cheapest change that is enough, or else the one that saves most."""
        enough = [change for change in self.changes if change.fits]
        if enough:
            return enough[0]
        return max(self.changes, key=lambda change: change.saves, default=None)

    def __str__(self) -> str:
        parts = [self._needs()]
        if self.owners:
            parts.append("largest: " + ", ".join(f"{who} {format_bytes(b)}"
                                                 for who, b in self.owners[:3]))  # fmt: skip
        fix = self.fix
        if fix is not None:
            enough = {True: " and fits", False: ", which is not enough alone", None: ""}[fix.fits]
            parts.append(f"{fix.change} saves {format_bytes(fix.saves)}{enough}: {fix.strategy}")
        return "; ".join(parts)

    def _needs(self) -> str:
        text = self.text
        if text.needed is None:
            return "out of memory"
        what = "the program needs" if text.is_whole else "asked for"
        there = "" if text.available is None else f", there are {format_bytes(text.available)}"
        return f"out of memory: {what} {format_bytes(text.needed)}{there}"

    def table(self) -> Table:
        """Owners and changes."""
        rows = [("owner", who, format_bytes(size), "") for who, size in self.owners]
        for change in self.changes:
            told = {True: "fits", False: "not enough alone", None: ""}[change.fits]
            rows.append(("change", change.change, f"-{format_bytes(change.saves)}", told))
        rows += [("change", name, "", f"not possible: {why}") for name, why in self.refused]
        return Table(self._needs(), ("", "what", ">bytes", ""), tuple(rows))

    def __rich__(self) -> Any:
        return self.table().__rich__()

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def explain_oom(error: BaseException | str, plan: Plan | None = None) -> OomReport:
    """The largest owners in an out-of-memory error, and the cheapest change of plan that fixes it.

    Args:
        error: what JAX (or `plan.compile`) raised, or its text.
        plan: the plan that ran; None: only the error is read.

    Example:
        >>> report = explain_oom("RESOURCE_EXHAUSTED: Out of memory allocating 1073741824 bytes.")
        >>> print(report)
        out of memory: asked for 1.07 GB
    """
    text = read_oom(full_text(error))
    owners = [(_owner(one, plan), one.bytes) for one in text.allocations]
    if plan is None:
        return OomReport(text, tuple(owners), ())
    if not owners:
        owners = _classes(plan)
    changes, refused = _changes(plan, text.shortfall)
    return OomReport(text, tuple(owners[:12]), tuple(changes), tuple(refused))


def full_text(error: BaseException | str) -> str:
    """The message of an error and of those it came from."""
    if isinstance(error, str):
        return error
    parts, seen = [], set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        parts.append(str(one))
        one = one.__cause__ or one.__context__
    return "\n".join(reversed(parts))  # the compiler's own words first


def _owner(one: Allocation, plan: Plan | None) -> str:
    """Parameter path, or the operation's path in the model, with shape and count."""
    times = f" x{one.count}" if one.count > 1 else ""
    if one.is_argument:
        return f"{_argument(one, plan)} {one.shape}{times}".strip()
    name = short_operation(one.operation) or "a temporary"
    where = f" ({'/'.join(one.source.rsplit('/', 2)[-2:])})" if one.source else ""
    return f"{name} {one.shape}{times}{where}"


def _argument(one: Allocation, plan: Plan | None) -> str:
    """Which arrays of the state have this shape on one device."""
    if plan is None:
        return "argument"
    dims = tuple(int(d) for d in one.shape.partition("[")[2].rstrip("]").split(",") if d)
    found = [
        path for path, leaf in plan.layout.params.items()
        if _local(plan, leaf.full, leaf.shape) == dims or leaf.shape == dims
    ]  # fmt: skip
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f"{found[0]}{more} or its optimizer state" if found else "argument"


def _local(plan: Plan, spec: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A parameter's shape on one device."""
    sizes = plan.layout.sizes
    entries = (*spec, *(None for _ in shape))
    local = []
    for size, entry in zip(shape, entries, strict=False):
        axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        for axis in axes:
            size //= sizes[axis]
        local.append(size)
    return tuple(local)


def _classes(plan: Plan) -> list[tuple[str, int]]:
    """The plan's own count where the report names no arrays."""
    memory = plan.memory()
    names = ("params", "grads", "optimizer", "variables", "batch", "activations")
    rows = [(f"{name} (estimate)", getattr(memory, name)) for name in names]
    return sorted((row for row in rows if row[1]), key=lambda row: -row[1])


def _changes(plan: Plan, shortfall: int | None) -> tuple[list[Change], list[tuple[str, str]]]:
    """Strategies near the plan's, cheapest in time first, with what each saves."""
    s = plan.strategy
    tries: list[dict[str, Any]] = [{"num_microbatches": 2 * s.num_microbatches}]
    if s.fsdp > 1 and s.zero < 3:
        tries.append({"zero": 3})
    if s.data > 1:
        tries.append({"data": 1, "fsdp": s.data * s.fsdp})
    if s.remat == "none":
        tries.append({"remat": "dots"})
    if s.remat != "full":
        tries.append({"remat": "full"})
    tries.append({"num_microbatches": 4 * s.num_microbatches, "remat": "full"})
    before = plan.memory().total
    changes, refused = [], []
    for change in tries:
        name = ",".join(f"{field}={value}" for field, value in change.items())
        try:
            after = plan.again(strategy=s.replace(**change)).memory().total
        except ShardtrainError as error:
            refused.append((name, str(error).partition("\n")[0]))
            continue
        if after < before:
            fits = None if shortfall is None else before - after >= shortfall
            changes.append(Change(name, str(s.replace(**change)), before - after, fits))
    return changes, refused
