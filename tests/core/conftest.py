"""The stand-in for the starter model."""

from standin import stand_in, starter  # noqa: F401
