"""Makes `tests/` importable, so that tests share `tiny`."""
