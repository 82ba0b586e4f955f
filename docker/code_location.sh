#!/bin/sh
# Becomes the code location's server, COMMAND. Once that one answers, and the daemon has noticed (it looks every minute;
# before, its retry of a run would fail for good), the runs end that a server before it left behind when it was killed.
set -eu
now=$(date +%s)
(
    until dagster api grpc-health-check --port "$CODE_LOCATION_PORT" >/dev/null 2>&1; do sleep 5; done
    sleep "${ABANDONED_DELAY:-0}"
    python -m embed_pipeline.orchestration.abandoned embed_pipeline --started-before "$now"
) &
exec "$@"
