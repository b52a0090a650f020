#!/usr/bin/env bash
# Runs the tests in the same environment: scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
# else each command that a test starts would compile the whole package
unset PYTHONDONTWRITEBYTECODE
.venv/bin/python -m pytest -n "${WORKERS:-2}" --dist worksteal "$@"
