"""Readers of the files of each kind of row: pairs, prompts, ratings and others."""
