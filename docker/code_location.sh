#!/bin/sh
# Becomes the code location's server, which is the command given. Once it answers, so that the daemon can start them
# again, the runs are marked as failed that a server before it left behind when it was killed.
set -eu
now=$(date +%s)
(
    until dagster api grpc-health-check --port "$CODE_LOCATION_PORT" >/dev/null 2>&1; do sleep 2; done
    python -m embed_pipeline.orchestration.abandoned embed_pipeline --started-before "$now"
) &
exec "$@"
