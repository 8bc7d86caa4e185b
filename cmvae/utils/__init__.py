"""Helpers that are independent of the project: files, errors, seeds, progress, processes."""
