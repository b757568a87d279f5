"""Django settings, read from the environment so that gunicorn and `openpalm feedback` agree.

OPENPALM_FEEDBACK_DIR     folder of database, secret key, snapshots and runs (default: feedback)
DATABASE_URL              postgresql://user:password@host/name; default: DIR/db.sqlite3
OPENPALM_FEEDBACK_SECRET  the secret key; default: DIR/secret_key, made once
OPENPALM_FEEDBACK_HOSTS   host names that the site answers to, separated by commas
OPENPALM_FEEDBACK_HTTPS   1 behind a proxy that speaks HTTPS: secure cookies, redirects, HSTS
OPENPALM_FEEDBACK_PROXIES proxies that every request passes; default: 1 with HTTPS, else 0
OPENPALM_SERVER_URL       the model server (`openpalm serve`), e.g. http://127.0.0.1:8000
OPENPALM_ADMIN_KEY        its admin key, for promotion
OPENPALM_API_KEY          its API key
"""

import logging
import os
from http import HTTPStatus
from pathlib import Path
from typing import Any

import dj_database_url
from django.core.exceptions import ImproperlyConfigured

from openpalm.feedback.secret_key import read_or_make

FEEDBACK_DIR = Path(os.environ.get("OPENPALM_FEEDBACK_DIR", "feedback")).absolute()
# Private for any umask: sessions are in the database, texts of people in the other files.
FEEDBACK_DIR.mkdir(mode=0o700, parents=True, exist_ok=True)
for _name in ("snapshots", "uploads", "logs"):
    (FEEDBACK_DIR / _name).mkdir(mode=0o700, exist_ok=True)
SECRET_KEY = os.environ.get("OPENPALM_FEEDBACK_SECRET") or read_or_make(FEEDBACK_DIR)
HTTPS = os.environ.get("OPENPALM_FEEDBACK_HTTPS") == "1"


def _proxies() -> int:
    text = os.environ.get("OPENPALM_FEEDBACK_PROXIES", "").strip() or str(int(HTTPS))
    if not text.isascii() or not text.isdigit() or int(text) > 9:
        raise ImproperlyConfigured(f"OPENPALM_FEEDBACK_PROXIES={text}: must be from 0 to 9")
    if HTTPS and int(text) == 0:
        raise ImproperlyConfigured(
            "OPENPALM_FEEDBACK_PROXIES=0: with OPENPALM_FEEDBACK_HTTPS=1 there is a proxy, which "
            "speaks HTTPS; give the number of proxies"
        )
    return int(text)


FEEDBACK_PROXIES = _proxies()
"""entries at the end of X-Forwarded-For that visitors cannot write"""
DEBUG = False

SERVER_URL = os.environ.get("OPENPALM_SERVER_URL", "").rstrip("/")
SERVER_ADMIN_KEY = os.environ.get("OPENPALM_ADMIN_KEY", "")
SERVER_API_KEY = os.environ.get("OPENPALM_API_KEY", "")

_hosts = os.environ.get("OPENPALM_FEEDBACK_HOSTS", "localhost,127.0.0.1,[::1]")
ALLOWED_HOSTS = [host.strip() for host in _hosts.split(",") if host.strip()]

INSTALLED_APPS = [
    "openpalm.feedback.apps.FeedbackConfig",
    "django.contrib.admin.apps.SimpleAdminConfig",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "whitenoise.runserver_nostatic",
    "django.contrib.staticfiles",
    "django_htmx",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "openpalm.feedback.accounts.middleware.content_security_policy",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "openpalm.feedback.accounts.middleware.body_limit",
    "openpalm.feedback.accounts.middleware.no_nul",
    "openpalm.feedback.accounts.middleware.first_admin",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
]
ROOT_URLCONF = "openpalm.feedback.urls"
WSGI_APPLICATION = "openpalm.feedback.wsgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]


_WANTED = (  # without the value, which may hold a password
    "DATABASE_URL: must be postgresql://user:password@host/name or sqlite:///FILE; special "
    "characters of the password are written as %40 and the like"
)


def _database() -> dict[str, Any]:
    url = os.environ.get("DATABASE_URL") or f"sqlite:///{FEEDBACK_DIR / 'db.sqlite3'}"
    try:
        database: dict[str, Any] = dict(dj_database_url.parse(url))
    except dj_database_url.UnknownSchemeError:
        raise ImproperlyConfigured(_WANTED) from None
    except (ValueError, KeyError) as error:
        raise ImproperlyConfigured(f"DATABASE_URL: {error}") from None
    if database["ENGINE"].rpartition(".")[2] not in ("postgresql", "sqlite3"):
        raise ImproperlyConfigured(_WANTED)
    if database["ENGINE"] == "django.db.backends.sqlite3":
        # SQLite's default is world-readable; its journals copy the permissions of the database.
        if isinstance(file := database["NAME"], str) and file and not file.startswith(":"):
            Path(file).touch(mode=0o600)
        # Writers take the lock when they begin, so that none fails when it first writes. FULL: an
        # acknowledged judgement survives a loss of power.
        database["OPTIONS"] = {
            "transaction_mode": "IMMEDIATE",
            "timeout": 30,
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; "
            "PRAGMA cache_size=-65536; PRAGMA temp_store=MEMORY;",
        }
    database["CONN_MAX_AGE"] = None
    database["CONN_HEALTH_CHECKS"] = True
    return database


DATABASES = {"default": _database()}

AUTH_USER_MODEL = "feedback.User"
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}"}
    for name in (
        "UserAttributeSimilarityValidator",
        "MinimumLengthValidator",
        "CommonPasswordValidator",
        "NumericPasswordValidator",
    )
]
LOGIN_URL = "login"
LOGIN_REDIRECT_URL = "home"
LOGOUT_REDIRECT_URL = "login"
PASSWORD_RESET_TIMEOUT = 24 * 3600
SESSION_COOKIE_AGE = 14 * 24 * 3600
SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_SAMESITE = CSRF_COOKIE_SAMESITE = "Lax"
SESSION_COOKIE_NAME, CSRF_COOKIE_NAME = "openpalm_session", "openpalm_csrf"
CSRF_FAILURE_VIEW = "openpalm.feedback.accounts.errors.csrf_failure"
X_FRAME_OPTIONS = "DENY"
SECURE_REFERRER_POLICY = "same-origin"
if HTTPS:
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
    SECURE_SSL_REDIRECT = True
    SECURE_REDIRECT_EXEMPT = [r"^healthz$"]
    SECURE_HSTS_SECONDS = 365 * 24 * 3600
    SECURE_HSTS_INCLUDE_SUBDOMAINS = SECURE_HSTS_PRELOAD = True
    SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = True
    CSRF_TRUSTED_ORIGINS = [f"https://{host}" for host in ALLOWED_HOSTS if host != "*"]

DATA_UPLOAD_MAX_MEMORY_SIZE = 2 * 2**20
FILE_UPLOAD_MAX_MEMORY_SIZE = 2**20
DATA_UPLOAD_MAX_NUMBER_FIELDS = 1000
FEEDBACK_MAX_UPLOAD_BYTES = 200 * 2**20

LANGUAGE_CODE = "en"
TIME_ZONE = "UTC"
USE_TZ = True
USE_I18N = False
STATIC_URL = "static/"
# Served from the packages themselves: nothing to collect on a laptop.
WHITENOISE_USE_FINDERS = True
WHITENOISE_MAX_AGE = 3600
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {"BACKEND": "openpalm.feedback.static_files.VersionedStorage"},
}
STATIC_ROOT = FEEDBACK_DIR / "static"
STATIC_ROOT.mkdir(exist_ok=True)


def _is_news(record: logging.LogRecord) -> bool:
    """A form that was filled in wrongly is answered on its page; it is no news for an operator."""
    return getattr(record, "status_code", None) != HTTPStatus.UNPROCESSABLE_ENTITY


LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "{asctime} {levelname} {name}: {message}", "style": "{"}},
    "filters": {
        "news": {"()": "django.utils.log.CallbackFilter", "callback": _is_news},
        "one_line": {"()": "openpalm.feedback.accounts.errors.OneLine"},
    },
    "handlers": {
        "stderr": {
            "class": "logging.StreamHandler",
            "formatter": "plain",
            "filters": ["news", "one_line"],
        }
    },
    "root": {"handlers": ["stderr"], "level": "WARNING"},
}
