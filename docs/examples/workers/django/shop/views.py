from django.db import IntegrityError, transaction
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST

from shop.events import announce
from shop.models import Job, Report


@csrf_exempt  # For the example only: a real site takes the user from the session and checks the CSRF token.
@require_POST
def make_report(request: HttpRequest) -> HttpResponse:
    try:
        with transaction.atomic():
            job = Job.objects.create(user=request.POST["user"], seconds=3.2)
            # Runs after the commit, and never after a rollback. With `robust`, Django logs an error and still answers
            # the request: the data is committed, and `publish_jobs` publishes the event later.
            transaction.on_commit(lambda: announce(job), robust=True)
            Report.objects.create(job=job, name=request.POST["name"])
    except IntegrityError:
        return JsonResponse({"error": "a report with this name exists"}, status=409)
    return JsonResponse({"event": f"job-{job.pk}:completed"}, status=201)
