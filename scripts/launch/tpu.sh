#!/usr/bin/env bash
# jaxprompt on a TPU VM or on all workers of a pod slice, from your own machine, with gcloud.
#
#   scripts/launch/tpu.sh setup NAME ZONE REPOSITORY          clone and install on every worker
#   scripts/launch/tpu.sh train NAME ZONE CONFIG [key=value]  the same command on every worker
#   scripts/launch/tpu.sh stop  NAME ZONE                     SIGTERM: save, and exit
#   scripts/launch/tpu.sh kill  NAME ZONE                     SIGKILL, and free the chips
#
# Workers find each other by themselves. Worker 0 alone writes, into `output` on its own disk; run the
# same command again after a preemption, with that disk or a copy of the run in its place.
set -euo pipefail

usage() {
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

[ $# -ge 3 ] || usage
what=$1 name=$2 zone=$3
shift 3

on_all() {
    gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$1"
}

case $what in
    setup)
        [ $# -eq 1 ] || usage
        on_all "test -d jaxprompt || git clone $(printf %q "$1") jaxprompt; \
cd jaxprompt && EXTRAS=tpu bash -c 'source scripts/environment.sh'"
        ;;
    train)
        [ $# -ge 1 ] || usage
        on_all "cd jaxprompt && JAXPROMPT_DISTRIBUTED=1 .venv/bin/jaxprompt train$(printf ' %q' "$@")"
        ;;
    stop) on_all "pkill -TERM -f '[b]in/jaxprompt train' || true" ;;
    # a process that died without letting go of the chips leaves this file
    kill) on_all "pkill -KILL -f '[b]in/jaxprompt' || true; sudo rm -f /tmp/libtpu_lockfile" ;;
    *) usage ;;
esac
