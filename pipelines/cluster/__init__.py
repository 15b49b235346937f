"""Ray: where it runs, a bounded pool of workers on it, verbs as jobs, and the progress that users see."""
