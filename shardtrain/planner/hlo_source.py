"""Where in the user's source an HLO instruction came from.

Newer HLO prints one table of files, functions, locations and stack frames at the top and a
`stack_frame_id` per instruction; older HLO prints `source_file` and `source_line` on each.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_ROW = re.compile(r"^(\d+) (?:\"(.*)\"|\{(.*)\})$")
_SECTIONS = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
# Frames of installed packages (Flax layers, for example) say less than the line that called them;
# our own say which part of the step it is.
_INSTALLED = re.compile(r"/(?:site|dist)-packages/(?!shardtrain/)")


@dataclass(frozen=True)
class SourceTable:
    """Stack frames: frame -> (`file:line`, parent frame or 0)."""

    frames: dict[int, tuple[str, int]] = field(default_factory=dict)

    def locate(self, attributes: str) -> str:
        """`file:line` of an instruction's metadata, or "" when it has none.

        Named is the innermost frame outside installed packages; the innermost when all are inside.
        """
        frame = re.search(r"\bstack_frame_id=(\d+)", attributes)
        if frame is not None:
            return self._nearest_user_frame(int(frame[1]))
        file = re.search(r'\bsource_file="([^"]*)"', attributes)
        line = re.search(r"\bsource_line=(\d+)", attributes)
        return f"{file[1]}:{line[1]}" if file and line else ""

    def _nearest_user_frame(self, frame: int) -> str:
        innermost, seen = self.frames.get(frame, ("", 0))[0], set()
        while frame in self.frames and frame not in seen:
            seen.add(frame)
            location, parent = self.frames[frame]
            if not _INSTALLED.search(location):
                return location
            frame = parent
        return innermost


def _numbers(text: str) -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", text)}


def parse_source_table(lines: Iterable[str]) -> SourceTable:
    """Read the tables at the top of an HLO text; empty when it has none."""
    rows: dict[str, dict[int, str]] = {name: {} for name in _SECTIONS}
    section = ""
    for line in lines:
        if line in rows:
            section = line
        elif section and (match := _ROW.match(line)):
            rows[section][int(match[1])] = match[2] if match[2] is not None else match[3]
        elif line.endswith("{"):
            break  # the first computation: the tables are over
    locations = {key: _numbers(text) for key, text in rows["FileLocations"].items()}
    frames = {key: _numbers(text) for key, text in rows["StackFrames"].items()}
    # jaxlib 0.10 prints parents one too high: a root (no parent) reads 1, even frame 1 itself.
    shift = 1 if frames.get(1, {}).get("parent_frame_id") == 1 else 0
    table = {}
    for key, frame in frames.items():
        place = locations.get(frame.get("file_location_id", 0), {})
        file = rows["FileNames"].get(place.get("file_name_id", 0), "")
        location = f"{file}:{place.get('line', 0)}" if file else ""
        table[key] = (location, max(frame.get("parent_frame_id", 0) - shift, 0))
    return SourceTable(table)
