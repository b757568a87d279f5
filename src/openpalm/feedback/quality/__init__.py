"""The figures of a project, computed by the worker and stored as Statistic rows for the pages."""
