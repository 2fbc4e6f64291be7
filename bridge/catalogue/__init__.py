"""Loads, exports and compares the event catalogue: a team's package of event types.

Workers do not need this package. It imports nothing from the service.
"""
