from django.urls import path

from shop.views import make_report

urlpatterns = [path("reports", make_report)]
