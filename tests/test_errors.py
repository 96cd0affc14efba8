"""The error tree is as drawn, and each error says what to do."""

from __future__ import annotations

import inspect
import pickle

import pytest

from modelserve import errors

CLASSES = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, errors.ModelServeError) and cls.__module__ == errors.__name__
]


def test_the_tree_in_the_docstring_is_the_tree_in_the_code() -> None:
    """Every error stands in the drawing, below its parent."""
    drawing = (errors.__doc__ or "").partition("::\n\n")[2].partition("\n\nMessages")[0]
    path: list[str] = []
    drawn = {}
    for line in drawing.splitlines():
        name = line.replace("│", " ").replace("├──", "   ").replace("└──", "   ").split()[0]
        depth = (len(line) - len(line.lstrip(" │├└─"))) // 4
        path[depth - 1 if depth else 0 :] = [name]
        drawn[name] = path[-2] if len(path) > 1 else None
    real = {cls.__name__: cls.__bases__[0].__name__ for cls in CLASSES if cls is not errors.ModelServeError}
    assert drawn.pop("ModelServeError") is None
    assert drawn == real


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_says_when_it_happens(cls: type[errors.ModelServeError]) -> None:
    """Each error has a docstring and knows whether a retry can help."""
    assert cls.__doc__
    assert isinstance(cls.retryable, bool)


def test_the_retryable_errors_are_the_passing_ones() -> None:
    """Only what can pass by itself is retryable."""
    names = {cls.__name__ for cls in CLASSES if cls.retryable}
    unavailable = {"Unavailable", "Overloaded", "NotReady", "NotRunning", "BackendUnavailable"}
    expected = unavailable | {"DeadlineExceeded", "OutOfMemory", "WorkerDied"}
    assert names == expected


def test_messages_are_built_from_the_data() -> None:
    """The sentence and the data that an error carries agree."""
    assert str(errors.InvalidInput("age", "missing")) == "age: missing"
    assert str(errors.InvalidInput("", "not an object")) == "not an object"
    nested = errors.InvalidInput("age", "missing").within("instances[3]")
    assert (nested.field, nested.problem) == ("instances[3].age", "missing")
    assert "try again in 0.25 s" in str(errors.Overloaded("the queue is full", 0.25))
    assert str(errors.Overloaded("too late", None)) == "too late"
    assert str(errors.DeadlineExceeded(0.25, needed_s=0.2)) == "not answered within 250 ms"
    hopeless = errors.DeadlineExceeded(1.0, needed_s=1.5)
    assert str(hopeless) == "not answered within 1000 ms: the model takes about 1.5 s for this alone; raise timeout_ms"
    assert (hopeless.retryable, errors.DeadlineExceeded(1.0).retryable) == (False, True)
    assert "pip install 'modelserve[sklearn]'" in str(errors.MissingDependency("skops", "sklearn"))
    assert "no production version" in str(errors.VersionNotFound("churn", None))
    corrupt = errors.ArtifactCorrupt("blobs/x", "aa", "bb")
    assert "expected SHA-256 aa, found bb" in str(corrupt)


def test_a_missing_driver_is_an_import_error_too() -> None:
    """Hosts that guard optional imports with ``except ImportError`` catch it."""
    assert issubclass(errors.MissingDependency, ImportError)


def test_simple_errors_survive_pickling() -> None:
    """Errors whose only data is their sentence can cross a process boundary."""
    error = pickle.loads(pickle.dumps(errors.InferenceFailed("the model raised")))
    assert str(error) == "the model raised"
