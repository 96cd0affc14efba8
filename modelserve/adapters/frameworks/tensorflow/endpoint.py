"""What answers the requests: the call of a Keras model, a function of a ``tf.Module``, a signature of a SavedModel."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

from modelserve.adapters.frameworks.tensorflow.inputs import Described, Input, inputs_like
from modelserve.adapters.frameworks.tensorflow.runtime import keras, tensorflow
from modelserve.errors import InvalidInput

PREDICT: Final = "predict"
_DEFAULT_SIGNATURE: Final = "serving_default"


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoint:
    """A function of tensors by name, with a batch along axis 0, and what is known of its inputs.

    ``inputs`` is empty where only the ``parameters`` are known, or nothing: then the columns say the rest.
    """

    call: Callable[[dict[str, Any]], Any]
    inputs: tuple[Input, ...] = ()
    parameters: tuple[str, ...] = ()

    def inputs_for(self, columns: Described) -> tuple[Input, ...]:
        """Return the inputs, read off the columns where the model does not say."""
        return self.inputs or inputs_like(columns, self.parameters)


def is_keras(model: Any) -> bool:
    """Whether an object is a Keras model. Imports nothing: where there is one, there is Keras."""
    module = sys.modules.get("keras")
    return module is not None and isinstance(model, module.Model)


def live_endpoint(model: Any, method: str) -> Endpoint:
    """Return what answers of a live object. Raises ``InvalidInput`` where the method, or the object, cannot."""
    if is_keras(model) and method == PREDICT:
        return _keras_endpoint(model)
    signatures = getattr(model, "signatures", None)
    if isinstance(signatures, Mapping):
        return signature_endpoint(model, method)
    if not is_keras(model) and not isinstance(model, tensorflow().Module):
        raise InvalidInput("model", f"a {type(model).__qualname__} is neither a Keras model nor a tf.Module")
    return _function_endpoint(_function_of(model, method))


# -- Keras -------------------------------------------------------------------------------------------------


def _keras_endpoint(model: Any) -> Endpoint:
    known = getattr(model, "inputs", None) or ()
    inputs = tuple(Input(each.name, each.dtype, tuple(each.shape[1:])) for each in known)
    arrange = _arrangement(model) if inputs else _alone_or_named
    return Endpoint(lambda tensors: model(arrange(tensors), training=False), inputs)


def _arrangement(model: Any) -> Callable[[dict[str, Any]], Any]:
    """Return what puts tensors by name into the structure that a model was built with."""
    if isinstance(model, keras().Sequential):
        return _alone_or_named
    return lambda tensors: keras().tree.map_structure(lambda each: tensors[each.name], model.input)


def _alone_or_named(tensors: dict[str, Any]) -> Any:
    return next(iter(tensors.values())) if len(tensors) == 1 else tensors


# -- tf.Module ---------------------------------------------------------------------------------------------


def _function_of(model: Any, method: str) -> Any:
    """Return a public method; ``predict`` is the call itself where a module has no method of that name."""
    found = None if method.startswith("_") else getattr(model, method, None)
    if found is None and method == PREDICT:
        found = getattr(model, "__call__", None)  # noqa: B004  # the method is wanted, not whether there is one
    if not callable(found):
        raise InvalidInput("method", f"the model has no function {method!r}; it has {', '.join(_functions(model))}")
    return found


def _functions(model: Any) -> list[str]:
    kind = tensorflow().types.experimental.PolymorphicFunction
    names = [name for name in dir(type(model)) if not name.startswith("_") or name == "__call__"]
    found = [name for name in names if isinstance(getattr(model, name, None), kind)]
    return [PREDICT if name == "__call__" else repr(name) for name in found] or ["none"]


def _function_endpoint(function: Any) -> Endpoint:
    parameters = tuple(
        each.name
        for each in inspect.signature(getattr(function, "python_function", function)).parameters.values()
        if each.default is each.empty and each.kind in {each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY}
    )
    specs = getattr(function, "input_signature", None) or ()
    inputs = tuple(_input(name, spec) for name, spec in zip(parameters, specs, strict=False))
    return Endpoint(lambda tensors: function(**tensors), inputs, parameters)


# -- SavedModel --------------------------------------------------------------------------------------------


def signature_name(method: str) -> str:
    """Return what the signature that answers for a method is called."""
    return _DEFAULT_SIGNATURE if method == PREDICT else method


def signature_endpoint(loaded: Any, method: str) -> Endpoint:
    """Return a signature of a SavedModel. Raises ``InvalidInput`` listing those there are."""
    signature = loaded.signatures.get(signature_name(method))
    if signature is None:
        known = ", ".join(map(repr, loaded.signatures)) or "none"
        raise InvalidInput("method", f"the SavedModel has no signature {signature_name(method)!r}; it has {known}")
    keywords = signature.structured_input_signature[1]
    inputs = tuple(_input(name, keywords[name]) for name in sorted(keywords))

    def call(tensors: dict[str, Any], _owner: Any = loaded) -> Any:  # a signature does not keep its variables alive
        return signature(**tensors)

    return Endpoint(call, inputs)


def _input(name: str, spec: Any) -> Input:
    if not isinstance(spec, tensorflow().TensorSpec):
        raise InvalidInput("model", f"its input {name!r} is a {type(spec).__name__}; only plain tensors can be served")
    if spec.shape.rank is None:
        return Input(name, spec.dtype.name, None)
    if spec.shape.rank == 0 or spec.shape[0] is not None:
        problem = f"its input {name!r} has the shape {spec.shape}; a batch needs a first dimension of None"
        raise InvalidInput("model", problem)
    return Input(name, spec.dtype.name, tuple(spec.shape[1:]))
