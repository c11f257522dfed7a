"""The tests; each module mirrors the module it tests."""
