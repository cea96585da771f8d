"""What XLA's GPU compiler has to know of a GPU it cannot see.

Figures as the CUDA driver reports them, from the device descriptions that openxla/xla ships in
`xla/backends/gpu/target_config/specs`: v100, a100_sxm_80, a100_sxm_40, h100_sxm, h200, b200, gb200,
b300, gb300.
"""

from dataclasses import dataclass

from shardtrain.errors import HardwareError, suggest


@dataclass(frozen=True)
class GpuTarget:
    """One GPU: bytes, bytes/s, GHz, counts."""

    name: str
    capability: tuple[int, int]
    cores: int
    fpus_per_core: int
    memory: int
    memory_bandwidth: int
    l2_cache: int
    clock: float
    shared_memory_per_core: int
    shared_memory_per_block: int
    accelerated: bool = True


_HOPPER = (233472, 232448)
_A100 = ((8, 0), 108, 64)
TARGETS = {
    "v100": GpuTarget("Tesla V100-SXM2-16GB", (7, 0), 80, 64, 16935682048, 898048000000, 6291456,
                      1.53, 98304, 98304, False),
    "a100": GpuTarget("NVIDIA A100-SXM4-80GB", *_A100, 85100068864, 2039040000000, 41943040,
                      1.41, 167936, 166912, False),
    "a100-40gb": GpuTarget("NVIDIA A100-SXM4-40GB", *_A100, 42331013120, 1555200000000, 41943040,
                           1.41, 167936, 166912, False),
    "h100": GpuTarget("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 84942979072, 3352320000000,
                      52428800, 1.98, *_HOPPER),
    "h200": GpuTarget("NVIDIA H200 141GB HBM3e", (9, 0), 132, 128, 151397597184, 4800000000000,
                      52428800, 1.98, *_HOPPER),
    "b200": GpuTarget("NVIDIA B200", (10, 0), 148, 128, 191514411008, 7672320000000, 132644864,
                      1.965, *_HOPPER),
    "gb200": GpuTarget("NVIDIA GB200", (10, 0), 152, 128, 197897748480, 7928064000000, 135528448,
                       2.062, *_HOPPER),
    "b300": GpuTarget("NVIDIA B300", (10, 3), 158, 128, 297021865984, 7936000000000, 135528448,
                      1.965, *_HOPPER),
    "gb300": GpuTarget("NVIDIA GB300", (10, 3), 152, 128, 297021079552, 7928064000000, 135528448,
                       2.07, *_HOPPER),
}  # fmt: skip


def target_config(chip: str) -> str:
    """The text protocol buffer `GpuTargetConfigProto` for a chip of `shardtrain.hardware`.

    Raises:
        HardwareError: no description of that chip is known.

    Example:
        >>> "core_count: 132" in target_config("h100")
        True
    """
    if chip not in TARGETS:
        raise HardwareError(f"no compiler description of {chip!r}; {suggest(chip, TARGETS)}")
    gpu = TARGETS[chip]
    feature = " feature_extension: ACCELERATED_FEATURES" if gpu.accelerated else ""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared_memory_per_block}
  shared_memory_per_core: {gpu.shared_memory_per_core}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus_per_core}
  clock_rate_ghz: {gpu.clock}
  l2_cache_size: {gpu.l2_cache}
  memory_bandwidth: {gpu.memory_bandwidth}
  device_memory_size: {gpu.memory}
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]}{feature} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{gpu.name}"
"""
