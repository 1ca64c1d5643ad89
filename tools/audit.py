"""Look the pinned dependencies up among the known vulnerabilities, with pip-audit: `audit.py [--offline-passes]`.

pip-audit ends well when its service knows none of the packages. Here what has not been looked up is said, and fails
unless --offline-passes is given. A known vulnerability always fails.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import NamedTuple

PIP_AUDIT = [sys.executable, "-m", "pip_audit", "--disable-pip", "--no-deps", "--requirement", "constraints.txt"]
OPTIONS = ["--format", "json", "--progress-spinner", "off", "--timeout", "5"]


class Report(NamedTuple):
    """Of pip-audit: packages, one text for each vulnerability, and one for each package that was not looked up."""

    packages: int
    vulnerable: list[str]
    missed: list[str]


def read_report(text: str) -> Report:
    """The content of pip-audit's JSON."""
    dependencies = json.loads(text)["dependencies"]
    vulnerable = [
        f"{package['name']} {package['version']}: {found['id']}, fixed in {', '.join(found['fix_versions']) or 'none'}"
        for package in dependencies
        for found in package.get("vulns", [])
    ]
    return Report(len(dependencies), vulnerable, [p["skip_reason"] for p in dependencies if "skip_reason" in p])


def main(arguments: list[str]) -> int:
    """Print what was found; the exit status."""
    done = subprocess.run([*PIP_AUDIT, *OPTIONS], capture_output=True, text=True)
    missed_status = 0 if "--offline-passes" in arguments else 1
    try:
        report = read_report(done.stdout)
    except ValueError:
        reason = done.stderr.strip().rpartition("\n")[2]
        print(f"audit: NOTHING WAS AUDITED, pip-audit has failed:\n{reason}")
        return missed_status
    for text in report.vulnerable:
        print(f"audit: {text}")
    if report.missed:
        print(f"audit: {len(report.missed)} of {report.packages} WERE NOT AUDITED: {report.missed[0]}; ...")
    else:
        print(f"audit: {report.packages} packages looked up")
    return 1 if report.vulnerable else missed_status if report.missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
