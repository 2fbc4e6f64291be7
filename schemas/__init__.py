"""Your event types: one model for each type. A class in any module of this package adds a type.

Workers import the classes to publish. The bridge imports the package (`BRIDGE_SCHEMAS`, by default `schemas`)
to validate. A member that no class declares never reaches a browser.

This package is an example: replace it. The bridge does not install it, because the name `schemas` is yours.
More sample types are in `bridge/samples/`.
"""
