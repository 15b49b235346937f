"""Measures how well codes find their own classes, as figures and a page.

evaluate     the verb, and the page of its report
figures      every number of a report
conventions  the mAP of one ranking as the code bases of the field give it
health       how codes use their bits
subject      what was measured, in words
advice       what to do next, in two sentences
gallery      the queries that a report shows, with their neighbours
overlap      nearest neighbours under ties
pair         queries and database, read and matched
agreement    how far two codes of the same samples agree
rounding     figures as a report prints them
"""
