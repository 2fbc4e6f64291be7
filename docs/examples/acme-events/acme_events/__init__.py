"""The events of Acme's automations. The bridge takes every model of every module in here."""
