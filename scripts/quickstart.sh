#!/usr/bin/env bash
# From a fresh clone to a tuned prompt: scripts/quickstart.sh [key=value ...]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
.venv/bin/jaxprompt train configs/quickstart.yaml "$@"
