#!/usr/bin/env bash
# From a fresh clone to a prompt on a real language model: scripts/quickstart_smollm2.sh [key=value ...]
set -euo pipefail
export EXTRAS="${EXTRAS:+$EXTRAS,}smollm2"
source "$(dirname "$0")/environment.sh"
.venv/bin/jaxprompt train configs/smollm2.yaml "$@"
