#!/bin/sh
# Compile Triton's CUDA driver module as Triton itself would (triton/runtime/build.py), against a stand-in for the
# driver library, which is there only where there is a GPU.
set -eu
prefix=$1
python=$prefix/bin/python
nvidia=$("$python" -c 'import importlib.util as u; print(u.find_spec("triton").submodule_search_locations[0])')/backends/nvidia
include=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
echo | gcc -shared -x c -Wl,-soname,libcuda.so.1 -o libcuda.so.1 -
mkdir -p "$prefix/lib/finemill"
gcc "$nvidia/driver.c" -O3 -shared -fPIC -Wno-psabi -Wl,--no-as-needed -o "$prefix/lib/finemill/triton_driver.so" \
    -L. -l:libcuda.so.1 -I"$nvidia/include" -I"$include"
