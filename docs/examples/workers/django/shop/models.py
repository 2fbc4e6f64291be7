from django.db import models


class Job(models.Model):
    user = models.CharField(max_length=200)
    seconds = models.FloatField()
    is_announced = models.BooleanField(default=False, db_index=True)
    """Whether RabbitMQ has confirmed its event."""


class Report(models.Model):
    job = models.OneToOneField(Job, on_delete=models.CASCADE)
    name = models.CharField(max_length=200, unique=True)
