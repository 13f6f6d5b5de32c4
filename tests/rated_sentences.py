"""A small archive of rated sentences, laid out as vaderSentiment's, and a tokenizer for them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import torch

from trady_kernels.data.sentences import ARCHIVE, FILES

WORDS = ("good", "bad", "film", "phone", "the", "was", "very", "today")


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def write_archive(folder: Path, lines: Iterable[str], name: str = "tweets") -> Path:
    """The lines of one data set as the archive that ``find_sentences`` looks for in ``folder``."""
    inner, outer = io.BytesIO(), folder / ARCHIVE
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        _add(archive, "hutto/_README_.txt", b"nothing")
        _add(archive, f"hutto/{FILES[name]}", "\r\n".join(lines).encode())
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(outer, "w:gz") as archive:
        _add(archive, "vader/setup.py", b"raise SystemExit('never executed')")
        _add(archive, "vader/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return outer


def opinions(count: int) -> list[str]:
    """Lines of ``count`` different sentences, which a network can learn: good ones and bad ones by turns."""
    generator = torch.Generator().manual_seed(0)
    lines = []
    for index in range(count):
        words = [WORDS[i] for i in torch.randint(2, len(WORDS), (index % 5 + 2,), generator=generator)]
        words.insert(index % 3, ("good", "bad")[index % 2])
        lines.append(f"{index}\t{(1.5, -1.5)[index % 2]}\t{' '.join(words)} n{index}")
    return lines


def write_tokenizer(path: Path) -> Path:
    """A tokenizer of whole words: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, then the words."""
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    vocabulary = {word: index for index, word in enumerate((*special, *WORDS))}
    template = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template.append({"SpecialToken": {"id": "[SEP]", "type_id": 0}})
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template,
            "pair": [*template, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                name: {"id": name, "ids": [vocabulary[name]], "tokens": [name]} for name in special[2:]
            },
        },
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }
    path.write_text(json.dumps(content))
    return path
