"""Judgements out, prompts and answers in: the formats of files."""
