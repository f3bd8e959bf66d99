#!/usr/bin/env bash
# The first minutes on a GPU, as bench/GPU.md says: each step cut off in time, everything written as it comes.
#   MINUTES=9 OUT=folder PYTHON=python3 bash bench/gpu.sh [STEP...]
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

declare -A shares=([self-check]=3 [tests]=4 [tune]=2 [eager-model]=3 [model]=8 [other-tests]=4 [kernels]=3 [peers]=1)
steps=("$@")
[ $# -gt 0 ] || steps=("${!shares[@]}")
left=0 # shares that are still to be given out
for name in "${steps[@]}"; do
    if [ -z "${shares[${name:-?}]-}" ]; then
        echo "gpu.sh: no step $name: there are ${!shares[*]}" >&2
        exit 2
    fi
    left=$((left + ${shares[$name]}))
done
deadline=$((SECONDS + $(awk "BEGIN { print int(60 * $MINUTES) }")))
failed=0 child=0
printf '| step | ended | seconds | last line |\n| --- | --- | ---: | --- |\n' >"$OUT/summary.md"

# step NAME LOG COMMAND...: what a step leaves of its time goes to those after it.
step() {
    [[ " ${steps[*]} " == *" $1 "* ]] || return 0
    local name=$1 share=${shares[$1]} log=$OUT/$2 begun=$SECONDS status how
    local own=$(((deadline - SECONDS) * share / left))
    shift 2
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
model=(-m bench model --device cuda --vit large --batch 8 1 32 --out)
trap 'kill -INT -- "-$child"; wait "$child"; echo "| interrupted | | | |" | tee -a "$OUT/summary.md"; exit 130' INT TERM

step self-check selfcheck.log -m step_kernels
step tests tests.log "${tests[@]}" "${risky[@]}"
step tune tune.log -m step_kernels tune --minutes 0.5 --out "$OUT/tuned.json"
if [ -f "$OUT/tuned.json" ]; then
    STEP_KERNELS_TUNED=$OUT/tuned.json
fi
step eager-model bench.log "${model[@]}" "$OUT/eager" --no-compile --only static
step model bench.log "${model[@]}" "$OUT"
step other-tests tests.log "${tests[@]}" tests/gpu "${risky[@]/#/--ignore=}"
step kernels bench.log -m bench kernels --no-compile --device cuda --out "$OUT"
step peers bench.log -m bench peers --device cuda --out "$OUT"

echo
cat "$OUT/summary.md"
echo "All files: $OUT"
exit "$failed"
