#!/bin/sh
# Runs `openpalm serve` with the model that was promoted last; before the first promotion, with the
# model that is named:
#
#   OPENPALM_FEEDBACK_DIR=DIR serve_promoted.sh MODEL [OPTION OF openpalm serve]...
set -eu
PATH=/opt/openpalm/bin:$PATH
model=$1
shift
served=$OPENPALM_FEEDBACK_DIR/served.json
if [ -f "$served" ]; then
  model=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["path"])' "$served")
fi
exec openpalm serve "$model" "$@"
