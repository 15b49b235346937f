"""Retrieval metrics over packed codes.

retrieval    mAP, precision, recall, with ties treated exactly
conventions  how code bases of the field compute mAP
"""
