"""The fixtures in a team's tests: a pytest of its own, which loads the plugin only on request."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TEAM = """
import pytest
from bridge.samples.jobs import JobCompleted

DONE = JobCompleted(job_id="r-7", duration_seconds=3.2)
before = []

@pytest.mark.parametrize("test", [1, 2])
def test_each_test_has_a_publisher_of_its_own(fake_publisher, test):
    assert fake_publisher.published == []
    assert fake_publisher not in before
    before.append(fake_publisher)

def test_the_blocking_one(fake_blocking_publisher):
    fake_blocking_publisher.to_user("42", DONE)
    assert len(fake_blocking_publisher.published) == 1
    before.append(fake_blocking_publisher)

def test_it_is_closed_with_its_test():
    with pytest.raises(RuntimeError, match="closed"):
        before[-1].to_user("42", DONE)
"""


def test_a_team_uses_the_fixtures(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["bridge.pytest_plugin"]\n')
    (tmp_path / "test_team.py").write_text(TEAM)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:schemathesis", "-n0", tmp_path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "4 passed" in done.stdout, done.stdout + done.stderr
