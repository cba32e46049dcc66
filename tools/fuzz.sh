#!/bin/sh
# Random requests against the API: tools/fuzz.sh VENV [SECONDS]. Schemathesis lives in an environment of its own.
set -eu
venv=$1
cd "$(dirname "$0")/.."
own=.venv-fuzz

[ -x $own/bin/python ] || "$venv/bin/python" -m venv $own
$own/bin/python -m pip install -q --disable-pip-version-check 'schemathesis>=4.32,<5'
exec "$venv/bin/python" -m tools.fuzz "$PWD/$own/bin/schemathesis" "${2:-600}"
