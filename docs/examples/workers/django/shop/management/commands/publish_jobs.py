"""Publishes the events that were committed and not confirmed: `python manage.py publish_jobs`, each minute by cron."""

from django.core.management.base import BaseCommand

from shop.events import announce_many
from shop.models import Job


class Command(BaseCommand):
    def handle(self, *arguments: object, **options: object) -> None:
        # At most 1000 at a time, so that the update names no more rows than any database takes.
        pending = Job.objects.filter(is_announced=False).order_by("pk")[:1000]
        self.stdout.write(f"{announce_many(pending)} events published")
