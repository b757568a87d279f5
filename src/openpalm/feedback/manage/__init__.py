"""Pages of managers: settings, members, prompts, items, judgements, export, audit."""
