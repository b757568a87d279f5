"""Judging items: leases, payloads, the pages of labelers."""
