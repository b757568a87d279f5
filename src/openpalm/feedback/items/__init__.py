"""Items: adding them, changing them, tasks, and who may see their models' names."""
