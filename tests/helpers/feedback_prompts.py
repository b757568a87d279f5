"""Prompts for tests of the feedback application."""

import hashlib

from openpalm.feedback.models import Project, Prompt


def add_prompts(project: Project, count: int, *, text: str = "prompt", held_out: bool = False):
    prompts = [
        Prompt(
            project=project,
            messages=[{"role": "user", "content": f"{text} {number}"}],
            digest=hashlib.sha256(f"{text} {number} {held_out}".encode()).hexdigest(),
            source="typed",
            held_out=held_out,
        )
        for number in range(count)
    ]
    return Prompt.objects.bulk_create(prompts)
