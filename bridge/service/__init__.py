"""The service: from RabbitMQ's queues to browsers' streams.

Nothing outside this package imports it, except the commands of `bridge.cli`, when they run.

    broker/     RabbitMQ: live queues, the event log, the quarantine
    streams/    what each client is sent, and when
    http/       requests, tokens, and the public and internal routes
    main.py     starts and stops all of it
"""
