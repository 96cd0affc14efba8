"""The zip archives that torch writes, looked at before torch reads them."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from modelserve.contents import contents
from modelserve.errors import ArtifactUnsafe, LoadFailed


def read_archive(path: Path, sha256: str | None = None) -> tuple[bytes, list[str]]:
    """Return the bytes of a whole zip archive and the names in it, without the folder that all of them lie in.

    What is hashed, checked and loaded are these same bytes. Raises ``ArtifactCorrupt`` for others than ``sha256``
    says, ``ArtifactUnsafe`` for what is no zip, so that a renamed pickle reaches no unpickler, and ``LoadFailed`` for
    one that is damaged, or written by something else.
    """
    data = contents(path, sha256)
    if not zipfile.is_zipfile(io.BytesIO(data)):
        raise ArtifactUnsafe(
            "the artifact is not a file of torch.save or torch.export.save (its bytes are no zip archive); it was not "
            "opened. If it is an old file of torch.save, load it where you trust it and save it again"
        )
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = _inside(archive.namelist())
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise LoadFailed("the artifact is a compressed zip archive; PyTorch writes them uncompressed")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, ValueError) as error:
        raise LoadFailed(f"the artifact is a damaged zip archive: {error}") from error
    if damaged is not None:
        raise LoadFailed(f"the artifact is damaged: the checksum of {damaged} in it is wrong")
    return data, names


def _inside(names: list[str]) -> list[str]:
    roots = {name.partition("/")[0] for name in names}
    inside = [name.partition("/")[2] for name in names]
    # torch finds members without regard to case, and of two with one name it takes whichever it finds.
    if len(roots) != 1 or len({name.lower() for name in inside}) != len(inside):
        raise ArtifactUnsafe("the artifact is a zip archive that PyTorch did not write (its names are ambiguous)")
    if "constants.pkl" in inside:
        raise LoadFailed(
            "the artifact is a TorchScript archive, which PyTorch has deprecated; register the module it was made "
            "from, or its weights with factory="
        )
    return inside
