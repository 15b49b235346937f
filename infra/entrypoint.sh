#!/usr/bin/env bash
# Start one role of the platform, or any other command. A role that others can reach refuses to start without its
# secret: whoever reaches Ray's or Prefect's ports unauthenticated can run code.
#
#   entrypoint.sh prefect-server | ray-head ARGS... | ray-worker ARGS... | flow ARGS... | client COMMAND
#   entrypoint.sh retry COMMAND | COMMAND
#
# ARGS are handed on to `ray start` and to `python -m flows.deploy`. `client` gives its command the secrets of both, and
# `retry` starts its command again after exit 3.
#
# HHNET_BIND            address to listen on (default 127.0.0.1)
# RAY_AUTH_TOKEN_PATH   file with Ray's token, the same on every node
# PREFECT_AUTH_FILE     file with `user:password` of the Prefect server
# RAY_HEAD              host:port that a worker joins
# HHNET_RETRY_AFTER     seconds before each further try of `retry` (default "30 120 480")
set -euo pipefail

readonly SHORTEST_SECRET=16

refuse() {
    echo "entrypoint: $1" >&2
    exit 2
}

is_loopback() {
    [[ "$1" == localhost || "$1" == ::1 || "$1" =~ ^127(\.[0-9]+){3}$ ]]
}

# The content of the secret file that variable $1 names; refuses one that is missing or too short to be a secret.
secret() {
    local path="${!1:-}"
    [[ -n "$path" ]] || refuse "$1 is not set: name the file that holds $2"
    [[ -r "$path" ]] || refuse "$1=$path cannot be read: it must hold $2"
    local value
    value="$(<"$path")"
    ((${#value} >= SHORTEST_SECRET)) || refuse "$1=$path holds fewer than $SHORTEST_SECRET characters: it must hold $2"
    printf '%s' "$value"
}

prefect_server() {
    local bind="${HHNET_BIND:-127.0.0.1}"
    if [[ -n "${PREFECT_AUTH_FILE:-}" ]] || ! is_loopback "$bind"; then
        PREFECT_SERVER_API_AUTH_STRING="$(secret PREFECT_AUTH_FILE "user:password of the Prefect server")"
        export PREFECT_SERVER_API_AUTH_STRING
    fi
    exec prefect server start --host "$bind" --port "${PREFECT_PORT:-4200}"
}

ray_token() {
    secret RAY_AUTH_TOKEN_PATH "Ray's token" >/dev/null
    export RAY_AUTH_MODE=token
}

ray_head() {
    local bind="${HHNET_BIND:-127.0.0.1}" node
    node="$bind"
    if [[ -n "${RAY_AUTH_TOKEN_PATH:-}" ]] || ! is_loopback "$bind"; then
        ray_token
    fi
    if is_loopback "$bind"; then
        # Ray takes a loopback --node-ip-address for the machine's other address and listens on all, but for this switch.
        export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
    elif [[ "$bind" == 0.0.0.0 ]]; then
        node="$(hostname -i | cut -d' ' -f1)"
    fi
    # Of an option that is given twice the last counts: ours, so that no argument listens where none may.
    exec ray start "$@" --head --block --disable-usage-stats --port "${RAY_PORT:-6379}" \
        --node-ip-address "$node" --dashboard-host "$bind" --dashboard-port "${RAY_DASHBOARD_PORT:-8265}"
}

ray_worker() { # listens on every address, wherever the head is
    [[ -n "${RAY_HEAD:-}" ]] || refuse "RAY_HEAD is not set: name the head as host:port"
    ray_token
    exec ray start "$@" --block --disable-usage-stats --address "$RAY_HEAD"
}

# What talks to both servers: the secrets become settings of this one process.
client() {
    if [[ -n "${PREFECT_AUTH_FILE:-}" ]]; then
        PREFECT_API_AUTH_STRING="$(secret PREFECT_AUTH_FILE "user:password of the Prefect server")"
        export PREFECT_API_AUTH_STRING
    fi
    [[ -z "${RAY_AUTH_TOKEN_PATH:-}" ]] || ray_token
    exec "$@"
}

# Exit 3 says that store or cluster are out of reach. Any other exit code would come again, or came from outside.
retry() {
    local pause status
    for pause in ${HHNET_RETRY_AFTER-30 120 480} never; do
        status=0
        "$@" || status=$?
        [[ "$status" == 3 && "$pause" != never ]] || exit "$status"
        echo "entrypoint: store or cluster are out of reach (exit 3): the next try is in $pause s" >&2
        sleep "$pause"
    done
}

case "${1:-}" in
    prefect-server) prefect_server ;;
    ray-head) shift && ray_head "$@" ;;
    ray-worker) shift && ray_worker "$@" ;;
    flow) shift && client python -m flows.deploy "$@" ;;
    client | retry)
        (($# > 1)) || refuse "$1 needs a command that it is to start"
        "$@"
        ;;
    "") refuse "name a role (prefect-server, ray-head, ray-worker, flow, client, retry) or a command" ;;
    *) exec "$@" ;;
esac
