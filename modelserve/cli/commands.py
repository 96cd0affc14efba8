"""The commands."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

import modelserve
from modelserve.cli.caching import cache
from modelserve.cli.features import features
from modelserve.cli.logs import log
from modelserve.cli.predictions import predictions
from modelserve.cli.printing import AsJson, encode, moment, pairs, printable, show, told
from modelserve.cli.reading import rows_of, tags_of, values_of
from modelserve.config import ModelOptions, Settings
from modelserve.errors import InvalidInput
from modelserve.registry import Registry
from modelserve.registry.importing import import_model
from modelserve.signature import Signature
from modelserve.signing import create_key_files, trusted_keys
from modelserve.sync_server import ModelServer
from modelserve.tabular import read_table
from modelserve.types import DeploymentState, Json, ModelVersion

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
database = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look after the registry's database.")
app.add_typer(database, name="db")
app.add_typer(cache, name="cache")
app.add_typer(features, name="features")
app.add_typer(log, name="log")
app.add_typer(predictions, name="predictions")
imports = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Take models over from other registries.")
app.add_typer(imports, name="import")

Reason = Annotated[str, typer.Option(help="Why, for the history.")]


def _print_version(asked: bool) -> None:  # noqa: FBT001  # called by typer
    if asked:
        typer.echo(modelserve.__version__)
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    *,
    registry: Annotated[
        str | None, typer.Option(metavar="URL", help="The registry's database; or set MODELSERVE_REGISTRY.")
    ] = None,
    artifacts: Annotated[
        str | None, typer.Option(metavar="URL", help="The folder of the models' bytes; or set MODELSERVE_ARTIFACTS.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file with options, such as modelserve.toml.")
    ] = None,
    version: Annotated[  # noqa: ARG001  # its callback has answered
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Look after an application's models: their versions, what is in production, what it answers."""
    given = {"registry": registry, "artifacts": artifacts}
    overrides = {name: value for name, value in given.items() if value is not None}
    # Left for the command to call: whoever asks for --help needs no settings that are right.
    context.obj = functools.partial(Settings.load, config, **overrides)


def _settings(context: typer.Context) -> Settings:
    return context.obj()  # type: ignore[no-any-return]


def _registry(context: typer.Context) -> Registry:
    settings = _settings(context)
    return Registry(settings.registry, settings.artifacts, changes=settings.changes)


@database.command()
@told
def upgrade(context: typer.Context) -> None:
    """Create the registry's tables, or bring them to this release."""
    with _registry(context) as registry:
        registry.upgrade()
    typer.echo(f"the database is ready for modelserve {modelserve.__version__}")


# -- versions and their way to production ------------------------------------------------------------------


@app.command()
@told
def register(
    context: typer.Context,
    name: str,
    version: str,
    path: Annotated[Path, typer.Argument(exists=True, help="The saved model: a file or a folder.")],
    *,
    example: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="A few rows that the model takes: .csv, .json, .npy or .parquet."
        ),
    ] = None,
    framework: Annotated[
        str | None, typer.Option(help="What wrote the model, if the file's name does not tell.")
    ] = None,
    method: Annotated[str, typer.Option(help="What a request calls.")] = "predict",
    trusted: Annotated[
        list[str] | None, typer.Option(metavar="TYPE", help="A type that may be loaded. Can be repeated.")
    ] = None,
    artifact_format: Annotated[
        str | None, typer.Option("--format", help="The file's format, if its name does not tell.")
    ] = None,
    factory: Annotated[
        str | None, typer.Option(metavar="MODULE:CALLABLE", help="What builds the network that weights belong to.")
    ] = None,
    metrics: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Or a JSON object. Can be repeated.")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Can be repeated.")] = None,
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="Sign the version with this private key.")] = None,
    reason: Reason = "",
) -> None:
    """Add a saved model as a version in staging.

    It is loaded and must answer the example first, except for a format that can run code, which is not opened.
    """
    with _registry(context) as registry:
        added = registry.register(
            name,
            version,
            path,
            example=None if example is None else read_table(example),
            framework=framework,
            method=method,
            trusted=trusted or (),
            format=artifact_format,
            factory=factory,
            metrics=values_of(metrics or (), "--metrics"),
            tags=tags_of(tag or ()),
            signing_key=key,
            reason=reason,
        )
    _tell_registered(added)


@imports.command()
@told
def mlflow(
    context: typer.Context,
    uri: Annotated[str, typer.Argument(help="models:/NAME/VERSION or models:/NAME@ALIAS.")],
    *,
    name: Annotated[str | None, typer.Option(help="What the model is called here, if not as there.")] = None,
    version: Annotated[str | None, typer.Option(help="What the version is called here, if not as there.")] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(metavar="URI", help="Where MLflow is; or set MLFLOW_TRACKING_URI.")
    ] = None,
    example: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Rows in place of the model's own example.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="What a request calls, if not what MLflow calls.")] = None,
    trusted: Annotated[
        list[str] | None, typer.Option(metavar="TYPE", help="A type that may be loaded. Can be repeated.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Open a pickle, which can run any code, to save it in a safe format.")
    ] = False,
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="Sign the version with this private key.")] = None,
    reason: Reason = "",
) -> None:
    """Copy a version of MLflow's registry into this one, in staging. Serving never asks MLflow."""
    with _registry(context) as registry:
        added = import_model(
            registry,
            "mlflow",
            uri,
            source_url=tracking_uri,
            name=name,
            version=version,
            example=None if example is None else read_table(example),
            method=method,
            trusted=trusted or (),
            allow_pickle=allow_pickle,
            signing_key=key,
            reason=reason,
        )
    _tell_registered(added)


def _tell_registered(added: ModelVersion) -> None:
    inputs = Signature.from_json(added.signature).inputs
    typer.echo(f"{_named(added)} is registered, in {added.status}")
    typer.echo(f"inputs: {', '.join(f'{printable(field.name)} {field}' for field in inputs)}")


@app.command()
@told
def promote(context: typer.Context, name: str, version: str, *, reason: Reason = "") -> None:
    """Put a version into production; the one before is archived."""
    with _registry(context) as registry:
        typer.echo(f"{_named(registry.promote(name, version, reason=reason))} is in production")


@app.command()
@told
def rollback(context: typer.Context, name: str, *, reason: Reason = "") -> None:
    """Put the version before back into production."""
    with _registry(context) as registry:
        typer.echo(f"{_named(registry.rollback(name, reason=reason))} is back in production")


@app.command()
@told
def archive(context: typer.Context, name: str, version: str, *, reason: Reason = "") -> None:
    """Take a version out of staging."""
    with _registry(context) as registry:
        typer.echo(f"{_named(registry.archive(name, version, reason=reason))} is archived")


@app.command()
@told
def sign(
    context: typer.Context,
    name: str,
    version: str,
    *,
    key: Annotated[Path, typer.Option(metavar="FILE", help="The private key, as `keygen` writes it.")],
    reason: Reason = "",
) -> None:
    """Sign what the registry says of a version, for servers that require it. Look at what is printed: it was signed."""
    with _registry(context) as registry:
        signed = registry.sign(name, version, key, reason=reason)
    inputs = Signature.from_json(signed.signature).inputs
    typer.echo(f"{_named(signed)} is signed: {signed.framework}, {signed.artifact.format}, {signed.artifact.key}")
    typer.echo(f"loaded with: {encode(signed.load_options)}")
    typer.echo(f"inputs: {', '.join(f'{printable(field.name)} {field}' for field in inputs)}")


@app.command()
@told
def keygen(folder: Annotated[Path, typer.Argument(help="Where the two files are written.")]) -> None:
    """Make a pair of keys: the private one signs versions, the public one is for servers to trust."""
    private, public = create_key_files(folder)
    typer.echo(f"private key, for whoever registers: {private}")
    typer.echo(f"public key, for servers (trusted_keys): {public}")
    typer.echo(f"id: {trusted_keys([public])[0].key_id}")


def _named(version: ModelVersion) -> str:
    return f"{version.model_name} {version.version}"


# -- looking at it -----------------------------------------------------------------------------------------


@app.command()
@told
def models(context: typer.Context, *, as_json: AsJson = False) -> None:
    """List the models and what is in production."""
    with _registry(context) as registry:
        found = [_standing(state) for _, state in sorted(registry.deployments().items())]
    show(found, as_json=as_json, cells=dict)


def _standing(state: DeploymentState) -> dict[str, Json]:
    return {
        "name": state.model_name,
        "production": state.production and state.production.version,
        "previous": state.previous and state.previous.version,
        "generation": state.generation,
    }


@app.command()
@told
def versions(context: typer.Context, name: str, *, as_json: AsJson = False) -> None:
    """List a model's versions, newest first."""
    with _registry(context) as registry:
        found = registry.versions(name)
    show(
        found,
        as_json=as_json,
        cells=lambda each: {
            "version": each.version,
            "status": each.status,
            "framework": each.framework,
            "format": each.artifact.format,
            "bytes": each.artifact.size,
            "created": moment(each.created_at),
            "metrics": pairs(each.metrics),
            "tags": pairs(each.tags),
        },
    )


@app.command()
@told
def history(context: typer.Context, name: str, *, as_json: AsJson = False) -> None:
    """List everything that was done to a model, oldest first."""
    with _registry(context) as registry:
        found = registry.history(name)
    show(
        found,
        as_json=as_json,
        cells=lambda event: {
            "generation": event.generation,
            "when": moment(event.occurred_at),
            "who": event.actor,
            "what": event.action,
            "version": event.version,
            "production after": event.production,
            "why": event.reason,
        },
    )


# -- predicting --------------------------------------------------------------------------------------------


@app.command()
@told
def predict(
    context: typer.Context,
    name: str,
    *,
    inputs: Annotated[
        str | None, typer.Option(metavar="JSON", help="An object for one row, a list of objects for several.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="The same in a .json file, or a .csv, .npy or .parquet table."),
    ] = None,
    version: Annotated[str | None, typer.Option(help="Another version than the one in production.")] = None,
) -> None:
    """Load a version here and print its answer as JSON.

    Without --inputs and --file, JSON is read from standard input.
    """
    rows = rows_of(inputs, file)
    settings = _settings(context)
    with _OneVersion(settings.registry, settings.artifacts) as registry:
        registry.version = version
        registry.production(name)  # what does not exist is told before anything is loaded
        served = {name: (settings.models or {}).get(name, ModelOptions())}
        with ModelServer(
            registry,
            served,
            cache_dir=settings.cache_dir,
            cache_bytes=settings.cache_bytes,
            download_limit_s=settings.download_limit_s,
            trusted_keys=settings.trusted_keys,
            features=settings.features,
            log=False,
            metrics=False,
        ) as server:
            typer.echo(encode(_answer(server, name, rows)))


class _OneVersion(Registry):
    """A registry that takes one version, whatever its status, for the one in production."""

    version: str | None = None

    def deployments(self, names: Collection[str] | None = None) -> dict[str, DeploymentState]:
        return {name: self._with_version(state) for name, state in super().deployments(names).items()}

    def _with_version(self, state: DeploymentState) -> DeploymentState:
        if self.version is None or (state.production is not None and state.production.version == self.version):
            return state
        return dataclasses.replace(state, production=self.get(state.model_name, self.version), previous=None)


def _answer(server: ModelServer, name: str, rows: Json) -> dict[str, Json]:
    """Return the document that the HTTP face would answer."""
    if isinstance(rows, list) and not rows:
        raise InvalidInput("", "there is no row to answer")
    several = isinstance(rows, list)
    answers = server.predict_many(name, rows) if several else [server.predict(name, rows)]
    shared = answers[0]._asdict()
    value, degraded = shared.pop("prediction"), shared.pop("degraded")
    if any(answer.degraded for answer in answers):
        shared["degraded"] = [answer.degraded for answer in answers] if several else degraded
    if several:
        return {"predictions": [answer.prediction for answer in answers]} | shared
    return {"prediction": value} | shared
