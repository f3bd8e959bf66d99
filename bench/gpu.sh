#!/usr/bin/env bash
# The first minutes on a GPU, as bench/GPU.md says: each step cut off in time, everything written as it comes.
#   MINUTES=9 OUT=folder PYTHON=python3 bash bench/gpu.sh
set -u
MINUTES=${MINUTES:-9} PYTHON=${PYTHON:-python3}
cd "$(dirname "$0")/.." || exit 2
OUT=${OUT:-bench/results/latest/gpu-$(date +%m%d-%H%M%S)}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
if [ -n "$(ls -A "$OUT")" ]; then
    echo "gpu.sh: OUT=$OUT holds files of another run: name an empty folder" >&2
    exit 2
fi
export PYTHONPATH=.:tests${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
unset TRITON_INTERPRET STEP_KERNELS_BACKEND
export STEP_KERNELS_TUNED=off # until this run has measured rows of its own

left=25 # shares that are still to be given out
deadline=$((SECONDS + $(awk "BEGIN { print int(60 * $MINUTES) }")))
failed=0 child=0
printf '| step | ended | seconds | last line |\n| --- | --- | ---: | --- |\n' >"$OUT/summary.md"

# step NAME SHARE LOG COMMAND...: what a step leaves of its time goes to those after it.
step() {
    local name=$1 share=$2 log=$OUT/$3 begun=$SECONDS status how
    local own=$(((deadline - SECONDS) * share / left))
    shift 3
    left=$((left - share))
    if [ "$own" -lt 1 ]; then
        echo "| $name | not run, no time left | 0 | |" >>"$OUT/summary.md"
        return
    fi
    echo "=== $name, up to $own s"
    echo "=== $*" >>"$log"
    # An interrupt lets it write what it has; a shell's background jobs would ignore it.
    timeout --signal=INT --kill-after=10 "$own" env --default-signal=INT "$PYTHON" "$@" >>"$log" 2>&1 &
    child=$!
    wait "$child"
    status=$?
    kill -KILL -- "-$child" 2>/dev/null # what it has left running
    how="FAILED, exit status $status"
    if [ "$status" -eq 0 ]; then
        how=passed
    elif [ $((SECONDS - begun)) -ge "$own" ]; then
        how="cut off"
    else
        failed=1
    fi
    echo "| $name | $how | $((SECONDS - begun)) | $(tail -n 1 "$log" | tr '|' '/' | cut -c 1-160) |" >>"$OUT/summary.md"
    tail -n 8 "$log"
}

tests=(-m pytest -v --tb=short --no-summary -p no:cacheprovider -o filterwarnings=default -o faulthandler_timeout=60 -m gpu)
if "$PYTHON" -c "import xdist" 2>/dev/null; then
    tests+=(-n "$(nproc)")
fi
risky=(tests/gpu/test_capture.py tests/gpu/test_model.py tests/gpu/test_attention.py)
model=(-m bench model --device cuda --out "$OUT" --vit)
trap 'kill -INT -- "-$child"; wait "$child"; echo "| interrupted | | | |" | tee -a "$OUT/summary.md"; exit 130' INT TERM

step "self-check" 3 selfcheck.log -m step_kernels
step "tests: capture, model, attention" 4 tests.log "${tests[@]}" "${risky[@]}"
step "tune" 2 tune.log -m step_kernels tune --minutes 0.5 --out "$OUT/tuned.json"
if [ -f "$OUT/tuned.json" ]; then
    STEP_KERNELS_TUNED=$OUT/tuned.json
fi
step "bench model, ViT-L" 8 bench.log "${model[@]}" large --batch 8 1 32
step "other tests" 4 tests.log "${tests[@]}" tests/gpu "${risky[@]/#/--ignore=}"
step "bench kernels" 3 bench.log -m bench kernels --device cuda --out "$OUT"
step "bench peers" 1 bench.log -m bench peers --device cuda --out "$OUT"

echo
cat "$OUT/summary.md"
echo "All files: $OUT"
exit "$failed"
