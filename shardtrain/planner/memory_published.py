"""Published memory formulas, as functions, so that their tables can be checked to the digit."""

from shardtrain.errors import StrategyError, suggest

ACTIVATIONS = ("none", "tensor", "tensor+sequence", "tensor+selective",
               "tensor+sequence+selective", "full")  # fmt: skip


def zero_states(params: float, shards: int, level: int, optimizer_bytes: float = 12.0) -> float:
    """Bytes per device of 16-bit parameters and gradients and of the optimizer state.

    Args:
        params: parameters of the model.
        shards: devices they are divided over.
        level: 0 nothing is divided, 1 optimizer state, 2 + gradients, 3 + parameters.
        optimizer_bytes: bytes per parameter of optimizer state; 12 is Adam in mixed precision
            (fp32 master copy and two moments).

    Example:
        >>> zero_states(7.5e9, 64, 1) / 1e9
        31.40625
    """
    divide = [1 if level < need else shards for need in (3, 2, 1)]
    return params * (2 / divide[0] + 2 / divide[1] + optimizer_bytes / divide[2])


def deepspeed_states(params: float, shards: int, level: int, largest_layer: float = 0.0,
                     offload: str = "none") -> float:  # fmt: skip
    """Bytes per GPU by DeepSpeed's memory estimators (docs/code-docs/source/memory.rst).

    Args:
        params: parameters of the model.
        shards: GPUs.
        level: 2 or 3.
        largest_layer: parameters of the largest layer (level 3).
        offload: "none", "optimizer" or "all" (parameters too; level 3).

    Raises:
        StrategyError: the level is not 2 or 3.
    """
    if level == 2:
        return 2 * params if offload != "none" else 4 * params + 16 * params / shards
    if level != 3:
        raise StrategyError(f"DeepSpeed estimates ZeRO level 2 or 3, not {level}")
    kept = {"none": 18 * params / shards, "optimizer": 2 * params / shards, "all": 0.0}
    if offload not in kept:
        raise StrategyError(f"offload {offload!r} is unknown; {suggest(offload, kept)}")
    return 4 * largest_layer + kept[offload]


def activation_bytes(s: int, b: float, h: int, a: int, t: int = 1, kind: str = "tensor") -> float:
    """Activation bytes one transformer layer saves for one microbatch (Korthikanti Eq. 1-4, 6).

    Args:
        s: sequence length.
        b: microbatch size.
        h: hidden size.
        a: attention heads.
        t: tensor-parallel size.
        kind: what is sharded and recomputed, one of `ACTIVATIONS`.

    Raises:
        StrategyError: the kind is unknown.

    Example:
        >>> activation_bytes(2048, 4, 6144, 64, 8, "tensor") / 2**20
        1264.0
    """
    tokens, wide, scores = s * b, 24 * h, 5 * a * s
    forms = {
        "none": tokens * (34 * h + scores),
        "tensor": tokens * (10 * h + (wide + scores) / t),
        "tensor+sequence": tokens * (34 * h + scores) / t,
        "tensor+selective": tokens * (10 * h + wide / t),
        "tensor+sequence+selective": tokens * 34 * h / t,
        "full": tokens * 2 * h,
    }
    if kind not in forms:
        raise StrategyError(f"activation kind {kind!r} is unknown; {suggest(kind, ACTIVATIONS)}")
    return forms[kind]


def first_stage_bytes(s: int, b: float, h: int, a: int, layers: int, t: int = 1,
                      kind: str = "tensor") -> float:  # fmt: skip
    """Activation bytes of the first 1F1B stage: L layers' worth whatever p (Korthikanti Eq. 5)."""
    return layers * activation_bytes(s, b, h, a, t, kind)


def interleave_factor(p: int, m: int) -> float:
    """How much more an interleaved schedule with m chunks per stage saves (Korthikanti 4.2.3)."""
    return 1.0 if m == 1 else 1 + (p - 1) / (p * m)


def extra_bytes(s: int, b: float, h: int, v: int, layers: int, t: int, p: int) -> float:
    """Bytes of embedding dropout, final norm, output layer and logits (Korthikanti 4.3)."""
    return s * b * h * layers / t * (p / layers + (4 / layers * (1 + v / h) if p == 1 else 0))
