"""Device meshes: axes, construction, simulation."""

from shardtrain.mesh.build import abstract_mesh, build_mesh, device_grid, layouts, resolve_sizes
from shardtrain.mesh.simulate import simulate

__all__ = ["abstract_mesh", "build_mesh", "device_grid", "layouts", "resolve_sizes", "simulate"]
