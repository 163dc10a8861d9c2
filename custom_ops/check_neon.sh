#!/bin/sh
# Builds kernels_check for 64-bit ARM and runs it in an emulator: check_neon.sh BUILD_FOLDER. Wants
# aarch64-linux-gnu-g++ and qemu-aarch64; where one is missing it says so and succeeds.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
for tool in aarch64-linux-gnu-g++ qemu-aarch64; do
  command -v "$tool" > /dev/null || { echo "left out: there is no $tool"; exit 0; }
done
cmake -S "$here" -B "$1" -G Ninja -DCMAKE_BUILD_TYPE=Release -DVQONNX_BUILD_CHECK=ON -DCMAKE_SYSTEM_NAME=Linux \
  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static > "$1.log" ||
  { cat "$1.log"; exit 1; }
cmake --build "$1" --parallel
qemu-aarch64 "$1/kernels_check" 100 1000
