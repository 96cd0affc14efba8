"""Options from keyword arguments, a file and the environment."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from modelserve.config import AUTO_BATCH_SIZE, ModelOptions, Settings
from modelserve.errors import ConfigError


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A file with a few options."""
    path = tmp_path / "modelserve.toml"
    path.write_text('registry = "sqlite:///file.db"\npoll_s = 5\n[models.churn]\ntimeout_ms = 200\nreplicas = 2\n')
    return path


def test_the_defaults_need_nothing() -> None:
    """Without file and environment everything has a default, and every production model is served."""
    settings = Settings.load()
    assert settings.registry == "sqlite:///models.db"
    assert settings.models is None
    assert ModelOptions().batch_rows == AUTO_BATCH_SIZE
    assert ModelOptions(max_batch_size=8).batch_rows == 8


def test_keywords_beat_the_environment_beats_the_file(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each source overrides the next, also inside a model's options."""
    monkeypatch.setenv("MODELSERVE_POLL_S", "3")
    monkeypatch.setenv("MODELSERVE_MODELS__CHURN__TIMEOUT_MS", "300")
    settings = Settings.load(config, registry="sqlite:///keyword.db")
    assert settings.registry == "sqlite:///keyword.db"
    assert settings.poll_s == 3
    assert settings.models is not None
    assert (settings.models["churn"].timeout_ms, settings.models["churn"].replicas) == (300, 2)


def test_an_empty_variable_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deployment that sets a variable to nothing leaves the default as it is."""
    for name in ("METRICS_DIR", "LOG", "CACHE", "POLL_S"):
        monkeypatch.setenv(f"MODELSERVE_{name}", "")
    settings = Settings.load()
    assert (settings.metrics_dir, settings.log, settings.cache, settings.poll_s) == (None, None, None, 1.0)


def test_a_variable_that_is_no_setting_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A misspelt variable would change nothing in silence; those of a cluster's service are told, and harm nothing."""
    monkeypatch.setenv("MODELSERVE_TRUSTED_KEY", '["key.pem"]')
    monkeypatch.setenv("MODELSERVE_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("MODELSERVE_CONFIG", "modelserve.toml")
    monkeypatch.setenv("MODELSERVE_MODELS__CHURN__TIMEOUT_MS", "300")
    Settings.load()
    assert len(caplog.messages) == 2
    assert (
        "MODELSERVE_TRUSTED_KEY is no setting of modelserve, and is ignored; did you mean MODELSERVE_TRUSTED_KEYS?"
        in (caplog.messages)
    )


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    """Bytes that are no UTF-8 are a ``ConfigError`` like any other mistake in the file."""
    path = tmp_path / "wrong.toml"
    path.write_bytes(b'registry = "\xff"')
    with pytest.raises(ConfigError, match=r"wrong\.toml"):
        Settings.load(path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("poll_s = 0", "poll_s: "),
        ("nonsense = 1", "nonsense: "),
        ('[models.churn]\nexecutor = "magic"', "models.churn.executor: "),
        ("[models.churn]\nunknown = 1", "models.churn.unknown: "),
        ("[models.churn]\nreplicas = [4, 1]", "models.churn.replicas: .*smaller one"),
        ("[models.churn.scaling]\nout_above = 3", "models.churn.scaling: .*never rest"),
        ("[models.churn.scaling]\nunknown = 3", "models.churn.scaling.unknown: "),
        ('metrics_dir = ""', "metrics_dir: .*name a folder"),
        ('cache_dir = ""', "cache_dir: .*name a folder"),
        ("[models.churn]\ncache_ttl_s = 1e16", "models.churn.cache_ttl_s: "),
        ("not toml", "Expected"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    """A wrong file is one ``ConfigError`` that names the option."""
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        Settings.load(path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    """A path that leads nowhere is not silently the defaults."""
    with pytest.raises(ConfigError, match="no configuration file"):
        Settings.load(tmp_path / "absent.toml")


def test_replicas_are_a_number_or_a_range() -> None:
    """One number is both the fewest and the most."""
    assert ModelOptions(replicas=3).replica_range == (3, 3)
    assert ModelOptions(replicas=(1, 4)).replica_range == (1, 4)


@pytest.mark.parametrize("options", [{"replicas": 0}, {"timeout_ms": 0}, {"max_batch_size": 0}, {"queue_limit": -1}])
def test_options_have_bounds(options: dict[str, int]) -> None:
    """Options outside their range are refused where they are written."""
    with pytest.raises(ValidationError):
        ModelOptions(**options)  # type: ignore[arg-type]


def test_no_secret_is_shown() -> None:
    """Whatever URL or key a setting holds, printing the settings does not show its password."""
    url = "postgresql://writer:s3cret@db/logs"
    settings = Settings(
        registry=url, artifacts=url, cache=url, changes=url, features=url, log=url, log_key=SecretStr("s3cret" * 3)
    )
    assert "s3cret" not in repr(settings)
    assert "s3cret" not in str(settings)
