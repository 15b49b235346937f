"""Prefect flows: they orchestrate the verbs and do no work of their own."""
