"""The audit of the dependencies fails for a known vulnerability, and never silently looks nothing up."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import audit
import pytest

FINE = {"name": "torch", "version": "2.13.0", "vulns": []}
VULNERABLE = {"name": "jinja2", "version": "2.4.1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.7.2"]}]}
UNKNOWN = {"name": "numpy", "skip_reason": "Dependency not found on PyPI and could not be audited: numpy (2.4.6)"}


@pytest.mark.parametrize(
    ("found", "strict", "lenient", "words"),
    [
        ([FINE], 0, 0, "audit: 1 packages looked up"),
        ([FINE, VULNERABLE], 1, 1, "audit: jinja2 2.4.1: PYSEC-1, fixed in 2.7.2"),
        ([FINE, UNKNOWN], 1, 0, "audit: 1 of 2 WERE NOT AUDITED: Dependency not found on PyPI"),
        ([UNKNOWN, VULNERABLE], 1, 1, "audit: jinja2 2.4.1: PYSEC-1"),
        (None, 1, 0, "audit: NOTHING WAS AUDITED, pip-audit has failed:\nConnectionError: no route"),
    ],
)
def test_verdicts(
    found: list[Any] | None,
    strict: int,
    lenient: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = "" if found is None else json.dumps({"dependencies": found, "fixes": []})
    done = subprocess.CompletedProcess([], 1, stdout=text, stderr="Traceback\nConnectionError: no route\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert audit.main([]) == strict
    assert audit.main(["--offline-passes"]) == lenient
    assert words in capsys.readouterr().out
