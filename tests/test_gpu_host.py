# SPDX-License-Identifier: Apache-2.0
"""What goes to a GPU host comes out there as it was packed, less the kernels of other architectures."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "gpu_host"))

import fatbin
import pack

PTX, CUBIN = 1, fatbin.CUBIN


def container(*entries: tuple[int, int, bytes]) -> bytes:
    """Return a fatbin container of (kind, architecture, payload) entries; headers of 64 bytes as nvcc writes them."""
    body = b"".join(
        struct.pack("<HHIQIIHHI", kind, 0x101, 64, len(payload), 0, 0, 8, 1, arch).ljust(64, b"\1") + payload
        for kind, arch, payload in entries
    )
    return struct.pack("<IHHQ", fatbin.CONTAINER_MAGIC, 1, 16, len(body)) + body


def library(fatbins: bytes) -> bytes:
    """Return a 64-bit ELF file with the sections .text, .nv_fatbin, .symtab, .strtab, .debug_info and .shstrtab."""
    parts = [
        (".text", 1, 6, b"code" * 4),
        (".nv_fatbin", 1, 2, fatbins),
        (".symtab", 2, 0, b"symbols!" * 3),
        (".strtab", 3, 0, b"\0name\0"),
        (".debug_info", 1, 0, b"lines"),
    ]
    names = b"\0" + b"".join(name.encode() + b"\0" for name, *_ in parts) + b".shstrtab\0"
    parts.append((".shstrtab", 3, 0, names))
    body, table = b"", struct.pack("<IIQQQQIIQQ", *[0] * 10)
    for name, kind, flags, payload in parts:
        at = names.index(b"\0" + name.encode() + b"\0") + 1
        table += struct.pack("<IIQQQQIIQQ", at, kind, flags, 0, 64 + len(body), len(payload), 0, 0, 8, 0)
        body += payload.ljust(-(-len(payload) // 8) * 8, b"\0")
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 3, 62, 1, 0, 0, 64 + len(body), 0, 64, 0, 0, 64, 7, 6
    )
    return header + body + table


FATBINS = (
    container((CUBIN, 80, b"ampere.." * 4), (CUBIN, 90, b"hopper.." * 5), (PTX, 120, b"ptx....." * 2))
    # padding, then a kernel that Hopper runs from PTX
    + bytes(16)
    + container((CUBIN, 80, b"ampere.." * 2), (PTX, 80, b"ptx80..."))
)


@pytest.fixture
def path(tmp_path) -> Path:
    file = tmp_path / "lib.so"
    file.write_bytes(library(FATBINS))
    return file


def test_census_counts_entries_by_kind_and_architecture(path):
    assert fatbin.census(path) == {(CUBIN, 80): 2, (CUBIN, 90): 1, (PTX, 120): 1, (PTX, 80): 1}


def test_blank_zeroes_other_architectures_symbols_and_debug_sections_only(path):
    before = path.read_bytes()
    zeroed = fatbin.blank(path, 90)
    after = path.read_bytes()
    gone = (b"ampere.." * 4, b"ptx....." * 2, b"symbols!" * 3, b"\0name\0", b"lines")
    assert zeroed == sum(map(len, gone))
    expected = before
    for payload in gone:
        # the longer of the two ampere payloads comes first
        expected = expected.replace(payload, bytes(len(payload)), 1)
    assert after == expected
    assert fatbin.census(path) == {(CUBIN, 80): 1, (CUBIN, 90): 1, (PTX, 80): 1}


def test_blank_twice_changes_nothing(path):
    fatbin.blank(path, 90)
    once = path.read_bytes()
    fatbin.blank(path, 90)
    assert path.read_bytes() == once


@pytest.mark.parametrize(
    "fatbins, claim",
    [
        (FATBINS + b"stray...", "expected a fatbin container"),
        (FATBINS[:-8], "the container at"),
        (FATBINS.replace(struct.pack("<Q", 40), struct.pack("<Q", 48), 1), "expected an entry header"),
    ],
    ids=["bytes after the last container", "a container cut short", "an entry of another size"],
)
def test_blank_refuses_a_section_it_does_not_account_for_and_changes_nothing(path, fatbins, claim):
    path.write_bytes(library(fatbins))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=claim):
        fatbin.blank(path, 90)
    assert path.read_bytes() == before


def test_blank_refuses_what_is_no_elf_file(tmp_path):
    file = tmp_path / "lib.so"
    file.write_bytes(b"INPUT(libfoo.so.1)".ljust(64))
    with pytest.raises(ValueError, match="ELF"):
        fatbin.blank(file, 90)


@pytest.mark.skipif(shutil.which("xz") is None, reason="the pieces are one xz stream")
def test_pieces_in_any_order_restore_the_site_folder(tmp_path, monkeypatch):
    site, out, restored = tmp_path / "site", tmp_path / "out", tmp_path / "restored"
    (site / "nvidia" / "nccl").mkdir(parents=True)
    (site / "nvidia" / "nccl" / "lib.so").write_bytes(os.urandom(5000))
    (site / "tool").write_text("#!/bin/sh\n")
    (site / "tool").chmod(0o755)
    host = tmp_path / "host" / "nvidia"
    for name in ("nccl", "cudnn"):
        (host / name).mkdir(parents=True)
    out.mkdir()
    monkeypatch.setattr(pack, "PIECE_BYTES", 2000)
    pieces = pack.split(site, out)
    assert len(pieces) == 3

    environment = os.environ | {"KVARN_PIECES": str(tmp_path / "pieces"), "KVARN_SITE": str(restored)}
    # python3 finds the host's NVIDIA libraries; here it is a script that names the folder made above
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text(f"#!/bin/sh\necho {host}\n")
    (tmp_path / "bin" / "python3").chmod(0o755)
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"

    def restore(piece: Path) -> str:
        command = ["bash", str(piece.parent / "restore.sh")]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    assert "missing: site.tar.xz.000 site.tar.xz.001" in restore(pieces[2])
    assert "missing: site.tar.xz.001" in restore(pieces[0])
    assert "missing" in restore(pieces[0]) and not restored.exists()
    assert "is complete" in restore(pieces[1])
    assert (restored / "nvidia" / "nccl" / "lib.so").read_bytes() == (site / "nvidia" / "nccl" / "lib.so").read_bytes()
    assert os.access(restored / "tool", os.X_OK)
    # the host's library where none was packed, the packed one where there is one
    assert (restored / "nvidia" / "cudnn").readlink() == host / "cudnn"
    assert not (restored / "nvidia" / "nccl").is_symlink()
    assert str(restored) in (restored / "env.sh").read_text()
    (restored / "tool").unlink()
    restore(pieces[1])
    assert not (restored / "tool").exists(), "a complete folder is not unpacked again"

    (tmp_path / "pieces" / "SHA256SUMS").unlink()
    shutil.rmtree(restored)
    pieces[1].write_bytes(pieces[1].read_bytes()[:-1])
    with pytest.raises(subprocess.CalledProcessError):
        restore(pieces[1])
    assert not restored.exists()
