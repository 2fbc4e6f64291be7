"""A Django site whose session opens the bridge's streams: BRIDGE_AUTH_URL=http://127.0.0.1:8000/bridge-login

Run: python app.py 8000
In your own project only the view `bridge_login` and its URL are new.
"""

import sys

from django.conf import settings

settings.configure(
    SECRET_KEY="only-for-this-example",
    ALLOWED_HOSTS=["127.0.0.1"],
    ROOT_URLCONF=__name__,
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "site.sqlite3"}},
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "django.contrib.sessions"],
    MIDDLEWARE=[
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
    ],
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
)

import django  # noqa: E402

django.setup()

from django.contrib.auth import get_user_model, login, logout  # noqa: E402
from django.contrib.auth.models import Group  # noqa: E402
from django.core.management import call_command  # noqa: E402
from django.http import HttpRequest, HttpResponse, JsonResponse  # noqa: E402
from django.urls import path  # noqa: E402


def bridge_login(request: HttpRequest) -> HttpResponse:
    """Says to the bridge whose session this is. Without `login_required`: that would redirect to a page."""
    if not request.user.is_authenticated:
        return JsonResponse({"detail": "Your session has ended. Please log in again."}, status=401)
    groups = list(request.user.groups.values_list("name", flat=True))
    return JsonResponse({"user": request.user.get_username(), "groups": groups, "expires_in": 60})


def log_in(request: HttpRequest) -> HttpResponse:
    """Stands for your login page."""
    user, _ = get_user_model().objects.get_or_create(username=request.GET["user"])
    for name in request.GET.getlist("group"):
        user.groups.add(Group.objects.get_or_create(name=name)[0])
    login(request, user, backend="django.contrib.auth.backends.ModelBackend")
    return JsonResponse({})


def log_out(request: HttpRequest) -> HttpResponse:
    logout(request)
    return JsonResponse({})


urlpatterns = [path("bridge-login", bridge_login), path("login", log_in), path("logout", log_out)]

if __name__ == "__main__":
    call_command("migrate", verbosity=0)
    call_command("runserver", f"127.0.0.1:{sys.argv[1]}", "--noreload")
