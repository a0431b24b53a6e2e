#!/bin/bash
# One command on the GPU machine, from the repository root (built here first with benchmarks/wheels.sh):
#   COMMIT=abc123 bash benchmarks/gpu_run.sh tests kernels twins
# Steps run in the order given, each under its own limit; results and logs land in $OUT.
#   smoke    imports, doctor, one fused function on the GPU
#   tests    pytest tests/gpu
#   kernels  benchmarks/kernels.py (KERNELS="--quick --only rope" adds flags)
#   twins    benchmarks/twins.py (TWINS adds flags)
#   steps    benchmarks/steps.py: STEPS="W1:hf,W1:unsloth,W1:fxfuse" names the jobs, STEPS_FLAGS="--profile W1:fxfuse --limit 80" adds flags
#   frontier benchmarks/frontier.py: FRONTIER="--workloads W1" or "--longest --cap 24 --lengths 65536" adds flags
#   floor    benchmarks/floor.py: products and attention of the workloads alone (FLOOR adds flags); rows go to steps.jsonl too
#   lora, dequantize, linear_loss   benchmarks/NAME.py (LORA, DEQUANTIZE, LINEAR_LOSS add flags)
#   shell    runs $RUN_SHELL under the same environment
set -uo pipefail
TMP=$(python3 -c 'import tempfile; print(tempfile.gettempdir())')
export OUT=${OUT:-$TMP/out} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export RUN=${RUN:-$(date -u +%Y%m%d-%H%M%S)}
SITE=$TMP/site
mkdir -p "$OUT"
if [ ! -d "$SITE/A" ] && [ -f .whl/site.tgz ]; then mkdir -p "$SITE" && tar xzf .whl/site.tgz -C "$SITE"; fi
export PYTHONPATH=$SITE/A${PYTHONPATH:+:$PYTHONPATH} UNSLOTH_SITE=$SITE/B UNSLOTH_COMPILE_LOCATION=$TMP/unsloth_cache
if ! (cd / && python3 -c 'import fxfuse.kernels, fxfuse.patterns' 2>/dev/null); then
  python3 -m pip install -q --no-index --no-deps --no-build-isolation --no-cache-dir -e . 2>"$OUT/install.log" ||
    { echo "editable install failed (install.log); linking the folders in place"; ln -sfn ../kernels fxfuse/kernels; ln -sfn ../patterns fxfuse/patterns; export PYTHONPATH=$PWD:$PYTHONPATH; }
fi
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw,memory.used --format=csv,noheader
python3 -c 'import sys, fxfuse.kernels, fxfuse.patterns, torch, triton, transformers; print("python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__, "transformers", transformers.__version__)' || exit 1
step() { # step NAME SECONDS command...: a step that fails does not stop the next
  local name=$1 limit=$2; shift 2
  echo "== $name $(date +%T)"
  timeout -k 10 "$limit" "$@" 2>&1 | tee "$OUT/$name.log" | tail -n "${TAIL:-40}"
  echo "== $name ended $(date +%T) rc ${PIPESTATUS[0]}"
}
for what in "$@"; do
  case $what in
    smoke) step smoke 120 python3 -m fxfuse doctor ;;
    tests) step tests "${TESTS_LIMIT:-240}" python3 -m pytest --import-mode=importlib -q -x --durations=10 -p no:cacheprovider ${TESTS:-tests/gpu} ;;
    kernels) step kernels "${KERNELS_LIMIT:-420}" python3 benchmarks/kernels.py --out "$OUT/kernels.jsonl" --jobs 12 ${KERNELS:-}
             python3 benchmarks/tables.py --show kernels --results "$OUT" ;;
    twins) step twins "${TWINS_LIMIT:-200}" python3 benchmarks/twins.py --out "$OUT/twins.jsonl" ${TWINS:-} ;;
    steps) step steps "${STEPS_LIMIT:-575}" python3 benchmarks/steps.py --out "$OUT/steps.jsonl" --logs "$TMP/step_logs" \
             --suite "${STEPS:?names the jobs}" --deadline "$(( ${STEPS_LIMIT:-575} - 15 ))" ${STEPS_FLAGS:-}
           tar czf "$OUT/step_logs.tgz" -C "$TMP" step_logs ;;
    frontier) step frontier "${FRONTIER_LIMIT:-575}" python3 benchmarks/frontier.py --out "$OUT/frontier.jsonl" --logs "$TMP/frontier_logs" \
                --deadline "$(( ${FRONTIER_LIMIT:-575} - 15 ))" ${FRONTIER:-}
              tar czf "$OUT/frontier_logs.tgz" -C "$TMP" frontier_logs ;;
    floor) step floor "${FLOOR_LIMIT:-150}" python3 benchmarks/floor.py --out "$OUT/steps.jsonl" ${FLOOR:-} ;;
    lora | dequantize | linear_loss)
      flags=${what^^}
      step "$what" "${PRODUCTS_LIMIT:-200}" python3 "benchmarks/$what.py" --out "$OUT/$what.jsonl" ${!flags:-}
      python3 benchmarks/tables.py --show "$what" --results "$OUT" ;;
    shell) step shell "${SHELL_LIMIT:-300}" bash -c "$RUN_SHELL" ;;
    *) echo "unknown step $what" ;;
  esac
done
nvidia-smi --query-gpu=clocks.sm,temperature.gpu,power.draw --format=csv,noheader
