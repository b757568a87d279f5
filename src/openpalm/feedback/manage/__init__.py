"""Pages of managers: settings, members, prompts, items, import, export, audit."""
