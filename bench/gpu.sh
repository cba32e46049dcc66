#!/bin/sh
# Everything that a GPU machine can say about this server, in one call of under ten minutes, without a network:
#   sh bench/gpu.sh [--output bench/results/gpu-h200.json]
# Needs Python 3.12 with JAX 0.11 for CUDA; what else is missing is taken from .whl/ in the checkout, if there is one.
# --small tries all of it on a CPU. PYTHON=... is another interpreter.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
if [ -d .whl ]; then
    site=${TMPDIR:-/tmp}/jaxserve-site
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl
    PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONPATH
fi
PYTHONUNBUFFERED=1 exec "$PYTHON" -m bench.gpu "$@"
