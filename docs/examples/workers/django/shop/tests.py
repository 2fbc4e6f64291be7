"""`python manage.py test`. These tests need no RabbitMQ."""

from unittest.mock import patch

from django.test import TestCase

from bridge import PublishTimeout
from bridge.testing import FakeBlockingPublisher, FakePublisher
from shop.events import announce_many
from shop.models import Job


class Reports(TestCase):
    @patch("shop.events.publisher", new_callable=FakePublisher.blocking)
    def test_a_report_publishes_its_event(self, fake: FakeBlockingPublisher) -> None:
        with self.captureOnCommitCallbacks(execute=True):
            self.client.post("/reports", {"user": "42", "name": "a"})
        (event,) = fake.published
        assert event.id == f"job-{Job.objects.get().pk}:completed"
        assert Job.objects.get().is_announced

    @patch("shop.events.publisher", new_callable=FakePublisher.blocking)
    def test_a_batch_that_times_out_continues_where_it_stopped(self, fake: FakeBlockingPublisher) -> None:
        Job.objects.bulk_create(Job(user="42", seconds=1) for _ in range(5))
        fake.fail_next(PublishTimeout, after=3, arrived=True)
        pending = Job.objects.filter(is_announced=False).order_by("pk")
        with self.assertRaises(PublishTimeout):  # noqa: PT027 - Django's own runner has no pytest.
            announce_many(pending)
        assert pending.count() == 2
        assert announce_many(pending.all()) == 2
        assert len(fake.published) == 5
        assert len(fake.repeats) == 2
