"""Device meshes: axes, construction, simulation."""

from shardtrain.mesh.build import abstract_mesh, build_mesh, device_grid, layouts, resolve_sizes
from shardtrain.mesh.simulate import few_threads, simulate

__all__ = [
    "abstract_mesh",
    "build_mesh",
    "device_grid",
    "few_threads",
    "layouts",
    "resolve_sizes",
    "simulate",
]
