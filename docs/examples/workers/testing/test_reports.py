"""Tests of reports.py. They need no RabbitMQ."""

import pytest
import reports

from bridge import PublishForbidden, PublishTimeout
from bridge.samples.jobs import JobCompleted
from bridge.testing import FakeBlockingPublisher


@pytest.fixture(autouse=True)
def fake(fake_blocking_publisher: FakeBlockingPublisher, monkeypatch: pytest.MonkeyPatch) -> FakeBlockingPublisher:
    monkeypatch.setattr(reports, "publisher", fake_blocking_publisher)
    return fake_blocking_publisher


def test_a_report_is_started_and_completed(fake: FakeBlockingPublisher) -> None:
    reports.make_report("r-7", user="42")
    assert [event.id for event in fake.published] == ["r-7:started", "r-7:completed"]
    (done,) = fake.find(JobCompleted, user="42")
    assert done.event["data"]["job_id"] == "r-7"


def test_a_completion_without_a_confirm_is_published_again(fake: FakeBlockingPublisher) -> None:
    fake.fail_next(PublishTimeout, after=1, arrived=True)
    reports.make_report("r-7", user="42")
    assert [event.id for event in fake.published] == ["r-7:started", "r-7:completed"]
    assert [event.id for event in fake.repeats] == ["r-7:completed"]


def test_a_missing_right_ends_the_job(fake: FakeBlockingPublisher) -> None:
    fake.fail_next(PublishForbidden)
    with pytest.raises(PublishForbidden):
        reports.make_report("r-7", user="42")
    assert fake.published == []
