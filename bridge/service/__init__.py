"""The service: sends events from RabbitMQ's queues to browsers' streams.

Only the commands of `bridge.cli` import it from outside this package, and only when they run.

    broker/     RabbitMQ: live queues, the event log, the quarantine
    streams/    the events and frames of each stream, and their time
    http/       requests, tokens, and the public and internal routes
    main.py     starts and stops all parts
"""
