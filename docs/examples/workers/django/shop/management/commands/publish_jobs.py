"""Publishes the events of committed jobs that RabbitMQ has not confirmed. Cron runs `python manage.py publish_jobs`."""

from django.core.management.base import BaseCommand

from shop.events import announce_many
from shop.models import Job


class Command(BaseCommand):
    def handle(self, *arguments: object, **options: object) -> None:
        # At most 1000 at a time: databases limit how many values one update may name.
        pending = Job.objects.filter(is_announced=False).order_by("pk")[:1000]
        self.stdout.write(f"{announce_many(pending)} events published")
