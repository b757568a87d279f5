"""The WSGI application: `gunicorn openpalm.feedback.wsgi:application`."""

import os

from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "openpalm.feedback.settings")
application = get_wsgi_application()
