"""The events of this site. The publisher connects with the first event, in each process."""

from collections.abc import Iterator

from django.conf import settings
from django.db.models import QuerySet

from bridge import Audience, Publisher, PublishError
from bridge.publisher import Item
from bridge.samples.jobs import JobCompleted
from shop.models import Job

# A person waits for the request, so the limit is five seconds. After that, `publish_jobs` publishes the event.
publisher = Publisher.blocking(settings.AMQP_URL, source="/sites/shop", timeout=settings.EVENTS_TIMEOUT)


def completed(job: Job) -> JobCompleted:
    return JobCompleted(job_id=str(job.pk), duration_seconds=job.seconds)


def announce(job: Job) -> None:
    publisher.to_user(job.user, completed(job), id=f"job-{job.pk}:completed")
    Job.objects.filter(pk=job.pk).update(is_announced=True)


def announce_many(jobs: QuerySet[Job]) -> int:
    """Publishes the events of these jobs, and marks the confirmed ones even if the batch fails."""
    taken: list[int] = []

    def events() -> Iterator[Item]:
        for job in jobs.iterator():
            taken.append(job.pk)
            yield Audience.user(job.user), completed(job), {"id": f"job-{job.pk}:completed"}

    confirmed = 0
    try:
        confirmed = publisher.publish_many(events())
    except PublishError as error:
        confirmed = error.confirmed or 0
        raise
    finally:
        Job.objects.filter(pk__in=taken[:confirmed]).update(is_announced=True)
    return confirmed
