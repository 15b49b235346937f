"""Intake: what a source holds, where its labels come from, and how it is split; nothing is written in here."""
