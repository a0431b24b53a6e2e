#!/bin/bash
# Builds .whl/site.tgz for a GPU machine that can reach no registry: A holds bitsandbytes and liger-kernel, B holds
# unsloth and what it needs (a folder of its own, since importing it changes transformers). About 25 MB; never
# committed (.git/info/exclude). Run in the repository root; $1 is a pip, default `python3 -m pip`.
set -e
PIP=${1:-python3 -m pip}
EXCLUDE=$(git rev-parse --git-dir)/info/exclude
mkdir -p "$(dirname "$EXCLUDE")" .whl
grep -qxF '/.whl/' "$EXCLUDE" 2>/dev/null || echo '/.whl/' >> "$EXCLUDE"
WORK=$(mktemp -d)
PLATFORMS=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do PLATFORMS+=(--platform ${tag}_x86_64); done
PYTHON=(--only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none "${PLATFORMS[@]}" --platform any)
get() { $PIP download -q --no-deps "${PYTHON[@]}" -d "$WORK/w$1" "${@:2}"; }
get A bitsandbytes==0.50.2 liger-kernel==0.8.5 cut-cross-entropy==25.1.1
get B unsloth==2026.10.9 unsloth_zoo==2026.10.9 trl==1.15.0 datasets==4.8.5 torchao==0.18.0 diffusers==0.42.1 tyro==1.0.17 \
  hf_transfer==0.1.9 json5==0.17.3 nest-asyncio==1.6.0 structlog==26.1.0 msgspec==0.22.0 pydantic==2.14.3 pydantic-core==2.50.4 \
  typer==0.29.2 dill==0.4.1 multiprocess==0.70.19 docstring-parser==0.18.0 typeguard==4.6.0 shtab==1.13.0 annotated-types==0.8.0 importlib_metadata
for site in A B; do $PIP install -q --no-index --no-deps --no-compile "${PYTHON[@]}" --target "$WORK/$site" "$WORK/w$site"/*.whl; done
# other CUDA versions' libraries and user interfaces: not used there, and most of the size
rm -rf "$WORK"/A/bitsandbytes/libbitsandbytes_{cuda11,cuda12,cuda132,rocm,xpu}* "$WORK"/B/studio "$WORK"/B/unsloth_cli
tar czf .whl/site.tgz -C "$WORK" A B
rm -rf "$WORK"
ls -l .whl/site.tgz
