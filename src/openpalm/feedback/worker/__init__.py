"""The worker process and its queue of jobs."""
