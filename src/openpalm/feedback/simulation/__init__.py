"""Simulated labelers: known tastes, known noise, through the REST API. They need no Django."""
