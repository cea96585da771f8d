"""What the real compiler says of the best few layouts, beside the estimate."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shardtrain.errors import OutOfMemoryError
from shardtrain.explore.choice import Choice
from shardtrain.plan import Plan
from shardtrain.planner.compiled import Compiled
from shardtrain.planner.traffic import format_bytes, total_bytes
from shardtrain.tables import Table


@dataclass(frozen=True)
class CompiledChoice:
    """An estimate and what the compiler found.

    Attributes:
        choice: the layout.
        compiled: what the compiler decided; None when it found that the step does not fit.
        problem: its report then, else "".
    """

    choice: Choice
    compiled: Compiled | None
    problem: str = ""

    @property
    def needed_bytes(self) -> int | None:
        """Bytes on one device, as the compiler has it."""
        if self.compiled is None:
            return None
        return self.compiled.peak_bytes or self.compiled.total_bytes


def compile_choices(
    choices: Sequence[Choice], plan: Callable[[Choice], Plan]
) -> tuple[CompiledChoice, ...]:
    """Compile each layout for its hardware, in processes of their own.

    Args:
        choices: layouts.
        plan: makes the plan of one.
    """
    found = []
    for choice in choices:
        try:
            compiled = plan(choice).compile(str(choice.hardware))
        except OutOfMemoryError as error:
            found.append(CompiledChoice(choice, None, str(error)))
        else:
            found.append(CompiledChoice(choice, compiled))
    return tuple(found)


def compiled_table(found: Sequence[CompiledChoice]) -> Table:
    """Estimated and compiled memory side by side, communication, lints."""
    rows, notes = [], []
    for one in found:
        estimate = format_bytes(one.choice.memory_bytes)
        if one.compiled is None:
            rows.append((str(one.choice.strategy), estimate, "does not fit", "", "", one.problem))
            continue
        lints = "; ".join(str(lint) for lint in one.compiled.lints()[:3])
        needed = one.needed_bytes
        rows.append((
            str(one.choice.strategy), estimate,
            "not given" if needed is None else format_bytes(needed),
            format_bytes(total_bytes(one.compiled.collectives)),
            f"{one.compiled.seconds:.1f} s", lints,
        ))  # fmt: skip
        if one.compiled.note and one.compiled.note not in notes:
            notes.append(one.compiled.note)
    columns = ("strategy", ">estimated", ">compiled", ">sent per step", ">compiled in", "lints")
    return Table("Compiled, on each device", columns, tuple(rows), tuple(notes))
