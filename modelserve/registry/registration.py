"""From a model to what the registry keeps of it: its artifact, its signature, its golden example.

A version is proven before it is registered: the artifact just written is loaded back, and must answer the example
as the live model does, also as that answers the rows in the form in which they were given, and a batch of another size.
What cannot be loaded, or answers differently, never gets a row.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import orjson

from modelserve import plugins
from modelserve.artifacts import ArtifactStore
from modelserve.errors import InvalidInput
from modelserve.ports import Framework, Model, SavedModel
from modelserve.registry.answers import answers_of
from modelserve.registry.conversion import Proven, converted
from modelserve.registry.proof import marks_to_try, require_same_as_given
from modelserve.signature import Signature, refuse_unaskable
from modelserve.signature.comparison import outputs_match
from modelserve.types import Artifact, FrameworkName, Json, Row, Runtime

_EXAMPLE_ROWS: Final = 8
_EXAMPLE_FORMAT: Final = "example-json"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """What a row of the registry says about a model's bytes and inputs."""

    framework: FrameworkName
    artifact: Artifact
    signature: Json
    load_options: Mapping[str, Json]
    example: Artifact | None
    conversion: Mapping[str, Json] | None


def prepare(
    store: ArtifactStore,
    model: Any,
    *,
    framework: str | None,
    method: str,
    example: Any,
    signature: Signature | None,
    trusted: Sequence[str],
    format: str | None,  # noqa: A002  # the word for it, here as in the registry
    factory: str | None,
    optimize: str | None,
    baseline: Any,
    max_body_bytes: int | None,
) -> Registration:
    """Save ``model`` (an object or the path of a saved one), prove it, and store it. Adds no row."""
    if signature is not None and not isinstance(signature, Signature):
        raise InvalidInput("signature", f"expected a modelserve.Signature, got a {type(signature).__name__}")
    if not isinstance(method, str):
        raise InvalidInput("method", f"expected the name of a method, got {method!r:.40}")
    if factory is not None and not re.fullmatch(plugins.DOTTED_PATH, factory):
        raise InvalidInput("factory", f"give it as 'package.module:callable', not {factory!r}")
    name = framework or _framework_of(model)
    adapter = plugins.framework(name)
    signature = signature or _inferred(example)
    if max_body_bytes is not None:
        refuse_unaskable(signature.inputs, max_body_bytes)
    options: dict[str, Json] = {"method": method, "trusted": list(trusted), "format": format, "factory": factory}
    rows = [] if example is None else signature.rows_of(example, _EXAMPLE_ROWS)
    with tempfile.TemporaryDirectory(prefix="modelserve-") as folder:
        asked = _Asked(model, adapter, optimize, signature, example, rows, baseline)
        adapter, saved, outputs, conversion = _proven(asked, Path(folder), options)
        return Registration(
            framework=adapter.name,
            artifact=store.put(saved.path, format=saved.format),
            signature=signature.to_json(),
            load_options=dict(saved.load_options),
            example=_put_example(store, signature, rows, outputs),
            conversion=conversion,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _Asked:
    """A model, the rows that it is proven on, and how it is to be served."""

    model: Any
    adapter: Framework
    optimize: str | None
    signature: Signature
    example: Any
    rows: list[Row]
    baseline: Any

    @property
    def is_file(self) -> bool:
        return isinstance(self.model, str | Path)


def _proven(asked: _Asked, folder: Path, options: Mapping[str, Json]) -> Proven:
    """Save and prove a model with what may stand for its missing strings, in turn. Raises the first error."""
    failures: list[InvalidInput] = []
    for marks in marks_to_try(asked.signature, asked.example):
        try:
            return _prove(asked, folder, {**options, "missing_strings": marks})
        except InvalidInput as error:
            failures.append(error)
    raise failures[0]


def _prove(asked: _Asked, folder: Path, options: Mapping[str, Json]) -> Proven:
    if asked.optimize is not None:
        _refuse_idle(options, "a converted model has one format, and nothing in it has to be trusted or built")
        converter = plugins.converter(asked.optimize, asked.adapter.name)
        return converted(
            asked.adapter,
            converter,
            asked.model,
            folder,
            options,
            asked.signature,
            asked.example,
            asked.rows,
            asked.baseline,
        )
    _refuse_idle_baseline(asked.baseline)
    saved = _saved(asked, folder, options)
    return asked.adapter, saved, _proven_outputs(asked, saved, options["missing_strings"]), None


def _saved(asked: _Asked, folder: Path, options: Mapping[str, Json]) -> SavedModel:
    try:
        return asked.adapter.save(
            asked.model, folder, options, asked.signature.stack(asked.rows) if asked.rows else None
        )
    except OSError as error:
        if not asked.is_file:
            raise
        raise InvalidInput("model", f"{asked.model} cannot be read: {error.strerror or error}") from error


def _refuse_idle(options: Mapping[str, Json], problem: str) -> None:
    for name in ("format", "factory", "trusted"):
        if options[name]:
            raise InvalidInput(name, f"leave it out with optimize=: {problem}")


def _refuse_idle_baseline(baseline: Any) -> None:
    if baseline is not None:
        raise InvalidInput("baseline", "it proves a conversion, and there is none without optimize=; leave it out")


def _framework_of(model: Any) -> str:
    if not isinstance(model, str | Path):
        return plugins.framework_of(model)
    if not Path(model).exists():
        raise InvalidInput("model", f"there is nothing at {model}")
    return plugins.framework_of_file(Path(model))


def _inferred(example: Any) -> Signature:
    if example is None:
        raise InvalidInput("example", "give a few rows that the model takes (example=X[:4]), or an explicit signature=")
    return Signature.infer(example)


def _proven_outputs(asked: _Asked, saved: SavedModel, marks: Mapping[str, str]) -> list[Json] | None:
    """Return the answers to the example rows; None when there are none, or only code from elsewhere could tell."""
    if asked.is_file and saved.runs_code:
        return None
    factory = saved.load_options.get("factory")
    ours = not asked.is_file
    own = Runtime(allow_pickle=ours, allow_code=ours, factories=(factory,) if factory else ())
    loaded = asked.adapter.load(saved.path, saved.format, saved.load_options, own)
    if not asked.rows:
        return None
    answers = answers_of(loaded, asked.signature, asked.rows)
    _try_another_size(loaded, asked.signature, asked.rows)
    live = loaded if asked.is_file else asked.adapter.wrap(asked.model, saved.load_options)
    if live is not loaded and not outputs_match(answers_of(live, asked.signature, asked.rows), answers):
        raise InvalidInput("model", "the saved model answers the example differently from the live one")
    require_same_as_given(live, loaded, asked.signature, asked.example, marks)
    return answers


def _try_another_size(model: Model, signature: Signature, rows: list[Row]) -> None:
    """Refuse what answers batches of the example's size alone: a request brings one row, and a crowd brings many."""
    other = rows[:1] if len(rows) > 1 else rows * 2
    try:
        answers_of(model, signature, other)
    except InvalidInput as error:
        problem = f"it answers the example's {len(rows)} rows, and not {len(other)}: {error.problem}"
        raise InvalidInput("model", f"{problem}; every answer has one row for each row of the batch") from error


def _put_example(
    store: ArtifactStore, signature: Signature, rows: list[Row], outputs: list[Json] | None
) -> Artifact | None:
    if not rows:
        return None
    document = {"inputs": [signature.record(row) for row in rows], "outputs": outputs}
    return store.put_bytes(orjson.dumps(document), format=_EXAMPLE_FORMAT)
