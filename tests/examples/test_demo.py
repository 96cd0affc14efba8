"""``make demo`` as a user runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_demo_answers_every_request_with_both_versions(tmp_path: Path) -> None:
    """The demo ends by itself, without a failure, after both versions have answered; it shows features and a hit."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "KEEP": ""}
    command = [sys.executable, "-m", "examples.demo"]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=170, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "failures  0" in result.stdout
    by_version = dict(re.findall(r"(\d\.0\.0): ([\d,]+)", result.stdout.partition("answers")[2]))
    answered = {version: int(count.replace(",", "")) for version, count in by_version.items()}
    assert set(answered) == {"1.0.0", "2.0.0"}
    assert sum(answered.values()) == 20_000
    assert '"model_version": "1.0.0"' in result.stdout
    enriched = re.findall(r"late with (\d\.\d+) .*(\{.*\})", result.stdout)
    told = [json.loads(each) for _, each in enriched]
    assert [each["cached"] for each in told] == [False, True, False]
    assert [each["degraded"] for each in told] == [[], [], ["precip", "visib"]]
    assert enriched[0][0] == enriched[1][0]
