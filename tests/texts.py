"""Real text for slow tests."""

from __future__ import annotations

import bz2
from pathlib import Path

import gensim
from gensim.corpora.wikicorpus import extract_pages, filter_wiki

SAMPLE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
"""a hundred articles of the English Wikipedia, which gensim carries for its own tests"""


def wikipedia(num_bytes: int) -> str:
    """The first `num_bytes` of the articles' text, markup taken away by gensim."""
    parts, size = [], 0
    with bz2.open(Path(gensim.__file__).parent / "test" / "test_data" / SAMPLE) as stream:
        for title, markup, _ in extract_pages(stream, ("0",)):
            text = " ".join(filter_wiki(markup).replace("'''", "").replace("''", "").split(" "))
            if len(text) > 2000:
                parts.append(f"{title}\n\n{text.strip()}\n")
                size += len(parts[-1].encode())
            if size >= num_bytes:
                break
    return "\n".join(parts).encode()[:num_bytes].decode(errors="ignore")
