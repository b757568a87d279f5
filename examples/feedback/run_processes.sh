#!/usr/bin/env bash
# Runs the feedback site as docs/feedback-deployment.md describes it, from Debian's packages, in one
# folder and without systemd: PostgreSQL, gunicorn, the worker and nginx with HTTPS.
#
#   apt-get install postgresql nginx openssl curl
#   pip install 'openpalm[deploy]'
#   examples/feedback/run_processes.sh FOLDER            until Ctrl-C
#   examples/feedback/run_processes.sh FOLDER --check    starts all, opens a page, ends all
#
# HTTPS_PORT, HTTP_PORT, WEB_PORT and POSTGRESQL_PORT change the ports. The certificate is self-signed
# and for `localhost`. The folder keeps the database: a second start finds it.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${1:?usage: run_processes.sh FOLDER [--check]}"
folder=$(cd "$1" && pwd)
chmod 711 "$folder"
https_port=${HTTPS_PORT:-8443} http_port=${HTTP_PORT:-8080}
web_port=${WEB_PORT:-8001} postgresql_port=${POSTGRESQL_PORT:-5433}

as_postgres=()
[ "$(id -u)" -ne 0 ] || as_postgres=(runuser -u postgres --)
programs=$(dirname "$(ls /usr/lib/postgresql/*/bin/initdb | sort -V | tail -n 1)")

children=()
end_all() {
  trap - EXIT INT TERM
  for child in "${children[@]}"; do kill "$child" 2>/dev/null || true; done
  for child in "${children[@]}"; do wait "$child" || true; done
  [ ! -f "$folder/postgresql/postmaster.pid" ] ||
    "${as_postgres[@]}" "$programs/pg_ctl" -D "$folder/postgresql" -m fast -s stop
}
trap end_all EXIT
trap 'exit 0' INT TERM

wait_for() {
  for _ in $(seq 300); do
    "$@" >/dev/null 2>&1 && return
    for child in "${children[@]}"; do
      kill -0 "$child" 2>/dev/null || { echo "a process ended; see $folder/*.log" >&2; exit 1; }
    done
    sleep 0.2
  done
  echo "no answer to: $*" >&2
  exit 1
}

# --- PostgreSQL

umask 077
[ -f "$folder/password" ] || openssl rand -hex 24 >"$folder/password"
password=$(cat "$folder/password")
if [ ! -d "$folder/postgresql" ]; then
  install -d -m 700 "$folder/postgresql"
  [ "$(id -u)" -ne 0 ] || chown postgres "$folder/postgresql"
  cp "$folder/password" "$folder/postgresql.password"
  [ "$(id -u)" -ne 0 ] || chown postgres "$folder/postgresql.password"
  (cd / && "${as_postgres[@]}" "$programs/initdb" --pgdata "$folder/postgresql" --username openpalm \
    --pwfile "$folder/postgresql.password" --auth scram-sha-256 --encoding UTF8) >"$folder/initdb.log"
  rm "$folder/postgresql.password"
fi
options="-c listen_addresses=127.0.0.1 -c unix_socket_directories= -p $postgresql_port"
(cd / && "${as_postgres[@]}" "$programs/pg_ctl" -D "$folder/postgresql" -s -w \
  -l "$folder/postgresql/server.log" -o "$options" start)
export PGPASSWORD=$password
database() { psql -h 127.0.0.1 -p "$postgresql_port" -U openpalm -d postgres -At -c "$1"; }
[ "$(database "SELECT 1 FROM pg_database WHERE datname = 'feedback'")" = 1 ] ||
  database "CREATE DATABASE feedback" >/dev/null
unset PGPASSWORD

# --- the site; the variables are those of feedback.env

export OPENPALM_FEEDBACK_DIR=$folder/feedback
export OPENPALM_FEEDBACK_HOSTS=localhost
export OPENPALM_FEEDBACK_HTTPS=1
export OPENPALM_FEEDBACK_PROXIES=1
export DATABASE_URL=postgresql://openpalm:$password@127.0.0.1:$postgresql_port/feedback

openpalm feedback manage migrate --verbosity 0
if [ ! -f "$folder/admin.password" ]; then
  DJANGO_SUPERUSER_PASSWORD=$(openssl rand -hex 12)
  export DJANGO_SUPERUSER_PASSWORD
  openpalm feedback manage createsuperuser --noinput --username admin --email admin@localhost
  printf '%s\n' "$DJANGO_SUPERUSER_PASSWORD" >"$folder/admin.password"
  unset DJANGO_SUPERUSER_PASSWORD
fi
gunicorn openpalm.feedback.wsgi:application --bind 127.0.0.1:"$web_port" --worker-class gthread --workers 2 --threads 8 --timeout 60 --graceful-timeout 30 >"$folder/web.log" 2>&1 &
children+=($!)
openpalm feedback worker --dir "$OPENPALM_FEEDBACK_DIR" >"$folder/worker.log" 2>&1 &
children+=($!)

# --- nginx

mkdir -p "$folder/nginx"
[ -f "$folder/nginx/privkey.pem" ] ||
  openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj /CN=localhost -addext subjectAltName=DNS:localhost \
    -keyout "$folder/nginx/privkey.pem" -out "$folder/nginx/fullchain.pem" 2>"$folder/openssl.log"
sed -e "s/palm\.example/localhost/" -e "s/127\.0\.0\.1:8001/127.0.0.1:$web_port/" \
  -e "s/listen 80;/listen 127.0.0.1:$http_port;/" -e "s/listen 443 ssl;/listen 127.0.0.1:$https_port ssl;/" \
  -e "s/\$host\$request_uri/\$host:$https_port\$request_uri/" -e "s#/etc/ssl/openpalm#$folder/nginx#" \
  "$here/nginx-site.conf" >"$folder/nginx/site.conf"
cat >"$folder/nginx/nginx.conf" <<END
$([ "$(id -u)" -ne 0 ] || echo "user root;")
pid nginx.pid;
error_log error.log;
events {}
http {
    include /etc/nginx/mime.types;
    access_log access.log;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    include site.conf;
}
END
nginx -p "$folder/nginx" -c nginx.conf -e error.log -g 'daemon off;' >"$folder/nginx.log" 2>&1 &
children+=($!)

site=https://localhost:$https_port
page() { curl --silent --show-error --fail --cacert "$folder/nginx/fullchain.pem" "$@"; }
wait_for page "$site/healthz"
page "$site/healthz"
echo
page "$site/login" | grep -q 'name="password"' || { echo "no form at $site/login" >&2; exit 1; }
echo "feedback: $site/ (sign in as admin; the password is in $folder/admin.password)"
if [ "${2:-}" != --check ]; then
  wait -n "${children[@]}" || true
  echo "a process ended; see $folder/*.log" >&2
  exit 1
fi
