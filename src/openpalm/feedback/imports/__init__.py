"""Imports: uploaded files, their rows, the import job, and first prompts."""
