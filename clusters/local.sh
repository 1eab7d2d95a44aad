#!/usr/bin/env bash
# Starts Ray on this machine and stays in the foreground; Ctrl-C stops it.
#
#   clusters/local.sh [options of `ray start`]      e.g. clusters/local.sh --num-gpus=1 --port=6400
#
# Token authentication is on: Ray's control port listens on every interface, and whoever can submit a job owns the machine.
# The token lies in $RAY_AUTH_TOKEN_PATH, else in ~/.ray/auth_token, and is made when there is none. Clients need the same file
# and RAY_AUTH_MODE=token. The dashboard and the job API answer on http://127.0.0.1:8265 only.
#
# Exported here, for every job on this cluster: no node will come, so what has no room is refused instead of waited for
# (HELIOSTAT_FIXED_SIZE; set it empty when you add nodes by hand), and a stopped job has 120 s to save, not Ray's 3.
set -euo pipefail

export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0
export RAY_JOB_STOP_WAIT_TIME_S="${RAY_JOB_STOP_WAIT_TIME_S:-120}"
export HELIOSTAT_FIXED_SIZE="${HELIOSTAT_FIXED_SIZE-1}"

token_file="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
if [[ -z "${RAY_AUTH_TOKEN:-}" && ! -s "$token_file" ]]; then
    (umask 077 && ray get-auth-token --generate >/dev/null)  # Ray would let everybody on the machine read it
fi

exec ray start --head --block --dashboard-host=127.0.0.1 "$@"
