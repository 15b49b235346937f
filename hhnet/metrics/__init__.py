"""Retrieval metrics over packed codes."""
