"""What an exported program may hold. torch.export.load runs what a program says, so all of it is checked before.

A ``.pt2`` is a zip archive of raw weights, a program in JSON and, in places, pickles. Only members that are data are
let in. The one pickle that every archive holds (the sample inputs) has to pass torch's restricted unpickler, which
torch.export.load uses as well, falling back to the unrestricted one only when that fails.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from typing import Any, Final

from modelserve import plugins
from modelserve.adapters.frameworks.pytorch.program import check_json
from modelserve.errors import ArtifactUnsafe, LoadFailed

_PROGRAM: Final = "models/model.json"
_SAMPLE_INPUTS: Final = "data/sample_inputs/model.pt"
_CONFIGS: Final = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_NEEDED: Final = {_PROGRAM, _SAMPLE_INPUTS, *_CONFIGS}
_DATA: Final = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(?:version|serialization_id)|\.format_version|\.storage_alignment"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+|extra/[\w./-]+"
)


def check_program(data: bytes, names: list[str]) -> None:
    """Raise ``ArtifactUnsafe`` unless an archive holds nothing that could run code when it is loaded or called."""
    for name in names:
        if name not in _NEEDED and not _DATA.fullmatch(name):
            raise ArtifactUnsafe(
                f"the exported program holds {name}, which can be code (compiled kernels, pickled objects); only "
                "programs made of PyTorch's operators and raw tensors are loaded"
            )
    if missing := sorted(_NEEDED.difference(names)):
        raise LoadFailed(f"the artifact is not an exported program: it lacks {', '.join(missing)}")
    reader = _reader(data, names)
    for name in (_PROGRAM, *_CONFIGS):
        check_json(_parsed(reader.read_bytes(name), name))
    load_restricted(reader.read_bytes(_SAMPLE_INPUTS), "the sample inputs of the exported program")


def load_restricted(data: bytes, what: str) -> Any:
    """Unpickle what ``torch.save`` wrote, of tensors and plain values alone. Raises ``ArtifactUnsafe`` for more."""
    torch = plugins.require("torch")
    if not data:
        return None
    try:
        return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ArtifactUnsafe(
            f"{what}: a pickle that asks for more than tensors ({reason}); it was not loaded"
        ) from error
    except Exception as error:
        raise LoadFailed(f"PyTorch cannot read {what}: {type(error).__name__}: {error}") from error


def _reader(data: bytes, names: list[str]) -> Any:
    """Return torch's own reader, which must see the members that were looked at, and no others."""
    archive = plugins.require("torch.export.pt2_archive")
    try:
        reader = archive.PT2ArchiveReader(io.BytesIO(data))
    except Exception as error:
        raise LoadFailed(f"PyTorch cannot read the artifact: {type(error).__name__}: {error}") from error
    if sorted(reader.get_file_names()) != sorted(names):
        raise ArtifactUnsafe("the artifact is a zip archive that PyTorch did not write (its names are ambiguous)")
    return reader


def _parsed(data: bytes, name: str) -> Any:
    try:
        return json.loads(data.decode())  # as PyTorch does: of bytes, the parser would guess the encoding
    except (ValueError, RecursionError) as error:
        raise LoadFailed(f"PyTorch cannot read the artifact: {name} in it is no JSON") from error
