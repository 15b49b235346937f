"""Ray: where it runs, a bounded pool of workers on it, verbs as jobs, and the progress that users see.

session      the connection to Ray: a local one, or a cluster that is joined
head         whether a cluster's head answers, and still does
placement    what a worker reserves, and the wait for room
pool         items on actors: attempts, deaths and hangs told apart
ray_actors   what the pool asks of Ray
attempts     the ends of attempts, and their causes
ray_pool     the pool as verbs take it: session, shared store and room
submit       which verbs run as Ray jobs, and the words that they are sent as
jobs         one such job: submitted, followed, stopped; records: what its log says
access       whom a verb may talk to
progress     what users see of a stage
metrics      counters for Prometheus
failures     why a training failed, in one line
ray_private  what Ray offers through private interfaces only
"""
