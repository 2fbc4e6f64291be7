"""The event catalogue: a team's package of event types, loaded, exported and compared.

Workers do not need it, and it needs nothing of the service.
"""
