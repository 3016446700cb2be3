#!/usr/bin/env bash
# Put together on a GPU host what pack.py packed: each call takes the pieces beside it, the one that completes them
# unpacks. Calls may come in any order and be repeated; KVARN_PIECES and KVARN_SITE name other folders.
#
#   bash .gpu/newest/piece-000/restore.sh        then the same for every other piece, on one machine
#   . /tmp/site-newest/env.sh && python3 .gpu/newest/piece-000/smoke.py
set -euo pipefail
here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
pieces=${KVARN_PIECES:-/tmp/kvarn-newest} site=${KVARN_SITE:-/tmp/site-newest}
mkdir -p "$pieces"
cp "$here"/site.tar.xz.* "$here/SHA256SUMS" "$pieces"
cd "$pieces"

missing=$(cut -c67- SHA256SUMS | while read -r name; do [ -e "$name" ] || echo "$name"; done)
if [ -n "$missing" ]; then
    echo "$(ls site.tar.xz.* | wc -l) of $(wc -l <SHA256SUMS) pieces, missing:" $missing
    exit
fi
[ -e "$site/env.sh" ] && cmp -s SHA256SUMS "$site/SHA256SUMS" && { echo "$site is complete"; exit; }
sha256sum --check --quiet SHA256SUMS

rm -rf "$site"
mkdir -p "$site"
# -T0: xz 5.4 decompresses blocks in parallel
cat site.tar.xz.* | xz -dc -T0 | tar x -C "$site"

# torch looks for the NVIDIA libraries beside itself, ../../nvidia; all but NCCL are the host's
nvidia=$(PYTHONPATH='' python3 -c 'import nvidia; print(next(iter(nvidia.__path__)))')
for folder in "$nvidia"/*/; do
    name=$(basename "$folder")
    [ -e "$site/nvidia/$name" ] || ln -s "$nvidia/$name" "$site/nvidia/$name"
done

# the second folder is what a .pth file of CUTLASS adds where pip installs it; SGLang's Qwen models import it.
# torch was built with cuDNN 9.24 and its Python check refuses an older minor version, which no text model calls
cat >"$site/env.sh" <<END
export PYTHONPATH=$site:$site/nvidia_cutlass_dsl/dsl_packages\${PYTHONPATH:+:\$PYTHONPATH} PYTORCH_SKIP_CUDNN_COMPATIBILITY_CHECK=1 PYTHONUNBUFFERED=1
END
cp SHA256SUMS "$site"
echo "$site is complete: . $site/env.sh"
