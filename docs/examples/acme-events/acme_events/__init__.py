"""The events of Acme's automations. The bridge takes every model that a module of this package defines."""
