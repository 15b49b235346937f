"""Prefect flows: orchestration of the verbs, and nothing else."""
