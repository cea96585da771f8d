"""The figure all pictures are drawn on."""

import io
import os

from matplotlib.figure import Figure


class Picture(Figure):
    """A matplotlib figure that a notebook shows by itself: no pyplot, no backend, no magic."""

    def __init__(self, width: float, height: float):
        super().__init__(figsize=(width, height), dpi=120, layout="constrained")

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure; the suffix decides the format (png, svg, pdf)."""
    figure.savefig(os.fspath(path))
