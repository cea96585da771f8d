"""Models of every kind as one functional form."""

import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
from flax import nnx

from shardtrain.errors import ModelError
from shardtrain.modules.adapt import Adapted, adapted_form, freeze, lora
from shardtrain.modules.form import Functional, ModelForm
from shardtrain.modules.functional_form import functional_form
from shardtrain.modules.linen_form import linen_form
from shardtrain.modules.losses import Aux, LossOutput, Mean, cross_entropy, standardize
from shardtrain.modules.nnx_form import factory_form, instance_form


def model_form(model: Any, example: Callable[..., Any], batch: Any) -> ModelForm:
    """Bring a model of any supported kind into one functional form; allocates nothing.

    Args:
      model: Linen module, NNX module, `rngs -> nnx.Module`, `Functional`, or one of these through
        `lora` or `freeze`; a form is returned as it is.
      example: `example(model, batch)` calls the model as the loss does.
      batch: Abstract batch.

    Raises:
      ModelError: The model is none of these.
    """
    if isinstance(model, ModelForm):
        return model
    if isinstance(model, Adapted):
        return adapted_form(model_form(model.model, example, batch), model, example, batch)
    if isinstance(model, Functional):
        return functional_form(model)
    if isinstance(model, nn.Module):
        return linen_form(model, example, batch)
    if isinstance(model, nnx.Module):
        return instance_form(model)
    if inspect.isclass(model) and issubclass(model, nn.Module):
        raise ModelError(f"{model.__name__} is a Linen class; pass an instance: {model.__name__}()")
    if inspect.isclass(model) and issubclass(model, nnx.Module):
        return factory_form(lambda rngs: model(rngs=rngs))
    if callable(model):
        return factory_form(model)
    raise ModelError(
        f"a model of type {type(model).__module__}.{type(model).__name__} is not supported. Pass "
        "a flax.linen.Module, a flax.nnx.Module, a function rngs -> nnx.Module, or "
        "st.Functional(init=lambda key: variables)"
    )


__all__ = [
    "Adapted",
    "Aux",
    "Functional",
    "LossOutput",
    "Mean",
    "ModelForm",
    "cross_entropy",
    "freeze",
    "lora",
    "model_form",
    "standardize",
]
