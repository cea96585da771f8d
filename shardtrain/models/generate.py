"""Sampling text from a trained decoder, sharded as it was trained."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from shardtrain.errors import ModelError


def generate(
    plan: Any,
    state: Any,
    prompt: np.ndarray,
    num_tokens: int,
    *,
    window: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> np.ndarray:
    """Continue a prompt token by token.

    One compiled program makes all tokens. The model sees a window of fixed size, which moves on
    when it is full; every token runs the whole window (no key/value cache), which is fine for a
    sample at the end of training and not meant for serving.

    Args:
      plan: A plan whose model maps int `[B, T]` to logits `[B, T, vocab]`.
      state: The trained state.
      prompt: int `[n]`, n >= 1; only the last `window` tokens are seen.
      num_tokens: How many to add.
      window: Tokens the model sees at once, usually the sequence length it was trained with.
      temperature: Divides the logits; 0 takes the most likely token.
      seed: Of the draws.

    Returns:
      int32 `[num_tokens]`, without the prompt.

    Raises:
      ModelError: The prompt is empty, or a number is out of range.
    """
    prompt = np.asarray(prompt, np.int32)[-window:]
    if prompt.ndim != 1 or not len(prompt):
        raise ModelError(f"the prompt must be int [n] with n >= 1, got shape {prompt.shape}")
    if num_tokens < 1 or temperature < 0:
        raise ModelError(
            f"num_tokens={num_tokens} must be at least 1 and temperature={temperature} at least 0"
        )
    buffer = np.zeros(window, np.int32)
    buffer[: len(prompt)] = prompt
    key = jax.random.key(seed)
    sampler = _sampler(num_tokens, NamedSharding(plan.mesh, PartitionSpec()))
    tokens = plan.call(state, sampler, buffer, np.int32(len(prompt)), key, np.float32(temperature))
    return np.asarray(tokens)


@functools.cache
def _sampler(num_tokens: int, everywhere: NamedSharding) -> Callable[..., jax.Array]:
    """One function object per length: `plan.call` compiles each function once.

    The tokens end up on every device, so that each process can read them.
    """

    def sample(model: Any, buffer: Any, length: Any, key: Any, temperature: Any) -> jax.Array:
        def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            tokens, length = carry
            logits = model(tokens[None])[0, length - 1]
            token = choose(logits, key, temperature)
            return append(tokens, length, token), token

        keys = jax.random.split(key, num_tokens)
        _, tokens = jax.lax.scan(step, (buffer, length), keys)
        return jax.lax.with_sharding_constraint(tokens, everywhere)

    return sample


def choose(logits: jax.Array, key: jax.Array, temperature: jax.Array) -> jax.Array:
    """A token drawn from `softmax(logits / temperature)`; the largest where temperature is 0."""
    scaled = logits.astype(jnp.float32) / jnp.maximum(temperature, 1e-6)
    drawn = jax.random.categorical(key, scaled)
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits)).astype(jnp.int32)


def append(tokens: jax.Array, length: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Put a token behind `length` tokens; a full window loses its first.

    Example:
      >>> tokens, length = append(jnp.array([1, 2, 3]), jnp.int32(3), jnp.int32(9))
      >>> tokens.tolist(), int(length)
      ([2, 3, 9], 3)
    """
    window = tokens.shape[0]
    is_full = length == window
    tokens = jnp.where(is_full, jnp.roll(tokens, -1), tokens)
    length = jnp.minimum(length + 1, window)
    return tokens.at[length - 1].set(token), length
