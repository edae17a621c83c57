# Shared by quickstart and check: one virtual environment in .venv, installed only when its inputs changed.
# Sourced, never run.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 GRADIO_ANALYTICS_ENABLED=False

say() { printf '\n==> %s\n' "$*" >&2; }

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ] && ! command -v "$PYTHON" >/dev/null 2>&1; then
        echo "error: PYTHON=$PYTHON is not a program; unset it or name a Python 3.10+" >&2
        exit 3
    fi
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10; do
        [ -n "$candidate" ] || continue
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "error: Python 3.10 or newer with venv was not found; install it or set PYTHON=/path/to/python3" >&2
    exit 3
}

# pip prints nothing for minutes while llama.cpp compiles; say that it is working
heartbeat() {
    local started=$SECONDS nap=
    trap 'kill "$nap" 2>/dev/null; exit' TERM
    while :; do
        sleep 20 >/dev/null 2>&1 &
        nap=$!
        wait "$nap"
        if pgrep -f 'cc1plus|ninja|cmake' >/dev/null 2>&1; then
            echo "    compiling llama.cpp, $((SECONDS - started)) s (about 5 minutes on 2 cores, once)" >&2
        else
            echo "    installing, $((SECONDS - started)) s" >&2
        fi
    done
}

# install EXTRA: make .venv hold this project with that extra, at the versions of constraints.txt
install() {
    local extra=$1 python stamp wanted log done status=0
    python=$(find_python)
    wanted=$(cat "$root/pyproject.toml" "$root/constraints.txt" <("$python" --version) <(printf '%s' "$root") | sha256sum | cut -d' ' -f1)
    stamp="$venv/.installed-$extra"
    for done in "$stamp" "$venv/.installed-dev"; do # dev holds everything
        if [ -f "$done" ] && [ "$(cat "$done")" = "$wanted" ]; then
            say "environment: $venv (reused)"
            return
        fi
    done
    if ! command -v c++ >/dev/null 2>&1 && ! command -v g++ >/dev/null 2>&1 && ! command -v clang++ >/dev/null 2>&1; then
        echo "error: no C++ compiler (needed once, for llama.cpp); install g++ or clang++" >&2
        exit 3
    fi
    say "environment: installing into $venv with $("$python" --version)"
    if ! "$venv/bin/python" -c 'import pip' 2>/dev/null || [ "$("$venv/bin/python" --version)" != "$("$python" --version)" ]; then
        "$python" -m venv --clear "$venv" # none yet, half made, or made by another Python
    fi
    log="$venv/install-$extra.log"
    heartbeat &
    beat=$!
    trap 'kill "$beat" 2>/dev/null' EXIT
    {
        # torch first and alone: a resolver that meets it through another package may choose a build for GPUs
        "$venv/bin/python" -m pip install -c "$root/constraints.txt" torch &&
            "$venv/bin/python" -m pip install -c "$root/constraints.txt" -e "$root[$extra]"
    } >"$log" 2>&1 || status=$?
    kill "$beat" 2>/dev/null || true
    wait "$beat" 2>/dev/null || true
    trap - EXIT
    if [ "$status" -ne 0 ]; then
        tail -n 25 "$log" >&2
        echo "error: installation failed; the whole log is $log" >&2
        exit 3
    fi
    echo "$wanted" >"$stamp"
}
