"""Django looks here for its commands."""
