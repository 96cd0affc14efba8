"""What each model served last, kept on the disk, so that a start without the registry has something to serve.

::

    applied/<digest of the registry's URL>/<digest of the model's name>.json

It is data, and believed as far as the cache folder is: a process that can write there can say what is served while the
registry is away. Bytes are still checked against the digests in it, and what may be loaded is still for the options
of the model to say.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from modelserve.artifacts import files
from modelserve.types import DeploymentState

_log = logging.getLogger("modelserve")
_MAX_BYTES: Final = 16 * 1024 * 1024
_PATIENCE_S: Final = 5.0  # for another process that writes
_RIVAL_S: Final = 60.0  # a later generation that was written within this time is another process's, a moment ahead


class Snapshot(BaseModel):
    """The state of a model as it was applied, and when that was."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    saved_at: AwareDatetime
    state: DeploymentState


def _utc_now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class Snapshots:
    """The snapshots of one registry, known by its URL, in the cache folder of a machine.

    Any number of processes may write there. Nothing here raises for what is wrong with the disk: it is logged, and
    serving goes on without.
    """

    def __init__(self, cache_folder: Path, registry_url: str, *, now: Callable[[], dt.datetime] = _utc_now) -> None:
        self._folder = cache_folder.absolute() / "applied" / _digest(registry_url)
        self._temp = cache_folder.absolute() / "temp"
        self._now = now
        self._odd: set[Path] = set()
        self._failing = False

    def save(self, state: DeploymentState) -> bool:
        """Note what was applied as the registry was read just now; return whether that succeeded.

        A later generation stays if it is another process's of a moment ago. One that was there before is of a registry
        that has gone back since, to a backup or to nothing, and is replaced. A version that is only tried, and not in
        production, is not noted.
        """
        if not _is_live(state):
            return True
        try:
            self._put(Snapshot(saved_at=self._now(), state=state))
        except (OSError, ValueError) as error:
            if not self._failing:
                self._failing = True
                failed = "failed to save what %s serves in %s, where a start without the registry would find it: %s"
                _log.warning(failed, state.model_name, self._folder, _in_short(error))
            return False
        self._failing = False
        return True

    def load(self) -> dict[str, Snapshot]:
        """Return what there is, by the model's name."""
        try:
            paths = sorted(path for path in self._folder.iterdir() if path.suffix == ".json")
        except OSError:  # nothing was ever kept here, or it cannot be read
            return {}
        found = (self._read(path) for path in paths)
        return {each.state.model_name: each for each in found if each is not None}

    def artifact_keys(self) -> set[str]:
        """Return the keys of all that a start from these snapshots would load."""
        return _keys_of(self.load().values())

    def _put(self, snapshot: Snapshot) -> None:
        path, data = self._path(snapshot.state.model_name), snapshot.model_dump_json().encode()
        self._folder.mkdir(parents=True, exist_ok=True)
        with files.claim(self._folder, _PATIENCE_S):
            if self._is_overtaken(snapshot, self._read(path)):
                return
            with files.draft(self._temp) as draft:
                draft.write(data)
                files.replace(draft, path)

    def _path(self, model_name: str) -> Path:
        return self._folder / f"{_digest(model_name)}.json"

    def _is_overtaken(self, snapshot: Snapshot, other: Snapshot | None) -> bool:
        """Whether what is on the disk should stay. A clock that was set back or forward makes nothing stay for ever."""
        if other is None or other.state.generation <= snapshot.state.generation:
            return False
        return abs((snapshot.saved_at - other.saved_at).total_seconds()) < _RIVAL_S

    def _read(self, path: Path) -> Snapshot | None:
        """Return a snapshot if it is one. What is not is logged once and left alone: the next save replaces it."""
        try:
            snapshot = _parse(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            if path not in self._odd:
                self._odd.add(path)
                _log.warning("%s is ignored: it is no snapshot that this release reads (%s)", path, _in_short(error))
            return None
        self._odd.discard(path)
        return snapshot


def artifact_keys_in(cache_folder: Path) -> set[str]:
    """Return the keys of all that a start from any registry's snapshots in a cache folder would load."""
    found = []
    for path in (cache_folder / "applied").glob("*/*.json"):
        with contextlib.suppress(OSError, ValueError):
            found.append(_parse(path))
    return _keys_of(found)


def _keys_of(snapshots: Iterable[Snapshot]) -> set[str]:
    versions = [version for each in snapshots for version in (each.state.production, each.state.previous)]
    artifacts = [artifact for version in versions if version for artifact in (version.artifact, version.example)]
    return {artifact.key for artifact in artifacts if artifact}


def _parse(path: Path) -> Snapshot:
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError("it is too large")
    snapshot = Snapshot.model_validate_json(data)
    versions = [each for each in (snapshot.state.production, snapshot.state.previous) if each]
    if path.stem != _digest(snapshot.state.model_name) or any(
        each.model_name != snapshot.state.model_name for each in versions
    ):
        raise ValueError("it is of another model")
    if not _is_live(snapshot.state):
        raise ValueError("its version is not in production")
    return snapshot


def _is_live(state: DeploymentState) -> bool:
    return state.production is None or state.production.status == "production"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _in_short(error: OSError | ValueError) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'document'}: {first['msg']}"
    return str(getattr(error, "strerror", None) or error)
