"""Proofs of artifacts from their stored bytes."""
