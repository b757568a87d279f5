"""Judgements: the queue, submission, payloads, and the preference records made of them."""
