"""Writes models in the formats of other systems."""
