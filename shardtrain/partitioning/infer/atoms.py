"""Atoms: the indivisible factors of array dims, merged by union-find and split by reshapes.

Every array dim is a list of atoms, major to minor. A reshape that splits a dim refines its atom
into smaller ones everywhere at once, so `heads * head_dim` becomes two atoms without any rule
about attention. Dims of size 1 have no atoms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Dim = list[int]  # atoms, major to minor


@dataclass(frozen=True)
class Tie:
    """Why two atoms are one (`refines` false) or `b` is a factor of `a` (`refines` true)."""

    a: int
    b: int
    eqn: Any
    outer: str
    refines: bool = False


class Atoms:
    """Union-find over atoms with refinement; keeps the equations that tied them."""

    def __init__(self) -> None:
        self.size: list[int] = []
        self.parent: list[int] = []
        self.parts: list[tuple[int, ...]] = []  # of a root: its refinement, or ()
        self.blocked: dict[int, str] = {}  # atom → why it must stay whole
        self.ties: list[Tie] = []

    def fresh(self, size: int) -> Dim:
        """A new dim of `size`, unrelated to all others."""
        if size <= 1:
            return []
        self.size.append(size)
        self.parent.append(len(self.parent))
        self.parts.append(())
        return [len(self.parent) - 1]

    def find(self, atom: int) -> int:
        """The representative of an atom's class."""
        root = atom
        while self.parent[root] != root:
            root = self.parent[root]
        while self.parent[atom] != root:
            self.parent[atom], atom = root, self.parent[atom]
        return root

    def leaves(self, dim: Sequence[int]) -> Dim:
        """The same dim in atoms that are not refined further (as given, not as roots)."""
        out: Dim = []
        for atom in dim:
            parts = self.parts[self.find(atom)]
            if parts:
                out.extend(self.leaves(parts))
            else:
                out.append(atom)
        return out

    def roots(self, dim: Sequence[int]) -> tuple[int, ...]:
        """The classes a dim consists of, major to minor."""
        return tuple(self.find(a) for a in self.leaves(dim))

    def block(self, dim: Sequence[int], reason: str) -> None:
        """Forbid sharding these atoms."""
        for atom in self.leaves(dim):
            self.blocked.setdefault(atom, reason)

    def _split(self, atom: int, major: int, eqn: Any, outer: str) -> None:
        """Refine an atom into (major, rest), for its whole class."""
        root = self.find(atom)
        parts = (*self.fresh(major), *self.fresh(self.size[root] // major))
        self.parts[root] = parts
        self.ties.extend(Tie(root, part, eqn, outer, refines=True) for part in parts)
        if root != atom:
            self.ties.append(Tie(atom, root, eqn, outer))

    def unify(self, one: Sequence[int], two: Sequence[int], eqn: Any, outer: str) -> bool:
        """Make two dims (or runs of dims) of equal size the same, refining where they differ.

        Returns:
          False when no common refinement exists (2x3 against 3x2); what could not be aligned is
          then left alone.
        """
        i, a, b = 0, self.leaves(one), self.leaves(two)
        while i < len(a) and i < len(b):
            x, y = self.find(a[i]), self.find(b[i])
            big, small = (x, y) if self.size[x] >= self.size[y] else (y, x)
            if self.size[big] % self.size[small]:
                return False
            if self.size[big] != self.size[small]:
                raw = a[i] if big == x else b[i]
                self._split(raw, self.size[small], eqn, outer)
                a, b = self.leaves(a), self.leaves(b)
                continue
            if x != y:
                self.parent[y] = x
                self.ties.append(Tie(a[i], b[i], eqn, outer))
            i += 1
        return len(a) == len(b)

    def divide(self, dims: Sequence[Sequence[int]], shape: Sequence[int], eqn: Any, outer: str):
        """The dims of a reshape's output.

        Args:
          dims: dims of the operand.
          shape: shape of the result.

        Returns:
          (dims of the result, the operand's atoms that could not be followed).
        """
        flow = self.leaves([a for dim in dims for a in dim])
        out: list[Dim] = []
        lost: Dim = []
        for size in shape:
            dim, have = [], 1
            while have < size and flow is not None:
                need = size // have
                atom = flow[0] if flow else None
                if atom is None or size % have:
                    break
                width = self.size[self.find(atom)]
                if width > need and width % need == 0:
                    self._split(atom, need, eqn, outer)
                    # Earlier atoms of the same class are refined with this one.
                    flow = self.leaves(flow)
                    continue
                if width > need or need % width:
                    break
                dim.append(atom)
                flow, have = flow[1:], have * width
            if have != size:
                lost = self.leaves([*lost, *dim, *flow])
                out.extend(self.fresh(s) for s in shape[len(out) :])
                return out, lost
            out.append(dim)
        return out, lost
