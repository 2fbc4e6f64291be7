"""RabbitMQ: live queues, the event log, the quarantine. Knows queues and bodies, and no stream."""
