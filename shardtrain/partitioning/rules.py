"""Which mesh axes a named dim goes to: the user's rules, then the conventional names."""

import re
from collections.abc import Mapping
from typing import Any

from shardtrain.errors import UnknownAxisError, UnusedRuleError, suggest
from shardtrain.pytree import matches
from shardtrain.strategy import AXES

BATCH_AXES = ("data", "fsdp", "expert")
"""Mesh axes over which the batch dim is split."""

_TENSOR_NAMES = (
    "mlp heads kv_heads q_heads vocab hidden joined_kv qkv mlp_up mlp_gate attention_heads "
    "intermediate ffn ff d_ff n_heads num_heads classes model mp tp activation_mlp "
    "activation_heads activation_kv_heads activation_vocab activation_kv"
)
_UNSHARDED_NAMES = (
    "embed head_dim kv norm layers layer stage norm_embed position positions pos length kv_length "
    "features channels in out in_features out_features embed_vocab conv height width patch patches "
    "input output d_model emb bias scale kernel lora_rank q_per_kv stack group groups dim "
    "conv_in conv_out row col activation_embed activation_length"
)
_BATCH_NAMES = "batch activation_batch"

CONVENTIONAL: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_TENSOR_NAMES.split(), ("tensor",)),
    **dict.fromkeys(_UNSHARDED_NAMES.split(), ()),
    **dict.fromkeys(_BATCH_NAMES.split(), BATCH_AXES),
    **dict.fromkeys(("expert", "experts", "exp"), ("expert",)),
    **dict.fromkeys(("sequence", "seq", "context_length"), ("context",)),
    **dict.fromkeys(("dp",), ("data",)),
}
"""Logical axis names of the field and their mesh axes; `fsdp` is added to the largest dim later."""

AMBIGUOUS = frozenset({"kv"})
"""Names that are one head's width to some authors and the heads to others: inference decides where
the name leads nowhere and no rule of the user's has it."""

_GLOB = re.compile(r"[*?\[/]")


def is_glob(rule: str) -> bool:
    """Whether a rule's key is a path glob rather than a logical axis name."""
    return bool(_GLOB.search(rule))


def as_axes(value: Any) -> tuple[str, ...]:
    """`None`, one axis name or several -> a tuple of mesh axis names."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def check_rules(rules: Mapping[str, Any]) -> None:
    """Every mesh axis a rule names exists.

    Raises:
      UnknownAxisError: It does not; the nearest is suggested.
    """
    for key, value in rules.items():
        if key == "pipeline":  # points at the repeated block by its path
            continue
        entries = value if is_glob(key) and isinstance(value, tuple) else (value,)
        for entry in entries:
            for axis in as_axes(entry):
                if axis not in AXES:
                    raise UnknownAxisError(
                        f"rule {key!r} sends a dim to mesh axis {axis!r}, which does not exist: "
                        f"{suggest(str(axis), AXES)}"
                    )


def axes_of(name: str, rules: Mapping[str, Any], path: str) -> tuple[tuple[str, ...], str]:
    """The mesh axes of one logical axis name, and which rule said so.

    Raises:
      UnknownAxisError: The name is in no rule and is no conventional name.
    """
    if name in rules:
        return as_axes(rules[name]), f"rules[{name!r}]"
    if name in AXES:
        return (name,), f"annotation names mesh axis {name!r}"
    if name in CONVENTIONAL:
        return CONVENTIONAL[name], f"logical axis {name!r}"
    known = [*rules, *CONVENTIONAL, *AXES]
    raise UnknownAxisError(
        f"{path}: logical axis {name!r} is in no rule, so this dim would silently be replicated; "
        f"{suggest(name, known)} Say where it goes: Strategy(rules={{{name!r}: 'tensor'}}), or "
        f"rules={{{name!r}: None}} to keep it whole"
    )


def glob_rule(path: str, rules: Mapping[str, Any]) -> tuple[str, tuple[Any, ...]] | None:
    """The last path-glob rule that matches, as (glob, one entry per dim), or None."""
    found = None
    for key, value in rules.items():
        if is_glob(key) and matches(path, key):
            found = (key, value if isinstance(value, tuple) else ((value,) if value else ()))
    return found


def check_used(
    rules: Mapping[str, Any], paths: list[str], names: set[str], flexible: bool = False
) -> None:
    """Every rule decides something.

    Args:
      rules: The user's rules.
      paths: All parameter, variable and batch paths.
      names: All logical axis names met.
      flexible: Names of activations may be used by the model itself, where they cannot be seen.

    Raises:
      UnusedRuleError: A rule matches nothing.
    """
    for key in rules:
        if key == "pipeline":
            continue
        if is_glob(key):
            if not any(matches(p, key) for p in paths):
                near = suggest(key.replace("*", ""), paths)
                raise UnusedRuleError(f"rule {key!r} matches none of {len(paths)} paths; {near}")
        elif key not in names and not (flexible or key in CONVENTIONAL):
            raise UnusedRuleError(
                f"rule {key!r} names a logical axis that no parameter has; "
                + (suggest(key, names) if names else "no parameter has logical axes")
            )
