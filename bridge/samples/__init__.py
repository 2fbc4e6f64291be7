"""Sample event types, to try the bridge before you write your own: `BRIDGE_SCHEMAS=bridge.samples`.

They are examples and may change with each version. Put the event types of your product into your own package.
"""
