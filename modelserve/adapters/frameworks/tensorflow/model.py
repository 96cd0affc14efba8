"""A model behind the batch contract, traced once for batches of every size."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from modelserve.adapters.frameworks.tensorflow.endpoint import Endpoint
from modelserve.adapters.frameworks.tensorflow.inputs import Bound, Described, Input, assemble, bind, described
from modelserve.adapters.frameworks.tensorflow.outputs import as_columns, named
from modelserve.adapters.frameworks.tensorflow.runtime import tensorflow
from modelserve.adapters.frameworks.tensorflow.wording import brief
from modelserve.errors import InferenceFailed, InvalidInput, ModelServeError
from modelserve.signature import columns_of
from modelserve.types import Array, Columns


class TensorFlowModel:
    """An endpoint as one graph, whose number of rows is open.

    The graph is made when the columns are known: at once if they were recorded at registration, else with the first
    batch. ``device`` is TensorFlow's name of one (None: its own choice), ``compiled`` asks for XLA. Raises
    ``InvalidInput`` naming the input that does not fit, or saying why there is no graph.
    """

    def __init__(
        self, endpoint: Endpoint, columns: Described | None, *, device: str | None = None, compiled: bool = False
    ) -> None:
        self._endpoint = endpoint
        self._device = device
        self._compiled = compiled
        self._graph = None if columns is None else self._traced(columns)

    def infer(self, columns: Columns) -> dict[str, Array]:
        """Answer a batch of columns, each of shape ``(rows, ...)``."""
        try:
            if self._graph is None:
                self._graph = self._traced(described(columns))
            function, inputs, bound = self._graph
            with self._place():
                tensors = _tensors(inputs, assemble(inputs, bound, columns))
                return as_columns(named(function(*tensors)))
        except InvalidInput as error:
            raise InferenceFailed(str(error)) from error
        except ModelServeError:
            raise
        except Exception as error:
            raise InferenceFailed(f"the model raised {brief(error)}") from error

    def answer_as_given(self, example: Any) -> dict[str, Array]:
        """Answer tensors of the example's own types and order by the model's own call, without a graph of ours."""
        columns = columns_of(example)
        inputs = self._endpoint.inputs_for(described(columns))
        arrays = assemble(inputs, bind(inputs, described(columns)), columns)
        with self._place():
            names = [each.name for each in inputs]
            return as_columns(named(self._endpoint.call(dict(zip(names, _tensors(inputs, arrays), strict=True)))))

    def _traced(self, columns: Described) -> tuple[Any, tuple[Input, ...], Bound]:
        inputs = self._endpoint.inputs_for(columns)
        bound = bind(inputs, columns)
        if self._compiled and any(each.dtype == "string" for each in inputs):
            # XLA knows no strings, and where a model splits them it ends the process.
            raise InvalidInput("compile", "XLA does not take strings; leave out ModelOptions(compile=True)")
        call, names = self._endpoint.call, [each.name for each in inputs]

        def answer(*tensors: Any) -> Any:
            return call(dict(zip(names, tensors, strict=True)))

        function = tensorflow().function(
            answer, input_signature=[spec_of(each) for each in inputs], jit_compile=self._compiled or None
        )
        with self._place(), explained():
            return function.get_concrete_function(), inputs, bound

    def _place(self) -> Any:
        return contextlib.nullcontext() if self._device is None else tensorflow().device(self._device)


def spec_of(each: Input, name: str | None = None) -> Any:
    """Return an input as TensorFlow describes it, with an open number of rows."""
    shape = None if each.shape is None else (None, *each.shape)
    return tensorflow().TensorSpec(shape, each.dtype, name)


@contextlib.contextmanager
def explained() -> Any:
    """Turn what TensorFlow raises over a model into ``InvalidInput``."""
    try:
        yield
    except Exception as error:
        raise InvalidInput("model", f"TensorFlow makes no graph of it: {brief(error)}") from error


def _tensors(inputs: Sequence[Input], arrays: Sequence[Array]) -> list[Any]:
    constant = tensorflow().constant
    return [constant(array, each.dtype) for each, array in zip(inputs, arrays, strict=True)]
