"""torch.compile: the network as kernels that are generated when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Final

import numpy as np

from modelserve import plugins
from modelserve.adapters.frameworks.pytorch.calls import Callee
from modelserve.adapters.frameworks.pytorch.model import PyTorchModel
from modelserve.errors import LoadFailed
from modelserve.types import Columns, Json

_TRIED_ROWS: Final = (2, 1)  # a batch of one gets kernels of its own, all others share theirs
_SHOWN: Final = 400  # characters of what may be a page of a compiler's output


def compiled(callee: Callee, call: str | None, inputs: Mapping[str, Json] | None) -> PyTorchModel:
    """Return the model compiled for any number of rows. Raises ``LoadFailed`` when that does not work here.

    PyTorch compiles when it is called first: so it is called, with zeros, where it is known what the model takes.
    """
    try:
        compiler = partial(plugins.require("torch").compile, dynamic=True)
        model = PyTorchModel(callee.through(compiler), call)
        for rows in _TRIED_ROWS if inputs else ():
            model.infer(_zeros(inputs or {}, rows))
    except Exception as error:
        reason = " ".join(str(error).split())[:_SHOWN]
        raise LoadFailed(
            f"torch.compile failed: {type(error).__name__}: {reason}; it needs a C++ compiler on the machine "
            "that serves (on a GPU, Triton); or leave out ModelOptions(compile=True)"
        ) from error
    return model


def _zeros(inputs: Mapping[str, Json], rows: int) -> Columns:
    return {name: np.zeros((rows, *shape), dtype=dtype) for name, (dtype, shape) in inputs.items()}
