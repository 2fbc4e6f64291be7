"""Your event types: one model for each type. A class in any module of this package adds a type.

Workers import the classes to publish. The bridge imports the package (`BRIDGE_SCHEMAS`, by default `schemas`)
to validate. A member that a class does not declare never reaches a browser.

This package is an example to replace. The bridge does not install it: a name such as `schemas` belongs to you.
More sample types are in `bridge/samples/`.
"""
