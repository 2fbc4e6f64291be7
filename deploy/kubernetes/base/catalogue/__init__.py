"""The event catalogue: one model an event type. Add a type by adding a class in any module here; that is all.

Workers import the classes to publish, the bridge imports the package (`BRIDGE_SCHEMAS`) to validate. A member that a
class does not declare never reaches a browser.
"""
