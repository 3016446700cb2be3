#!/usr/bin/env bash
# Make a bare GPU host (Python 3.12, torch, no registries) ready to serve this checkout: unpack a site folder, install
# wheels beside it, write the plugin's entry points. Source it; a second call only sets the environment.
#
#   . benchmarks/gpu_host/setup.sh SITE_TAR [WHEELS [CACHES_TAR]]
#
# SITE_TAR is a tar.xz of a site folder: SGLang 0.5.16 and what it needs (0.5.23 comes from restore.sh, whose env.sh is
# sourced after this). WHEELS is a folder of wheels that the host lacks: aiohttp httpx rich prometheus-client pytest
# hypothesis ... CACHES_TAR holds .cache/flashinfer, .cache/tvm-ffi and .triton of an earlier run, which saves minutes of
# builds. Everything goes to /tmp/kvarn.
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../..") work=/tmp/kvarn
if [ ! -e "$work/ready" ]; then
    mkdir -p "$work/site" "$work/extra" "$work/plugin/sglang_kvarn-0.1.0.dist-info"
    tar xJf "$1" -C "$work/site"
    [ -z "${2:-}" ] || python3 -m pip install --quiet --no-index --no-deps --target "$work/extra" "$2"/*.whl
    [ -z "${3:-}" ] || tar xJf "$3" -C "$HOME"
    # SGLang's HTTP server imports it for speech; its wheel holds 3 MB of codecs
    [ -e "$work/extra/soundfile.py" ] || echo "class SoundFile: pass" >"$work/extra/soundfile.py"
    info=$work/plugin/sglang_kvarn-0.1.0.dist-info
    printf 'Metadata-Version: 2.1\nName: sglang-kvarn\nVersion: 0.1.0\n' >"$info/METADATA"
    python3 - "$root/pyproject.toml" >"$info/entry_points.txt" <<'END'
import sys, tomllib
groups = tomllib.load(open(sys.argv[1], "rb"))["project"]["entry-points"]
print("\n".join(f"[{group}]\n" + "\n".join(f"{k} = {v}" for k, v in own.items()) for group, own in groups.items()))
END
    touch "$work/ready"
fi
export PYTHONPATH=$work/site:$root/kernels:$root/python:$work/plugin:$work/extra
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
