"""Flags of the XLA compiler for one program: named presets by platform, or flags themselves.

Design: `XLA_FLAGS` is read once per process, concerns every program in it, and a flag XLA does not
know ends the process. The same flags given to one compilation as `compiler_options` concern that
program alone and are refused with an error, so that is how a `Strategy(xla=...)` passes them.
"""

from dataclasses import dataclass

from shardtrain.errors import StrategyError, XlaOptionError, suggest

Value = bool | str  # what JAX passes on: numbers are written as text
Options = dict[str, Value]

OFF = "off"
_JAX = "JAX, GPU performance tips"
_TOOLBOX = "NVIDIA JAX-Toolbox, GPU performance"
_MAXTEXT = "MaxText, xla_flags_library.py"


@dataclass(frozen=True)
class XlaFlag:
    """One flag of the compiler.

    Args:
      name: Without dashes, as in XLA's `debug_options_flags.cc` or libtpu.
      value: What it is set to.
      why: What that does.
      source: Who recommends it.
    """

    name: str
    value: Value
    why: str
    source: str


def _gpu(name: str, value: Value, why: str, source: str) -> XlaFlag:
    return XlaFlag(f"xla_gpu_{name}", value, why, source)


def _tpu(name: str, value: Value, why: str) -> XlaFlag:
    return XlaFlag(f"xla_tpu_{name}", value, why, _MAXTEXT)


_THRESHOLD = "one large collective instead of many small ones"
PRESETS: dict[str, dict[str, tuple[XlaFlag, ...]]] = {
    "latency-hiding": {
        "gpu": (
            _gpu("enable_latency_hiding_scheduler", True,
                 "starts collectives early and waits for them late", _JAX),
            _gpu("enable_highest_priority_async_stream", True,
                 "collectives do not queue behind compute kernels", _TOOLBOX),
        ),
        "tpu": (
            _tpu("enable_async_collective_fusion", True, "collectives run inside matmul fusions"),
            _tpu("enable_async_collective_fusion_fuse_all_gather", True, "all-gathers too"),
            _tpu("enable_async_collective_fusion_multiple_steps", True, "over several fusions"),
            _tpu("overlap_compute_collective_tc", True, "compute goes on beside a collective"),
            XlaFlag("xla_enable_async_all_gather", True, "an all-gather has start and end",
                    _MAXTEXT),
        ),
    },
    "pipelined-collectives": {
        "gpu": (
            _gpu("enable_pipelined_all_gather", True,
                 "the next layer's parameters are gathered during this layer", _TOOLBOX),
            _gpu("enable_pipelined_reduce_scatter", True,
                 "a layer's gradients are scattered during the next layer", _TOOLBOX),
            _gpu("enable_pipelined_all_reduce", True,
                 "a layer's gradients are reduced during the next layer", _TOOLBOX),
            _gpu("enable_while_loop_double_buffering", True,
                 "two layers per turn of a scan: no copies between the buffers", _TOOLBOX),
        ),
        "tpu": (
            _tpu("enable_data_parallel_all_reduce_opt", True,
                 "all-reduces of gradients over the network between slices overlap"),
            _tpu("data_parallel_opt_different_sized_ops", True,
                 "also those of unequal size, over several turns of a scan"),
        ),
    },
    "combined-collectives": {
        "gpu": tuple(
            _gpu(f"{kind}_combine_threshold_bytes", str(2**33), _THRESHOLD, _TOOLBOX)
            for kind in ("all_reduce", "all_gather", "reduce_scatter")
        ),
        "tpu": (
            _tpu("use_minor_sharding_for_major_trivial_input", True,
                 "an all-reduce and a slice become a reduce-scatter"),
            _tpu("relayout_group_size_threshold_for_reduce_scatter", "1", "also in small groups"),
        ),
    },
    "collective-matmul": {
        "gpu": (
            _gpu("multi_streamed_windowed_einsum", True,
                 "parts of a gathered operand are multiplied while the others travel", _TOOLBOX),
            _gpu("threshold_for_windowed_einsum_mib", "0", "for operands of every size", _TOOLBOX),
        ),
    },
    "cublas": {
        "gpu": (
            _gpu("enable_triton_gemm", False,
                 "matmuls go to cuBLAS; compiles faster, as no Triton kernel is tuned", _TOOLBOX),
        ),
    },
    "no-command-buffers": {
        "gpu": (
            _gpu("enable_command_buffer", "",
                 "no CUDA graphs: less memory, more launches by the host", _TOOLBOX),
        ),
    },
    "all-memory": {
        "gpu": (
            _gpu("memory_limit_slop_factor", "125",
                 "XLA recomputes only what does not fit the whole memory", _TOOLBOX),
        ),
    },
    "large-vmem": {
        "tpu": (
            _tpu("scoped_vmem_limit_kib", "98304", "fusions may use 96 MiB of on-chip memory"),
        ),
    },
}  # fmt: skip
"""Preset -> platform -> flags. A preset says nothing on a platform it does not list."""


RENAMED: dict[str, tuple[str, Value]] = {
    f"xla_gpu_enable_pipelined_{kind}": (
        f"xla_gpu_pipeline_{kind}",
        "COLLECTIVE_PIPELINING_MODE_ON",
    )
    for kind in ("all_gather", "reduce_scatter", "all_reduce")
}
"""Flags of presets that newer compilers know by another name (seen: jaxlib 0.10 and 0.12)."""


def check_xla(text: str) -> None:
    """Whether a `Strategy(xla=...)` can be read; the compiler is not asked.

    Raises:
      StrategyError: A preset is not known, or a flag is not of the form `xla_name=value`.
    """
    if text != OFF:
        _parts(text)


def xla_flags(text: str, platform: str) -> tuple[XlaFlag, ...]:
    """The flags that a `Strategy(xla=...)` means on a platform; later ones win.

    Args:
      text: "off", or presets and `xla_flag=value`s joined by "+".
      platform: "cpu", "gpu" or "tpu".

    Example:
      >>> [(f.name, f.value) for f in xla_flags("cublas+xla_gpu_autotune_level=2", "gpu")]
      [('xla_gpu_enable_triton_gemm', False), ('xla_gpu_autotune_level', '2')]
      >>> xla_flags("cublas", "cpu")
      ()
    """
    if text == OFF:
        return ()
    found: dict[str, XlaFlag] = {}
    for part in _parts(text):
        flags = (part,) if isinstance(part, XlaFlag) else PRESETS[part].get(platform, ())
        found |= {flag.name: flag for flag in flags}
    return tuple(found.values())


def compiler_options(text: str, platform: str) -> Options:
    """`xla_flags` as `jax.jit(..., compiler_options=...)` takes them.

    Example:
      >>> compiler_options("no-command-buffers", "gpu")
      {'xla_gpu_enable_command_buffer': ''}
    """
    return {flag.name: flag.value for flag in xla_flags(text, platform)}


def describe_xla(text: str, platform: str) -> str:
    """What a run prints: presets and the flags they stand for here.

    Example:
      >>> describe_xla("cublas", "gpu")
      'cublas: xla_gpu_enable_triton_gemm=false'
      >>> describe_xla("cublas", "cpu")
      'cublas: no flags on cpu'
    """
    if text == OFF:
        return "the compiler's own defaults"
    flags = xla_flags(text, platform)
    shown = " ".join(f"{f.name}={_show(f.value)}" for f in flags)
    named = "+".join(p for p in _parts(text) if isinstance(p, str))
    return (f"{named}: " if named else "") + (shown or f"no flags on {platform}")


def xla_option_error(message: str, options: Options) -> XlaOptionError | None:
    """The compiler's refusal of an option as our error; None where it complains of something else.

    Args:
      message: Text of the `JaxRuntimeError`.
      options: What was passed.
    """
    if "compile option" not in message and "While setting option" not in message:
        return None
    shown = ", ".join(f"{name}={_show(value)}" for name, value in options.items())
    return XlaOptionError(
        f"the compiler refuses an option of Strategy(xla=...): {message.splitlines()[0]}. Passed "
        f"were {shown}. Flags come and go with versions of jaxlib and libtpu, and each platform "
        "has its own: leave it out, or write xla='off'"
    )


def renamed(message: str, options: Options) -> Options | None:
    """Options with the one that a compiler does not know under its newer name; None: it has none.

    Args:
      message: Text of the `JaxRuntimeError`.
      options: What was passed.
    """
    for old, (new, value) in RENAMED.items():
        if f"No such compile option: '{old}'" in message and options.get(old) is True:
            return {k: v for k, v in options.items() if k != old} | {new: value}
    return None


def _parts(text: str) -> list[str | XlaFlag]:
    """Names of presets, and flags written out."""
    parts: list[str | XlaFlag] = []
    for part in text.split("+"):
        name, equals, value = (p.strip() for p in part.partition("="))
        if not equals and name in PRESETS:
            parts.append(name)
        elif equals and name.startswith("xla_"):
            parts.append(XlaFlag(name, _read(value), "asked for by name", "Strategy"))
        else:
            raise StrategyError(
                f"xla={text!r}: {part.strip()!r} is neither a preset ({suggest(name, PRESETS)}) "
                "nor of the form xla_flag=value; join several with '+'"
            )
    return parts


def _read(text: str) -> Value:
    """The compiler wants booleans as such, not as text."""
    return text.lower() == "true" if text.lower() in ("true", "false") else text


def _show(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
