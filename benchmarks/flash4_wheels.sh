#!/bin/bash
# flash-attn-4 for a GPU machine that can reach no registry: three files in .whl/flash4/, each small enough to be carried alone (the
# compiler that it is written in is 60 MB). There: cat the two parts into `tar xJ -C $SITE`, `tar xzf rest.tgz -C $SITE`, FLASH4_SITE=$SITE.
set -e
PIP=${1:-python3 -m pip}
WORK=$(mktemp -d)
mkdir -p .whl/flash4 "$WORK/rest" "$WORK/large"
get() { $PIP download -q --no-deps --pre --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux2014_x86_64 --platform any -d "$WORK/$1" "${@:2}"; }
get wrest flash-attn-4==4.0.0b36 nvidia-cutlass-dsl==4.8.1 nvidia-cutlass-dsl-libs-base==4.8.1 nvidia-cutlass-dsl-libs-core==4.8.1 \
  quack-kernels==0.6.5 apache-tvm-ffi==0.1.15.post2 torch-c-dlpack-ext==0.1.5
get wlarge nvidia-cutlass-dsl-libs-cu13==4.8.1
for which in rest large; do for wheel in "$WORK/w$which"/*.whl; do unzip -qo "$wheel" -d "$WORK/$which"; done; done
rm -rf "$WORK"/large/nvidia_cutlass_dsl/cu13/lib/stubs "$WORK"/large/nvidia_cutlass_dsl/cu13/lib/*.a
tar czf .whl/flash4/rest.tgz -C "$WORK/rest" .
tar cf - -C "$WORK/large" . | xz -9e -T1 > "$WORK/large.xz"
split -n 2 -d "$WORK/large.xz" .whl/flash4/large.
rm -rf "$WORK"
ls -l .whl/flash4
