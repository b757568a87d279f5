"""The web application that collects human feedback and turns it into better models (Django)."""
