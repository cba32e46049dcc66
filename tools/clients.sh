#!/bin/sh
# Other people's clients against the default model: tools/clients.sh VENV. They live in an environment of their own, and
# in build/clients where there is npm; without npm the two of them that need it are left out, and that is said.
set -eu
venv=$1
cd "$(dirname "$0")/.."
own=.venv-clients
node=build/clients

[ -x $own/bin/python ] || "$venv/bin/python" -m venv $own
$own/bin/python -m pip install -q --disable-pip-version-check -r tests/clients/requirements.txt
if command -v npm >/dev/null; then
    mkdir -p $node
    cp tests/clients/node/* $node/
    (cd $node && npm install --no-audit --no-fund --no-package-lock --loglevel error)
else
    echo 'npm is not installed: the npm clients are left out'
    node=
fi
exec "$venv/bin/python" -m tests.clients.run "$PWD/$own/bin/python" "$node"
