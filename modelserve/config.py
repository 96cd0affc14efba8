"""Options, from keyword arguments, one TOML file and ``MODELSERVE_*`` variables.

Precedence: keyword arguments, then the environment, then the file, then the defaults. Nested options take two
underscores: ``MODELSERVE_MODELS__CHURN__TIMEOUT_MS=200``.
"""

from __future__ import annotations

import difflib
import logging
import os
import tomllib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias, TypedDict

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    SecretStr,
    ValidationError,
    field_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from modelserve.errors import ConfigError
from modelserve.features.declaration import Features, check_apart
from modelserve.plugins import DOTTED_PATH
from modelserve.ports import Cache, ChangeHints, FeatureStore, TrustedKey
from modelserve.types import Scaling

_log = logging.getLogger("modelserve")
_PREFIX: Final = "MODELSERVE_"
AUTO_BATCH_SIZE = 256
_Replicas: TypeAlias = Annotated[int, Field(ge=1, le=64)]
_Device: TypeAlias = Annotated[str, Field(pattern=r"^(cpu|mps|cuda(:\d{1,3})?)$")]
_DottedPath: TypeAlias = Annotated[str, Field(pattern=f"^{DOTTED_PATH}$")]


def _named(folder: Any) -> Any:
    """Refuse an empty text, which as a path would be the present folder."""
    if folder == "":
        raise ValueError("name a folder, or leave it out")
    return folder


_Folder: TypeAlias = Annotated[Path, BeforeValidator(_named)]


class ModelOptions(BaseModel):
    """How one model is served here.

    ======================  =============  =====================================================================
    option                  default        means
    ======================  =============  =====================================================================
    ``executor``            ``"thread"``   who runs the model: a thread of this process, or a ``"process"`` of its own
    ``replicas``            ``1``          how many copies of it run side by side, or from how many to how many
    ``device``              ``"cpu"``      where it runs: ``"cuda:0"``; a list of devices is dealt out to the replicas
    ``threads``             ``None``       threads for one batch (None: the cores divided by the replicas)
    ``compile``             ``False``      use the framework's compiler (PyTorch, TensorFlow): every start is slower
    ``pad_batches``         ``False``      pad batches to powers of two, for models that are compiled for each size
    ``scaling``             ``Scaling()``  when a pool of ``(min, max)`` replicas grows and shrinks
    ``max_batch_size``      ``"auto"``     most rows in one batch (``"auto"``: as many as ``slo_ms`` allows)
    ``max_wait_ms``         ``0``          how long a partial batch waits for company (0: it never waits)
    ``queue_limit``         ``1024``       most rows that wait; beyond it requests get ``Overloaded``
    ``timeout_ms``          ``1000``       default deadline of a request
    ``slo_ms``              ``100``        the latency that batching and admission aim for
    ``start_limit_s``       ``600``        how long a replica may take to load and warm up
    ``hang_limit_s``        ``1``          how long a batch may run on after the last of its callers has given up
    ``cache_ttl_s``         ``0``          how long an answer is given again to the same inputs, in seconds (0: never)
    ``cache_key``           ``"merged"``   what has to be the same: the ``"merged"`` row, with features as they are now,
                                           or the ``"request"``, for which features are not even read
    ``features``            ``None``       what is read from the feature store: a :class:`Features`, or several
    ``reload``              ``"overlap"``  load a new version in full beside the old one, or ``"replace"`` it bit by bit
    ``keep_previous``       ``True``       keep the version before loaded, so that a rollback is instant
    ``log_sample_rate``     ``0.1``        share of the requests that the inference log keeps (0: none, 1: all)
    ``log_inputs``          ``True``       keep the inputs themselves in it, not only their hash
    ``allow_pickle``        ``False``      load artifacts that are pickles, which can run code
    ``allow_code``          ``False``      load formats that hold a program of their own: SavedModel, Keras
    ``factories``           ``()``         callables that may build networks for registered weights: ``"nets:make"``
    ``require_signature``   ``None``       load signed versions only (None: if the server has ``trusted_keys``)
    ======================  =============  =====================================================================
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    executor: Literal["thread", "process"] = "thread"
    replicas: _Replicas | tuple[_Replicas, _Replicas] = 1
    device: _Device | tuple[_Device, ...] = "cpu"
    threads: PositiveInt | None = None
    compile: bool = False
    pad_batches: bool = False
    scaling: Scaling = Scaling()
    max_batch_size: PositiveInt | Literal["auto"] = "auto"
    max_wait_ms: float = Field(default=0.0, ge=0, le=10_000)
    queue_limit: int = Field(default=1024, ge=1)
    timeout_ms: float = Field(default=1000.0, gt=0, allow_inf_nan=False)
    slo_ms: float = Field(default=100.0, gt=0, allow_inf_nan=False)
    start_limit_s: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    hang_limit_s: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    cache_ttl_s: float = Field(default=0.0, ge=0, le=1e9)
    cache_key: Literal["merged", "request"] = "merged"
    features: Features | tuple[Features, ...] | None = None
    reload: Literal["overlap", "replace"] = "overlap"
    keep_previous: bool = True
    log_sample_rate: float = Field(default=0.1, ge=0, le=1)
    log_inputs: bool = True
    allow_pickle: bool = False
    allow_code: bool = False
    factories: tuple[_DottedPath, ...] = ()
    require_signature: bool | None = None

    @field_validator("replicas")
    @classmethod
    def _in_order(cls, replicas: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(replicas, tuple) and replicas[0] > replicas[1]:
            raise ValueError("the first of two numbers is the smaller one: (min, max)")
        return replicas

    @field_validator("device")
    @classmethod
    def _at_least_one(cls, device: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not device:
            raise ValueError("name at least one device")
        return device

    @field_validator("features")
    @classmethod
    def _apart(cls, features: Features | tuple[Features, ...] | None) -> Features | tuple[Features, ...] | None:
        check_apart(features if isinstance(features, tuple) else ())
        return features

    @property
    def declared_features(self) -> tuple[Features, ...]:
        """What is read from the feature store, as a tuple that may be empty."""
        return self.features if isinstance(self.features, tuple) else (self.features,) if self.features else ()

    def device_of(self, place: int) -> str:
        """Return the device of the replica at that place of the pool: they are dealt out in turn."""
        return self.device if isinstance(self.device, str) else self.device[place % len(self.device)]

    @property
    def replica_range(self) -> tuple[int, int]:
        """Fewest and most replicas."""
        return self.replicas if isinstance(self.replicas, tuple) else (self.replicas, self.replicas)

    @property
    def keeps_previous(self) -> bool:
        """Whether the version before stays loaded. Where there is no room for two, it cannot."""
        return self.keep_previous and self.reload == "overlap"

    @property
    def batch_rows(self) -> int:
        """Most rows in one batch, as a number; what ``"auto"`` never goes beyond."""
        return AUTO_BATCH_SIZE if self.max_batch_size == "auto" else self.max_batch_size


class ServerOptions(TypedDict, total=False):
    """The options of a server, beside its registry and its models.

    Artifacts are kept under ``cache_dir``, at most ``cache_bytes`` of them, and fetching one may take
    ``download_limit_s`` seconds. The registry is polled every ``poll_s`` seconds; ``changes`` announces changes by
    other processes sooner: ``"postgres"`` (the registry's own database) or ``"redis://…"``. Answers of models with a
    ``cache_ttl_s`` are kept in this process, and also in ``cache``: ``"redis://…"``, or an object that is a
    :class:`modelserve.ports.Cache`. ``features`` is the store that the models' features are read from: ``"redis://…"``,
    ``"dynamodb://table"``, ``"feast:///path"``, or an object. With ``trusted_keys`` (Ed25519 public keys: PEM texts or
    the paths of files), a version that none of them signed is refused.

    A sample of the answers is written to ``log``: a database's URL, by default the registry's own if this account may
    add to it; False for none. ``log_key`` makes the hashes of inputs in it keyed ones. ``metrics`` counts for
    ``GET /metrics``; host processes that share a ``metrics_dir`` answer with the sum of all.
    """

    cache_dir: str | Path | None
    cache_bytes: int | None
    download_limit_s: float
    cache: str | Cache | None
    changes: str | ChangeHints | None
    poll_s: float
    trusted_keys: Sequence[str | Path | TrustedKey]
    features: str | FeatureStore | None
    log: str | Literal[False] | None
    log_key: str | None
    metrics: bool
    metrics_dir: str | Path | None


class Settings(BaseSettings):
    """Everything a server is built from. ``models=None`` serves every model that has a production version."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=_PREFIX, env_nested_delimiter="__", env_ignore_empty=True
    )

    registry: str = Field(default="sqlite:///models.db", repr=False)  # it may hold a password, as that of changes may
    artifacts: str | None = Field(default=None, repr=False)
    cache_dir: _Folder | None = None
    cache_bytes: int | None = Field(default=None, ge=1)
    cache: str | None = Field(default=None, repr=False)
    changes: str | None = Field(default=None, repr=False)
    features: str | None = Field(default=None, repr=False)
    download_limit_s: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    poll_s: float = Field(default=1.0, gt=0)
    trusted_keys: tuple[str, ...] = ()
    log: str | Literal[False] | None = Field(default=None, repr=False)
    log_key: SecretStr | None = None
    metrics: bool = True
    metrics_dir: _Folder | None = None
    models: dict[str, ModelOptions] | None = None

    @field_validator("log", mode="before")
    @classmethod
    def _off(cls, log: Any) -> Any:
        """Take a variable's ``false`` for what it means: an environment has only texts."""
        return False if isinstance(log, str) and log.strip().lower() in {"false", "off", "no", "0"} else log

    @classmethod
    def load(cls, path: str | Path | None = None, **overrides: Any) -> Settings:
        """Read the settings from a TOML file (if given), the environment and keyword arguments.

        Raises ``ConfigError`` that names every wrong option.
        """
        if path is not None and not _is_file(Path(path)):
            raise ConfigError(f"no configuration file at {path}")
        _tell_unknown_variables(cls.model_fields)

        class FromFile(cls):  # type: ignore[misc, valid-type]  # the file's path is part of a settings class
            model_config = SettingsConfigDict(toml_file=path)

        try:
            return FromFile(**overrides)
        except ValidationError as error:
            raise ConfigError("; ".join(_complaint(each) for each in error.errors())) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, SettingsError) as error:
            raise ConfigError(f"{path or 'environment'}: {error}") from error

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  # the framework's signature
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Rank the sources: keyword arguments, environment, file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # its folder cannot be looked into, or its name is none
        return False


def _tell_unknown_variables(names: Collection[str]) -> None:
    """Warn of variables that look like settings and are none. Others may use the prefix: a cluster's services do."""
    for variable in os.environ:
        setting = variable.upper().partition("__")[0].removeprefix(_PREFIX).lower()
        if variable.upper().startswith(_PREFIX) and setting not in {*names, "config"}:
            near = difflib.get_close_matches(setting, names, 1)
            hint = f"; did you mean {_PREFIX}{near[0].upper()}?" if near else ""
            _log.warning("%s is no setting of modelserve, and is ignored%s", variable, hint)


def _complaint(error: Any) -> str:
    return f"{'.'.join(map(str, error['loc']))}: {error['msg']}"
