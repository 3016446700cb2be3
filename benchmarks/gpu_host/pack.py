# SPDX-License-Identifier: Apache-2.0
"""Pack SGLang 0.5.23 with its torch for a GPU host that has an older torch and reaches no package registry.

    python benchmarks/gpu_host/pack.py .gpu/newest        (reaches PyPI, wants 5 GB of disk)

takes 18 minutes of CPU time and writes OUT/piece-000 to -005: folders of at most 58 MiB each, 348 MiB in all, for a
transfer that takes 64 MiB at a time, with restore.sh and smoke.py in each. restore.sh says how to put them together.

The host (Python 3.12, CUDA 13.0, torch 2.11.0+cu130) keeps what torch 2.14.1 finds good enough there: every NVIDIA
library but NCCL, whose 2.28 lacks 11 functions that libtorch_cuda.so 2.14.1 binds at load, and numpy, scipy, pandas,
numba, pyarrow, accelerate, torchaudio. requirements-0.5.23.txt is what CI installed with sglang==0.5.23, less those
and less what a text model on one Hopper GPU does not import (`UNUSED` below).
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import fatbin

HERE = Path(__file__).resolve().parent
ARCH = 90
PIECE_BYTES = 58 << 20
GLIBC = ("2_5", "2_12", "2_17", "2_18", "2_24", "2_26", "2_27", "2_28", "2_31", "2_34", "2_35", "2_39")
PLATFORMS = [f"manylinux{n}_x86_64" for n in ("1", "2010", "2014")] + [f"manylinux_{v}_x86_64" for v in GLIBC]

# paths in the site folder that a text model on one Hopper GPU never opens: FA3 and MLA kernels of sgl_kernel (1.1 GB),
# other architectures, diffusion models, profilers, static libraries, tokenizer data of one vendor
UNUSED = (
    "sgl_kernel/flash_ops*",
    "sgl_kernel/flashmla_ops*",
    "sgl_kernel/infllm_ops*",
    "sgl_kernel/sm100",
    "sglang/multimodal_gen",
    "triton/_C/libproton.so",
    "triton/backends/nvidia/lib/cupti*",
    "triton/backends/nvidia/bin/ptxas-blackwell",
    "triton/backends/nvidia/bin/cuobjdump",
    "triton/backends/nvidia/bin/nvdisasm",
    "torch/bin/protoc*",
    "nvidia/nccl/lib/libnccl_device.bc",
    "mistral_common/data",
    "pycountry/locales",
    "xgrammar/include",
    "*.data",
    "**/*.a",
    "**/tests",
)


def download(requirements: Path, folder: Path) -> None:
    """Fetch the wheels that a requirements file pins, for CPython 3.12 on x86-64 Linux."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp", "--dest", str(folder)]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run([*command, "--requirement", str(requirements)], check=True)


def unpack(wheels: Path, site: Path) -> None:
    """Lay wheels out as pip would, less what is unused; a wheel's scripts and headers are not installed."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                target = Path(archive.extract(member, site))
                # zipfile drops the bits that make ptxas and torch_shm_manager programs
                if mode := member.external_attr >> 16 & 0o777:
                    target.chmod(mode | 0o600)
        wheel.unlink()
        for pattern in UNUSED:
            for path in sorted(site.glob(pattern)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def blank_libraries(site: Path) -> None:
    """Blank other architectures and symbols in every shared library, and check that no kernel of ours went."""
    for library in sorted(p for p in site.rglob("*.so*") if p.is_file() and p.open("rb").read(4) == b"\x7fELF"):
        before = fatbin.census(library)
        zeroed = fatbin.blank(library, ARCH)
        after = fatbin.census(library)
        kept = (fatbin.CUBIN, ARCH)
        if after[kept] != before[kept]:
            raise ValueError(f"{library}: {before[kept]} sm_{ARCH} cubins before, {after[kept]} after")
        if zeroed > 8 << 20:
            counts = f"{dict(before)} -> {dict(after)}"
            print(f"{library.relative_to(site)}: {zeroed >> 20} MiB zeroed, {counts}", flush=True)


def split(site: Path, out: Path) -> list[Path]:
    """Compress the site folder into pieces of at most PIECE_BYTES, one folder each, with a list of their sha256."""
    # one stream: the x86 filter helps code and hardly hurts the rest; -T2 splits it into blocks of 192 MiB
    tar = subprocess.Popen(["tar", "c", "--sort=name", "--owner=0", "--group=0", "."], cwd=site, stdout=subprocess.PIPE)
    xz = subprocess.Popen(["xz", "-T2", "--x86", "--lzma2=preset=9"], stdin=tar.stdout, stdout=subprocess.PIPE)
    assert tar.stdout is not None and xz.stdout is not None, "both were opened as pipes"
    tar.stdout.close()
    pieces = []
    while block := xz.stdout.read(PIECE_BYTES):
        folder = out / f"piece-{len(pieces):03}"
        folder.mkdir()
        piece = folder / f"site.tar.xz.{len(pieces):03}"
        piece.write_bytes(block)
        pieces.append(piece)
    if tar.wait() or xz.wait():
        raise RuntimeError(f"expected tar and xz to end well, got {tar.returncode} and {xz.returncode}")
    sums = "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in pieces)
    # every piece brings the list and the script, so any of them may come last
    for piece in pieces:
        (piece.parent / "SHA256SUMS").write_text(sums)
        for script in ("restore.sh", "smoke.py"):
            shutil.copy(HERE / script, piece.parent)
    return pieces


def main() -> None:
    """Download, trim, blank, compress; print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the pieces; pieces in it are replaced")
    parser.add_argument("--requirements", type=Path, default=HERE / "requirements-0.5.23.txt")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for stale in args.out.glob("piece-*"):
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory() as work:
        wheels, site = Path(work, "wheels"), Path(work, "site")
        site.mkdir()
        download(args.requirements, wheels)
        unpack(wheels, site)
        blank_libraries(site)
        pieces = split(site, args.out)
    sizes = [p.stat().st_size for p in pieces]
    print(f"{len(pieces)} pieces, {sum(sizes) / (1 << 20):.1f} MiB, in {args.out}")


if __name__ == "__main__":
    main()
